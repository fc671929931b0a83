"""One seed's report.html: a single file without links or scripts, for light and dark screens and for phones.

Tables: utils/report/tables.py; the parts of every page: utils/report/html.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import Any

from utils.files.storage import write_bytes
from utils.report import plots, plots_nested, plots_routing, plots_tasks, tables
from utils.report.html import as_text, commands, details, document, facts, table
from utils.report.results import load_rows
from utils.run import sample_images
from utils.text import clock, number

FIGURES = {  # file name: heading, caption
    "accuracy_curve": ("Accuracy", "Test accuracy over all classes seen so far, after each task."),
    "accuracy_matrix": ("Accuracy matrix", "Row: after learning a task. Column: the test classes of a task. Percent."),
    "forgetting": (
        "Forgetting",
        "For each task but the last: its best accuracy after an earlier task minus the one at the end, in points.",
    ),
    "errors": (
        "What the errors are",
        "All test images of the classes seen, after each task. Within-task error: wrong even if the task were known. Task "
        "confusion: right then, but a class of another task scores higher. Head bias: of the images taken for another "
        "task's class, the share on newer tasks than their own minus the share on older ones.",
    ),
    "head_drift": (
        "Head drift",
        "Test accuracy with each class's statistics as gathered in its own task (stale) and with all gathered anew from "
        "the features of today (recomputed, a measurement only): the gap is what the features' drift costs.",
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
        "Wall-clock seconds of each task by part (run with --profile), each second in one part. Data and prefix count "
        "wherever they are needed; detection, consolidation and evaluation hold what they compute above the prefix.",
    ),
    "loss": ("Training", "Mean training loss of every epoch, one panel for each phase."),
}

TILES = {
    "last_accuracy": "last accuracy",
    "average_accuracy": "average accuracy",
    "final_task_mean": "final task mean",
    "forgetting": "forgetting",
    "backward_transfer": "backward transfer",
    "task_oracle_accuracy": "accuracy, task known",
}


def sample_figures(sheets: Sequence[sample_images.Sheet], tasks: int) -> str:
    """Training images, a sheet a task with the names of its columns; empty without sheets."""
    if not sheets:
        return ""
    found = []
    for sheet in sheets:
        names = escape(f"task {sheet.task}: {', '.join(sheet.classes)}")
        image = (
            f'<img alt="training images of {names}" src="{sheet.source}" width="{sheet.width}" height="{sheet.height}">'
        )
        found.append(f"<figure>{image}<figcaption>{names}</figcaption></figure>")
    text = f"A column a class, at most {sample_images.CLASSES} classes a task, as the network sees them without augmentation."
    if tasks > sample_images.MOST_SHOWN:
        text += f" The first {sample_images.MOST_SHOWN} of {tasks} tasks; the others are in the run folder's samples/."
    return f'<h2>Training images</h2><div class="samples">{"".join(found)}</div><p class="soft">{escape(text)}</p>'


def settings_tables(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """What departs from the defaults with the default beside it, and, folded, every setting."""
    shown = {key: value for key, value in settings.items() if key != "about"}
    other = {key: value for key, value in shown.items() if key not in defaults or value != defaults[key]}
    text = ""
    if defaults:
        cells = [
            (key, as_text(value), as_text(defaults[key]) if key in defaults else "-") for key, value in other.items()
        ]
        text = table(["key", "value", "default"], cells, "names")
    return text + details(f"All {len(shown)} settings", facts(shown))


def page(
    results: Mapping[str, Any],
    settings: Mapping[str, Any],
    environment: Mapping[str, Any],
    pictures: Mapping[str, str],
    rows: plots.Rows,
    sheets: Sequence[sample_images.Sheet] = (),
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """The text of report.html; `pictures` maps the names in FIGURES to <svg> elements, `rows` are of metrics.jsonl.

    `defaults` of the settings: what departs from them is shown, the rest folded away; without any all are folded."""
    tasks = len(results["task_classes"])
    title = f"{results['model_name']} on {results['dataset']}, {tasks} task{'s' * (tasks != 1)}, seed {results['seed']}"
    tiles = "".join(f"<div><span>{label}</span><b>{number(results[key])}</b></div>" for key, label in TILES.items())
    speed, memory = results["images_per_second"], results["peak_memory_bytes"]
    spent = sum(sum(entry.values()) for entry in results["seconds"])
    cost = f"{clock(spent)} on {environment.get('device_name', 'an unnamed device')}"
    cost += f", {number(speed, 0)} training images a second, {memory / 2**20:,.0f} MiB peak memory"
    cost += f", test set scored {results['test_evaluations']} times"
    warning = tables.peeked(results)
    own = {k: v for k, v in settings.items() if v != defaults.get(k, ...)}
    experiment = commands([json.dumps(own, indent=2, ensure_ascii=False)])
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(str(settings.get("about") or ""))}</p>',
        warning,
        f'<div class="tiles">{tiles}</div>',
        f'<p class="soft">Percent. {escape(cost)}.</p>',
        "<h2>Run it again</h2>" + commands(tables.again(environment)),
        details(
            "Its settings as an experiment file: save it as x.json, then python main.py --config x.json", experiment
        ),
    ]
    before = {"selection": warning}
    after = {
        "accuracy_matrix": tables.matrix_rows(results),
        "forgetting": tables.forgetting_rows(results),
        "errors": tables.error_rows(results),
        "head_drift": tables.drift_rows(results),
        "selection": tables.selection_rows(results),
        "slow_and_fast": tables.merge_rows(rows),
        "routing_drift": tables.routing_drift_rows(rows),
        "routing_controls": tables.control_rows(rows),
        "detection": tables.threshold_rows(rows),
        "cost": tables.cost_rows(results) if "cost" in pictures else "",
        "profile": tables.profile_rows(rows),
    }
    for name, (heading, caption) in FIGURES.items():
        if name in pictures or after.get(name):
            parts += [f"<h2>{heading}</h2>", before.get(name, "")]
        if name in pictures:
            parts += [f"<figure>{pictures[name]}</figure>", f'<p class="soft">{escape(caption, quote=False)}</p>']
        parts.append(after.get(name, ""))
    parts += [sample_figures(sheets, tasks), "<h2>Tasks</h2>", tables.task_rows(results)]
    order = {"class order": results["class_order"], "classes of each task": results["task_classes"]}
    parts.append(details("Class order", facts(order)))
    parts += ["<h2>Settings</h2>", settings_tables(settings, defaults), "<h2>Environment</h2>", facts(environment)]
    return document(title, parts)


def write_report(
    folder: Path,
    results: Mapping[str, Any],
    settings: Mapping[str, Any],
    environment: Mapping[str, Any],
    rows: plots.Rows | None = None,
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Write plots/*.png and report.html into the seed's run folder; returns the path of report.html.

    `results` as in results.json, `settings` the resolved configuration, `environment` as in environment.json, `rows` of
    metrics.jsonl (default: those in `folder`), `defaults` of the settings. Pictures that an earlier report left and this
    one lacks are removed.
    """
    folder = Path(folder)
    if rows is None:
        rows = load_rows(folder / "metrics.jsonl")
    pictures = plots.draw(results, rows) | plots_tasks.draw(results)
    pictures |= plots_nested.draw(results, rows) | plots_routing.draw(results, rows)
    (folder / "plots").mkdir(exist_ok=True)
    for name in FIGURES:
        path = folder / "plots" / f"{name}.png"
        if name in pictures:
            write_bytes(path, plots.png(pictures[name]))
        else:
            path.unlink(missing_ok=True)
    svgs = {name: plots.inline_svg(figure, name) for name, figure in pictures.items()}
    sheets = sample_images.read(folder, len(results["task_classes"]))
    text = page(results, settings, environment, svgs, rows, sheets, defaults)
    write_bytes(folder / "report.html", text.encode())
    return folder / "report.html"
