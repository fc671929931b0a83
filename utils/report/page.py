"""One seed's report.html: gathers the values that templates/report.html shows.

Tables: utils/report/tables.py; the blocks that every page is composed of: utils/report/html.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from utils.files.storage import write_bytes
from utils.report import (
    class_names,
    figures,
    links,
    plots,
    plots_classes,
    plots_nested,
    plots_routing,
    plots_tasks,
    tables,
    tables_classes,
)
from utils.report import settings as run_settings
from utils.report.html import Folded, Lines, Note, Section, facts, figure_sections, render
from utils.report.results import load_rows
from utils.run import mistake_images, sample_images
from utils.text import clock, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = {  # file name: heading, caption
    "accuracy_curve": ("Accuracy", "Test accuracy over all classes seen so far, after each task."),
    "forgetting": (
        "Forgetting",
        "For each task but the last: its best accuracy after an earlier task minus the one at the end, in points.",
    ),
    "accuracy_matrix": ("Accuracy matrix", "Row: after learning a task. Column: the test classes of a task. Percent."),
    "errors": (
        "What the errors are",
        "All test images of the classes seen, after each task. Within-task error: wrong even if the task were known. Task "
        "confusion: right then, but a class of another task scores higher. Head bias: of the images taken for another "
        "task's class, the share on newer tasks than their own minus the share on older ones.",
    ),
    **tables_classes.FIGURES,
    "head_drift": (
        "Head drift",
        "Test accuracy with each class's statistics as gathered in its own task (stale) and with all gathered anew from "
        "the features of today (recomputed, a measurement only): the gap is what the features' drift costs. Repaired, if "
        "shown, are the statistics that predict.",
    ),
    "selection": (
        "Selection history",
        "Accuracy of each expert, after a task, on the data that the winner was selected on; the winner is ringed and "
        "named above. Among equal accuracies the lowest loss wins.",
    ),
    "slow_and_fast": (
        "Slow and fast adapters",
        "After each task and before the merge: fast's part of the summed sizes of all levels' outputs, and the sizes "
        "themselves (root mean square length, on training images of the task); slow once more after a merge. The mean "
        "where a layer has several adapters; of more than two levels, the fastest and the one below it.",
    ),
    "routing_heatmap": (
        "Routing",
        "How much each expert acts on the test images of each task after the last task: the mean of its gates over tokens, "
        "images and the task's classes. Experts are numbered in order of birth.",
    ),
    "routing_over_time": (
        "Routing while training",
        "Above: mean entropy of the routers' softmax in each epoch; at the dotted line, log E, all experts look alike to the "
        "router. Below: each expert's part of the gates of the training images, layer by layer.",
    ),
    "routing_drift": (
        "Routing drift",
        "Above: how far the mean gates on the test images of earlier classes moved with each task (total variation, 0 not "
        "at all, 1 to other experts wholly). Below: the expert with the largest mean gate for each class after each task; "
        "grey where another has at least nine tenths of it.",
    ),
    "routing_controls": (
        "Routing controls",
        "The finished model scored again with other routing: uniform, random (as many experts as the router chooses, so "
        "the same as uniform where all act), each expert alone for everything. The oracle takes for each task the expert "
        "that alone does best on its test images: it reads test labels, an upper bound and not a result.",
    ),
    "adapters": ("Adapters", "Adapters in place after each task, stacked by layer."),
    "detection": (
        "Distribution shift",
        "Each adapter's shift score when a task is scanned. A layer grows where all of them pass the threshold.",
    ),
    "cost": (
        "Time and memory",
        "Wall-clock seconds of each task, and the largest memory of the process up to its end: on a GPU torch's allocations, "
        "on the CPU the process's, which never falls, so that a later seed of one command starts with the earlier one's.",
    ),
    "profile": (
        "Where the time went",
        "Wall-clock seconds of each task by section (run with --profile), each second in one section. Data and prefix count "
        "wherever they are needed; detection, consolidation and evaluation hold what they compute above the prefix.",
    ),
    "loss": (
        "Training",
        "Mean training loss of every epoch: a panel for each phase and for each term that the method adds up to it. What is "
        "the same in all epochs is left out.",
    ),
}

OTHER_HEADS = "What another head would have scored"
ABOUT_HEADS = (
    "Test accuracy over all classes seen by each head of the method on the same features. The first one predicts."
)

TILES = {  # our name, and the field's where it has one
    "last_accuracy": "last accuracy",
    "average_accuracy": "average accuracy (AIA)",
    "final_task_mean": "final task mean (AA)",
    "forgetting": "forgetting (FM)",
    "backward_transfer": "backward transfer (BWT)",
    "task_oracle_accuracy": "accuracy, task known (task-IL)",
}


def sheet_values(sheets: Sequence[sample_images.Sheet], tasks: int) -> dict[str, Any]:
    """Values of the template for the training images: `sheets`, one a task, and `about_sheets`, a sentence on them."""
    text = f"A column a class, at most {sample_images.CLASSES} classes a task, as the network sees them without augmentation."
    if tasks > sample_images.MOST_SHOWN:
        text += f" The first {sample_images.MOST_SHOWN} of {tasks} tasks; the others are in the run folder's samples/."
    named = [{**sheet._asdict(), "names": f"task {sheet.task}: {', '.join(sheet.classes)}"} for sheet in sheets]
    return {"sheets": named, "about_sheets": text}


def page(
    results: Mapping[str, Any],
    settings: Mapping[str, Any],
    environment: Mapping[str, Any],
    pictures: Mapping[str, str],
    rows: plots.Rows,
    sheets: Sequence[sample_images.Sheet] = (),
    defaults: Mapping[str, Any] = MappingProxyType({}),
    shots: Sequence[mistake_images.Shot] = (),
    meanings: Mapping[str, str] = MappingProxyType({}),
    nav: str = "",
) -> str:
    """The text of report.html; `pictures` maps the names in FIGURES to <svg> elements, `rows` are of metrics.jsonl.

    `defaults` of the settings: what departs from them is shown, the rest folded away; without any all are folded. `shots` are
    pictures of mistakes; `meanings` of the settings; `nav`: the element with the links."""
    tasks = len(results["task_classes"])
    speed, memory = results["images_per_second"], results["peak_memory_bytes"]
    spent = sum(sum(entry.values()) for entry in results["seconds"])
    cost = f"{clock(spent)} on {environment.get('device_name', 'an unnamed device')}"
    cost += f", {number(speed, 0)} training images a second, {memory / 2**20:,.0f} MiB peak memory"
    cost += f", test set scored {results['test_evaluations']} times"
    stale = run_settings.changed(settings, environment, defaults)
    described = {k: v for k, v in settings.items() if not (stale and k in run_settings.TEXTS)}
    departing = {k: v for k, v in described.items() if v != defaults.get(k, ...)}
    experiment = Lines([json.dumps(departing, indent=2, ensure_ascii=False)])
    as_file = "Its settings as an experiment file: save it as x.json, then python main.py --config x.json"
    again = Section("Run it again", [Lines(tables.again(environment)), Folded(as_file, [experiment])], wide=True)
    warnings = tables.peeked(results)
    of_code = tables.code_notes(results, environment)
    below = {
        "accuracy_matrix": tables.matrix_rows(results) if "accuracy_matrix" in pictures else [],
        "forgetting": tables.forgetting_rows(results) if "forgetting" in pictures else [],
        "errors": tables.error_rows(results) if "errors" in pictures else [],
        "head_drift": tables.drift_rows(results) if "head_drift" in pictures else [],
        "selection": tables.selection_rows(results),
        "slow_and_fast": tables.merge_rows(rows),
        "routing_drift": tables.routing_drift_rows(rows),
        "routing_controls": tables.control_rows(rows),
        "detection": tables.threshold_rows(rows),
        "classes": tables_classes.class_rows(results),
        "class_confusion": tables_classes.pair_rows(results),
        "mistakes": tables_classes.mistake_rows(results, shots),
        "calibration": tables_classes.calibration_rows(results),
        "cost": [
            *(tables.cost_rows(results) if "cost" in pictures else []),
            *tables_classes.computation_rows(results),
        ],
        "profile": tables.profile_rows(rows),
    }
    order: dict[str, Any] = {"class order": results["class_order"], "classes of each task": results["task_classes"]}
    if not class_names.are_numbers(texts := class_names.of_results(results)):
        order |= {f"task {t + 1}": [texts[c] for c in ids] for t, ids in enumerate(results["task_classes"])}
    return render(
        "report.html",
        title=f"{results['model_name']} on {results['dataset']}, {tasks} task{'s' * (tasks != 1)}, seed {results['seed']}",
        nav=nav,
        about=stale or str(settings.get("about") or ""),
        warnings=[*warnings, *of_code, *tables.warning_notes(rows)],
        tiles=[(label, number(results[key])) for key, label in TILES.items()],
        cost=f"Percent. {tables_classes.interval_text(results)}{cost}.",
        sections=[*figure_sections(FIGURES, pictures, below, {"selection": warnings})],
        rest=[
            *[Section(OTHER_HEADS, [Note(ABOUT_HEADS), *table]) for table in [tables.head_rows(results)] if table],
            Section("Tasks", [*tables.task_rows(results), Folded("Class order", [facts(order)])], wide=True),
            again,
            Section("Settings", run_settings.tables(settings, defaults, meanings), wide=True),
            Section("Environment", [facts(environment)], wide=True),
        ],
        **sheet_values(sheets, tasks),
    )


def draw(results: Mapping[str, Any], rows: plots.Rows) -> dict[str, Figure]:
    """Every picture of a run that there are data for and that is not constant, by its name in FIGURES."""
    pictures = plots.draw(results, rows) | plots_tasks.draw(results) | plots_classes.draw(results)
    return pictures | plots_nested.draw(results, rows) | plots_routing.draw(results, rows)


def write_report(
    folder: Path,
    results: Mapping[str, Any],
    settings: Mapping[str, Any],
    environment: Mapping[str, Any],
    rows: plots.Rows | None = None,
    defaults: Mapping[str, Any] = MappingProxyType({}),
    meanings: Mapping[str, str] = MappingProxyType({}),
    papers: bool = False,
) -> Path:
    """Write plots/*.png and report.html into the seed's run folder; returns the path of report.html.

    `results` as in results.json, `settings` the resolved configuration, `environment` as in environment.json, `rows` of
    metrics.jsonl (default: those in `folder`), `defaults` and `meanings` of the settings. `papers`: also write figures/*.svg
    and *.pdf. Pictures that an earlier report left and this one lacks are removed. The links of other seeds' pages are
    renewed.
    """
    folder = Path(folder)
    if rows is None:
        rows = load_rows(folder / "metrics.jsonl")
    pictures = draw(results, rows)
    (folder / "plots").mkdir(exist_ok=True)
    for name in FIGURES:
        path = folder / "plots" / f"{name}.png"
        if name in pictures:
            write_bytes(path, plots.png(pictures[name]))
        else:
            path.unlink(missing_ok=True)
    svgs = {name: plots.inline_svg(figure, name) for name, figure in pictures.items()}
    if papers:  # last, since a layout moves a little each time it is drawn
        figures.write(folder / "figures", pictures)
    sheets = sample_images.read(folder, len(results["task_classes"]))
    shots = mistake_images.read(folder)
    text = page(results, settings, environment, svgs, rows, sheets, defaults, shots, meanings, links.nav(folder))
    write_bytes(folder / "report.html", text.encode(errors="backslashreplace"))
    links.renew(folder)
    return folder / "report.html"
