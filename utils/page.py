"""One seed's report.html: a single file without links or scripts, for light and dark screens and for phones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from utils import plots, plots_nested, plots_routing, profile, routing
from utils.report import number
from utils.runlog import clock
from utils.storage import write_bytes

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6570; --paper: #ffffff; --tile: #f2f4f7; --line: #d5dae0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #9aa5b1; --paper: #14171b; --tile: #1f242a; --line: #39414a; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.warn { background: var(--tile); border-left: .35rem solid #D55E00; padding: .5rem .8rem; font-weight: 600; }
.soft { color: var(--soft); margin: .25rem 0 1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .5rem; }
.tiles div { background: var(--tile); border-radius: .5rem; padding: .6rem .8rem; }
.tiles b { display: block; font-size: 1.4rem; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: .85rem; }
pre { background: var(--tile); border-radius: .5rem; padding: .8rem; white-space: pre-wrap; margin: 0; }
figure, .wide { margin: .5rem 0; overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 34rem; height: auto; }
figcaption { color: var(--soft); font-size: .9rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { text-align: right; padding: .2rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top;
  white-space: nowrap; }
th { font-weight: 600; }
.names td { text-align: left; overflow-wrap: anywhere; white-space: normal; }
.names td:first-child { white-space: nowrap; }
summary { cursor: pointer; margin: .5rem 0; }
""".strip()

