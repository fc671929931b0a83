"""Tables of report.html as lists of blocks, from results.json and the rows of metrics.jsonl; empty without data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from utils.evaluation import error_parts, metrics, routing
from utils.process import stopwatch
from utils.report import class_names
from utils.report import profile as report_profile
from utils.report.html import Block, Bold, Folded, Lines, Note, Table, folded
from utils.report.plots import Rows
from utils.report.plots_nested import is_competition
from utils.run.record import PHASES
from utils.text import number, shell


def again(environment: Mapping[str, Any]) -> list[str]:
    """The commands that bring back the code, the packages and the run of an environment.json: to be given in a checkout
    without changes. What was in no commit comes from the folder `source` of the run."""
    git, source = environment.get("git"), environment.get("source")
    lines = []
    if isinstance(git, Mapping) and git.get("commit"):
        changed = git.get("dirty") and not isinstance(source, Mapping)
        lines.append(f"git checkout {git['commit']}{'   # with changes that are in no commit' * bool(changed)}")
        paths = {key: shell([str(path)]) for key, path in source.items()} if isinstance(source, Mapping) else {}
        if "patch" in paths:
            lines.append(f"git apply {paths['patch']}   # changes that were in no commit")
        if "files" in paths:
            lines.append(f"cp -R {paths['files']}/. .   # files that git did not track")
    return [*lines, "pip install -r requirements.txt", str(environment.get("command", ""))]


def task_rows(results: Mapping[str, Any]) -> list[Block]:
    texts = class_names.of_results(results)
    head = ["task", "classes", "seen", "top-1", "top-5", "adapters", "trainable", "parameters", "names"]
    head = head[:-1] if class_names.are_numbers(texts) else head
    rows, seen = [], 0
    for t, top1 in enumerate(results["top1_curve"]):
        new = len(results["task_classes"][t])
        seen += new
        row = [t + 1, new, seen, number(top1), number(results["top5_curve"][t])]
        row += [sum(results["adapters_per_layer"][t].values()), f"{results['trainable_parameters'][t]:,}"]
        row.append(f"{results['total_parameters'][t]:,}")
        names = class_names.listed(results["task_classes"][t], texts)
        rows.append(row if class_names.are_numbers(texts) else [*row, names])
    return [Table(head, rows)]


def matrix_rows(results: Mapping[str, Any]) -> list[Block]:
    matrix = results["accuracy_matrix"]
    head = ["after", *(f"task {k + 1}" for k in range(len(matrix)))]
    rows = [[t + 1, *map(number, row), *[""] * (len(matrix) - len(row))] for t, row in enumerate(matrix)]
    return folded("The matrix as numbers", Table(head, rows))


def drift_rows(results: Mapping[str, Any]) -> list[Block]:
    """The picture's numbers, and the mean cosine of old classes' means; empty for a head that cannot drift."""
    if not (drift := results.get("head_drift")):
        return []
    repaired = ["repaired"] if any("repaired" in entry for entry in drift) else []
    head = ["task", "stale", *repaired, "recomputed", "gap", "cosine of old class means"]
    rows = []
    for e in drift:
        predicts = e.get("repaired", e["stale"])
        accuracies = (e["stale"], *(e.get(key) for key in repaired), e["recomputed"], e["recomputed"] - predicts)
        rows.append([e["task"] + 1, *map(number, accuracies), number(e["cosine"], 4)])
    return folded("The drift as numbers", Table(head, rows))


def head_rows(results: Mapping[str, Any]) -> list[Block]:
    """What each head would have scored on the same features, a line a task; empty without `compare_heads`."""
    if not (heads := results.get("heads")):
        return []
    rows = [[t + 1, *map(number, accuracies)] for t, accuracies in enumerate(zip(*heads.values(), strict=True))]
    return [Table(["task", *heads], rows)]


def code_notes(results: Mapping[str, Any], environment: Mapping[str, Any]) -> list[Block]:
    """Warnings: what changed while the run was stopped, and which files of the program were in no commit."""
    notes = [f"While the run was stopped, {text}." for text in (results.get("provenance") or {}).get("changes") or ()]
    git = environment.get("git")
    if isinstance(git, Mapping) and (untracked := git.get("untracked")):
        shown = ", ".join(map(str, untracked[:5])) + f" and {len(untracked) - 5} more" * (len(untracked) > 5)
        notes.append(
            f"Files that git does not track were part of the program: {shown}. The run folder has them in source/."
        )
    elif isinstance(git, Mapping) and git.get("dirty"):
        notes.append("Files of the program had changes that are in no commit. The run folder has them in source/.")
    return [Note(text, "warn") for text in notes]


def warning_notes(rows: Rows) -> list[Block]:
    """What the run warned of: keys that could not do their work, and signs in its measurements."""
    return [Note(f"{row['text']}.", "warn") for row in rows if row["kind"] == "warning"]


def peeked(results: Mapping[str, Any]) -> list[Block]:
    """A warning, if anything was selected on test data."""
    history = results.get("selection_history") or ()
    if not any(isinstance(entry, Mapping) and entry.get("split") == "test" for entry in history):
        return []
    return [Note("The winner was selected on test data, so the accuracies are optimistic.", "warn")]


def selection_rows(results: Mapping[str, Any]) -> list[Block]:
    """A line a competition of experts or a decision on a task's novelty; selections of other kinds as JSON."""
    history = results.get("selection_history") or []
    known = [entry for entry in history if is_competition(entry)]
    novel = [entry for entry in history if isinstance(entry, Mapping) and entry.get("kind") == "novelty"]
    other = [json.dumps(e, ensure_ascii=False) for e in history if e not in known and e not in novel]
    blocks: list[Block] = []
    if novel:
        head = ["task", "images", "similarity", "from", "to", "threshold", "decided by", "expert", "new"]
        numbers = ("best", "low", "high", "threshold")
        rows = []
        for e in novel:
            cells = [number(e[key], 3) for key in numbers]
            rows.append([e["task"] + 1, e["images"], *cells, e["reason"], e["skill"], "yes" if e["spawn"] else "no"])
        blocks.append(Table(head, rows))
    if known:
        count = max(len(entry["accuracies"]) for entry in known)
        rows = []
        for e in known:
            cells = [Bold(number(a)) if k == e["winner"] else number(a) for k, a in enumerate(e["accuracies"])]
            cells += [""] * (count - len(cells))
            rows.append([e["task"] + 1, e["winner"], number(e["margin"]), e["split"], e["samples"], *cells])
        head = ["task", "winner", "margin", "selected on", "samples", *(f"expert {k}" for k in range(count))]
        blocks.append(Table(head, rows))
    return [*blocks, *([Lines(other)] if other else [])]


def merge_rows(rows: Rows) -> list[Block]:
    """A line a task and layer, and where there are several a line for each adapter and each pair of levels."""
    merges = [row for row in rows if row["kind"] == "consolidation"]
    if not merges:
        return []
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
    return folded(f"Slow and fast in numbers ({how})", Table(head, body))


def routing_drift_rows(rows: Rows) -> list[Block]:
    moves = [row for row in rows if row["kind"] == "routing_drift"]
    if not moves:
        return []
    head = ["task", "new", "merged", *(f"layer {n}: moved, changed" for n in moves[-1]["layers"])]
    body = []
    for row in moves:
        merged = ", ".join(f"{gone} into {into}" for gone, into in row["merged"])
        cells = [
            f"{number(mean, 3)}, {n} of {len(row['before'])}"
            for mean, n in zip(row["mean"], row["changed"], strict=True)
        ]
        body.append([row["task"] + 1, ", ".join(map(str, row["added"])) or "-", merged or "-", *cells])
    return folded("The drift as numbers: mean distance, and classes that another expert serves now", Table(head, body))


def control_rows(rows: Rows) -> list[Block]:
    blocks: list[Block] = []
    for row in [row for row in rows if row["kind"] == "routing_controls"][-1:]:
        head = ["routing", "all", *(f"task {t + 1}" for t in range(len(row["samples"])))]
        body = []
        for name, values in routing.controls(row):
            accuracies = [routing.overall(values, row["samples"]), *values]
            body.append([name, *(number(100 * accuracy) for accuracy in accuracies)])
        body.append(["expert the oracle takes", "", *row["oracle"]])
        blocks = folded("The controls as numbers", Table(head, body))
    return blocks


def profile_rows(rows: Rows) -> list[Block]:
    """A line a section for the tasks together, with what it covers, and the seconds of each task."""
    if not (profiles := [row for row in rows if row["kind"] == "profile"]):
        return []
    shares = report_profile.shares(profiles)
    lines = [
        [name, number(seconds), number(share, 1), number(speed, 0), stopwatch.SECTIONS.get(name, "")]
        for name, seconds, share, speed in shares
    ]
    used = [name for name, *_ in shares][:-1]
    tasks = [[row["task"] + 1, *(number(row["seconds"][n]) for n in used), number(row["total"])] for row in profiles]
    partly = report_profile.partly(profiles).strip()
    notes = [Note(partly)] if partly else []
    whole = Table(["part", "seconds", "percent", "images/s", "what"], lines)
    return folded("The time as numbers", *notes, whole, Table(["task", *used, "all"], tasks))