FIGURES = {  # file name: heading, caption
    "accuracy_curve": ("Accuracy", "Test accuracy over all classes seen so far, after each task."),
    "accuracy_matrix": ("Accuracy matrix", "Row: after learning a task. Column: the test classes of a task. Percent."),
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


def load_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a torn last line (of a killed run) is left out, another bad line raises ValueError."""
    try:
        return [json.loads(line) for line in Path(path).read_bytes().split(b"\n")[:-1]]
    except ValueError as error:
        raise ValueError(f"{path}: not a file of JSON lines ({error})") from error


class Bold(str):
    """A table cell in bold print."""


def _cell(value: Any) -> str:
    text = escape(str(value))
    return f"<td><b>{text}</b></td>" if isinstance(value, Bold) else f"<td>{text}</td>"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = "") -> str:
    top = "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>" if head else ""
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}">{top}{body}</table></div>'


def _facts(data: Mapping[str, Any]) -> str:
    """Two columns, name and value; a nested mapping becomes dotted names, other structures JSON."""
    flat: dict[str, str] = {}
    for key, value in data.items():
        for name, item in value.items() if isinstance(value, Mapping) else [("", value)]:
            text = item if isinstance(item, str) else json.dumps(item, ensure_ascii=False, default=str)
            flat[f"{key}.{name}" if name else key] = text
    return _table((), flat.items(), "names")


def _task_rows(results: Mapping[str, Any]) -> str:
    head = ["task", "classes", "seen", "top-1", "top-5", "adapters", "trainable", "parameters"]
    head += ["train", "detect", "evaluate"]
    rows, seen = [], 0
    for t, top1 in enumerate(results["top1_curve"]):
        new = len(results["task_classes"][t])
        seen += new
        row = [t + 1, new, seen, number(top1), number(results["top5_curve"][t])]
        row += [sum(results["adapters_per_layer"][t].values()), f"{results['trainable_parameters'][t]:,}"]
        row += [f"{results['total_parameters'][t]:,}"]
        rows.append(row + [f"{results['seconds'][t][phase]:.1f} s" for phase in ("train", "detect", "evaluate")])
    return _table(head, rows)


def _details(summary: str, inner: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>"


def _matrix_rows(results: Mapping[str, Any]) -> str:
    matrix = results["accuracy_matrix"]
    head = ["after", *(f"task {k + 1}" for k in range(len(matrix)))]
    rows = [[t + 1, *map(number, row), *[""] * (len(matrix) - len(row))] for t, row in enumerate(matrix)]
    return _details("The matrix as numbers", _table(head, rows))


def _drift_rows(results: Mapping[str, Any]) -> str:
    """The picture's numbers, and the mean cosine of old classes' means; empty for a head that cannot drift."""
    if not (drift := results.get("head_drift")):
        return ""
    head = ["task", "stale", "recomputed", "gap", "cosine of old class means"]
    rows = []
    for e in drift:
        accuracies = (e["stale"], e["recomputed"], e["recomputed"] - e["stale"])
        rows.append([e["task"] + 1, *map(number, accuracies), number(e["cosine"], 4)])
    return _details("The drift as numbers", _table(head, rows))


def _test_warning(results: Mapping[str, Any]) -> str:
    """A sentence, if anything was selected on test data."""
    history = results.get("selection_history") or ()
    if not any(isinstance(entry, Mapping) and entry.get("split") == "test" for entry in history):
        return ""
    return '<p class="warn">The winner was selected on test data, so the accuracies are optimistic.</p>'


def _selection_rows(results: Mapping[str, Any]) -> str:
    """A line a competition of experts or a decision on a task's novelty; selections of other kinds as JSON."""
    history = results.get("selection_history") or []
    known = [entry for entry in history if plots_nested.is_competition(entry)]
    novel = [entry for entry in history if isinstance(entry, Mapping) and entry.get("kind") == "novelty"]
    other = [json.dumps(e, ensure_ascii=False) for e in history if e not in known and e not in novel]
    text = ""
    if novel:
        head = ["task", "images", "similarity", "from", "to", "threshold", "decided by", "expert", "new"]
        numbers = ("best", "low", "high", "threshold")
        rows = []
        for e in novel:
            cells = [number(e[key], 3) for key in numbers]
            rows.append([e["task"] + 1, e["images"], *cells, e["reason"], e["skill"], "yes" if e["spawn"] else "no"])
        text += _table(head, rows)
    if known:
        count = max(len(entry["accuracies"]) for entry in known)
        rows = []
        for e in known:
            cells = [Bold(number(a)) if k == e["winner"] else number(a) for k, a in enumerate(e["accuracies"])]
            cells += [""] * (count - len(cells))
            rows.append([e["task"] + 1, e["winner"], number(e["margin"]), e["split"], e["samples"], *cells])
        head = ["task", "winner", "margin", "selected on", "samples", *(f"expert {k}" for k in range(count))]
        text += _table(head, rows)
    return text + (f"<pre>{escape(chr(10).join(other))}</pre>" if other else "")


def _merge_rows(rows: plots.Rows) -> str:
    """A line a task and layer, and where there are several a line for each adapter and each pair of levels."""
    merges = [row for row in rows if row["kind"] == "consolidation"]
    if not merges:
        return ""
    keys = ["task", "layer", "adapter", "level", "expert"]
    always = ("task", "layer")
    keys = [key for key in keys if key in always or len({row.get(key) for row in merges}) > 1]
    values = ("slow_norm", "fast_norm", "slow_norm_after", "fast_norm_after", "cosine", "fast_share")
    head = [*keys, "slow norm", "fast norm", "slow after", "fast after", "cosine", "fast's share", "error", "rank"]
    body = []
    for row in merges:
        where = [row["task"] + 1 if key == "task" else row.get(key, "-") for key in keys]
        numbers = [number(row.get(key), 3) for key in values]
        error = row.get("error")
        body.append([*where, *numbers, "-" if error is None else f"{error:.1e}", row.get("rank", "-")])
    ways = sorted({f"{row['method']}, alpha {row['alpha']:g}" for row in merges if row.get("method")})
    how = f"merged by {'; '.join(ways)}" if ways else "never merged"
    return _details(f"Slow and fast in numbers ({how})", _table(head, body))


def _routing_drift_rows(rows: plots.Rows) -> str:
    moves = [row for row in rows if row["kind"] == "routing_drift"]
    if not moves:
        return ""
    head = ["task", "new", "merged", *(f"layer {n}: moved, changed" for n in moves[-1]["layers"])]
    body = []
    for row in moves:
        merged = ", ".join(f"{gone} into {into}" for gone, into in row["merged"])
        cells = [
            f"{number(mean, 3)}, {n} of {len(row['before'])}"
            for mean, n in zip(row["mean"], row["changed"], strict=True)
        ]
        body.append([row["task"] + 1, ", ".join(map(str, row["added"])) or "-", merged or "-", *cells])
    return _details(
        "The drift as numbers: mean distance, and classes that another expert serves now", _table(head, body)
    )


def _control_rows(rows: plots.Rows) -> str:
    text = ""
    for row in [row for row in rows if row["kind"] == "routing_controls"][-1:]:
        head = ["routing", "all", *(f"task {t + 1}" for t in range(len(row["samples"])))]
        body = []
        for name, values in routing.controls(row):
            accuracies = [routing.overall(values, row["samples"]), *values]
            body.append([name, *(number(100 * accuracy) for accuracy in accuracies)])
        body.append(["expert the oracle takes", "", *row["oracle"]])
        text = _details("The controls as numbers", _table(head, body))
    return text


def _profile_rows(rows: plots.Rows) -> str:
    """A line a part for the tasks together, with what it covers, and the seconds of each task."""
    if not (own := [row for row in rows if row["kind"] == "profile"]):
        return ""
    lines = []
    for name, seconds, share, speed in profile.shares(own):
        lines.append([name, number(seconds), number(share, 1), number(speed, 0), profile.PARTS.get(name, "")])
    text = _table(["part", "seconds", "percent", "images/s", "what"], lines)
    used = [name for name, *_ in profile.shares(own)][:-1]
    tasks = [[row["task"] + 1, *(number(row["seconds"][n]) for n in used), number(row["total"])] for row in own]
    partly = f'<p class="soft">{escape(profile.partly(own).strip())}</p>' if profile.partly(own) else ""
    return _details("The time as numbers", partly + text + _table(["task", *used, "all"], tasks))


def page(
    results: Mapping[str, Any],
    settings: Mapping[str, Any],
    environment: Mapping[str, Any],
    pictures: Mapping[str, str],
    rows: plots.Rows,
) -> str:
    """The text of report.html; `pictures` maps the names in FIGURES to <svg> elements, `rows` are of metrics.jsonl."""
    tasks = len(results["task_classes"])
    title = f"{results['model_name']} on {results['dataset']}, {tasks} task{'s' * (tasks != 1)}, seed {results['seed']}"
    tiles = "".join(f"<div><span>{label}</span><b>{number(results[key])}</b></div>" for key, label in TILES.items())
    speed, memory = results["images_per_second"], results["peak_memory_bytes"]
    spent = sum(sum(entry.values()) for entry in results["seconds"])
    cost = f"{clock(spent)} on {environment.get('device_name', 'an unnamed device')}"
    cost += f", {number(speed, 0)} training images a second, {memory / 2**20:,.0f} MiB peak memory"
    cost += f", test set scored {results['test_evaluations']} times"
    warning = _test_warning(results)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(str(settings.get("about") or ""))}</p>',
        warning,
        f'<div class="tiles">{tiles}</div>',
        f'<p class="soft">Percent. {escape(cost)}.</p>',
        f"<h2>Run it again</h2><pre>{escape(str(environment.get('command', '')))}</pre>",
    ]
    before = {"selection": warning}
    after = {
        "accuracy_matrix": _matrix_rows(results),
        "head_drift": _drift_rows(results),
        "selection": _selection_rows(results),
        "slow_and_fast": _merge_rows(rows),
        "routing_drift": _routing_drift_rows(rows),
        "routing_controls": _control_rows(rows),
        "profile": _profile_rows(rows),
    }
    for name, (heading, caption) in FIGURES.items():
        if name in pictures or after.get(name):
            parts += [f"<h2>{heading}</h2>", before.get(name, "")]
        if name in pictures:
            parts += [f"<figure>{pictures[name]}</figure>", f'<p class="soft">{escape(caption, quote=False)}</p>']
        parts.append(after.get(name, ""))
    parts += ["<h2>Tasks</h2>", _task_rows(results)]
    order = {"class order": results["class_order"], "classes of each task": results["task_classes"]}
    parts.append(_details("Class order", _facts(order)))
    parts += ["<h2>Settings</h2>", _facts({k: v for k, v in settings.items() if k != "about"})]
    parts += ["<h2>Environment</h2>", _facts(environment)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body>\n</html>\n"
    )


def write_report(
    folder: Path,
    results: Mapping[str, Any],
    settings: Mapping[str, Any],
    environment: Mapping[str, Any],
    rows: plots.Rows | None = None,
) -> Path:
    """Write plots/*.png and report.html into the seed's run folder; returns the path of report.html.

    `results` as in results.json, `settings` the resolved configuration, `environment` as in environment.json, `rows` of
    metrics.jsonl (default: those in `folder`). Pictures that an earlier report left and this one lacks are removed.
    """
    folder = Path(folder)
    if rows is None:
        rows = load_rows(folder / "metrics.jsonl")
    pictures = plots.draw(results, rows) | plots_nested.draw(results, rows) | plots_routing.draw(results, rows)
    (folder / "plots").mkdir(exist_ok=True)
    for name in FIGURES:
        path = folder / "plots" / f"{name}.png"
        if name in pictures:
            write_bytes(path, plots.png(pictures[name]))
        else:
            path.unlink(missing_ok=True)
    svgs = {name: plots.inline_svg(figure, name) for name, figure in pictures.items()}
    write_bytes(folder / "report.html", page(results, settings, environment, svgs, rows).encode())
    return folder / "report.html"