# ------------------------------------------------------------------------------------------------ tasks: errors, growth

THRESHOLDS = (0.5, 1.0, 2.0, 3.0)  # of SEMA's shift scores, for "would have expanded at"


def forgetting_rows(results: Mapping[str, Any]) -> list[Block]:
    drops = metrics.forgetting_by_task(results["accuracy_matrix"])
    body = [[k + 1, number(drop)] for k, drop in enumerate(drops)]
    return folded("Forgetting as numbers", Table(["task", "forgetting (FM)"], body)) if body else []


def error_rows(results: Mapping[str, Any]) -> list[Block]:
    """The parts of the error after each task, and for the finished model which task's images go to which task."""
    splits = error_parts.splits(results)
    if not any(split.within is not None for split in splits):
        return []
    head = ["after task", "accuracy", "task known (task-IL)", "task confusion", "within-task error", "head bias"]
    blocks: list[Block] = [Table(head, [[t + 1, *map(number, split)] for t, split in enumerate(splits)])]
    if matrix := results.get("task_confusion"):
        head = ["images of", *(f"as task {k + 1}" for k in range(len(matrix)))]
        body = [
            [f"task {k + 1}", *(Bold(n) if j == k else n for j, n in enumerate(row))] for k, row in enumerate(matrix)
        ]
        title = "Test images of each task by the task of the class they were taken for, at the end:"
        blocks += [Note(title), Table(head, body)]
    return folded("The errors as numbers", *blocks)


def would_expand(rows: Rows) -> dict[int, dict[int, float]]:
    """The largest score s of each layer in each scanned task, {task: {layer: s}}: thresholds below s had been passed.

    Of several adapters in a layer all must pass, so a scan counts with its smallest score. A score that was not finite
    (null) counts as infinite where the layer expanded, else it is left out."""
    highest: dict[int, dict[int, float]] = {}
    for row in rows:
        if row["kind"] == "detect" and row.get("scores"):
            known = [score for score in row["scores"] if score is not None]
            lowest = min(known) if known else float("inf") if row["expanded"] else float("-inf")
            layers = highest.setdefault(row["task"], {})
            layers[row["layer"]] = max(lowest, layers.get(row["layer"], float("-inf")))
    return highest


def threshold_rows(rows: Rows) -> list[Block]:
    """A sentence and a table: which layers would have asked for an adapter at other thresholds."""
    if not (highest := would_expand(rows)):
        return []
    grown = {(row["task"], row["layer"]) for row in rows if row["kind"] == "detect" and row["expanded"]}
    limits = sorted({row["threshold"] for row in rows if row["kind"] == "detect"})
    pairs = [score for layers in highest.values() for score in layers.values()]
    counts = ", ".join(f"at {limit:g}: {sum(score > limit for score in pairs)}" for limit in THRESHOLDS)
    text = (
        f"{len(grown)} of {len(pairs)} scanned layers expanded at {' and '.join(f'{x:g}' for x in limits)}. "
        f"By the same scores they would have expanded {counts}. This takes the scores as they came: another threshold would "
        "have trained other adapters, which changes later scores; and where a layer expanded, its scan ended with that "
        "score, so that counts above the run's own threshold are at least this."
    )

    def listed(layers: list[int]) -> str:
        return ", ".join(map(str, layers)) or "-"

    body = []
    for task, layers in sorted(highest.items()):
        asked = [listed([n for n, score in sorted(layers.items()) if score > limit]) for limit in THRESHOLDS]
        body.append([task + 1, listed(sorted(n for t, n in grown if t == task)), *asked])
    head = ["task", "layers that expanded", *(f"would at {limit:g}" for limit in THRESHOLDS)]
    return [Note(text), Folded("Would have expanded, layer by layer", [Table(head, body)])]


def cost_rows(results: Mapping[str, Any]) -> list[Block]:
    peaks = results.get("peak_memory_by_task") or [None] * len(results["seconds"])
    body = []
    for t, (entry, peak) in enumerate(zip(results["seconds"], peaks, strict=True)):
        cells = [f"{entry[phase]:.1f}" for phase in PHASES]
        body.append([t + 1, *cells, f"{peak / 2**20:,.0f}" if peak else "-"])
    return folded("Time and memory as numbers", Table(["task", *(f"{p} (s)" for p in PHASES), "peak (MiB)"], body))
