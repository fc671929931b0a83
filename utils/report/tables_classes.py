"""Tables of report.html by class and image, of the calibration and of what a run computed; empty without data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from utils.evaluation.intervals import wilson
from utils.report import class_names
from utils.report.html import Block, Note, Pictures, Table, folded
from utils.run.mistake_images import Shot
from utils.text import counted, number, one_line

MOST_SHOWN = 20  # confused pairs

FIGURES = {  # file name: heading, caption
    "classes": (
        "Accuracy by class",
        "Of the finished model, in order of arrival, a line between tasks. The thin line is the 95 % interval from the "
        "class's test images (Wilson); the dot is the accuracy right after the class's task.",
    ),
    "class_confusion": (
        "What is taken for what",
        "Test images of the finished model by true class (row) and predicted class (column), in order of arrival. The "
        "colour is the share of the row.",
    ),
    "mistakes": ("Wrongly classified images", ""),
    "calibration": (
        "Calibration",
        "Test images of the finished model in 15 bins of confidence, the largest softmax probability. Bars below the "
        "diagonal: the model is surer than it is right.",
    ),
}


def interval_text(results: Mapping[str, Any]) -> str:
    """A sentence on the last accuracy's interval, empty without one."""
    ends = results.get("last_accuracy_interval")
    if not ends:
        return ""
    images = sum(n or 0 for n in results.get("class_images") or [])
    of_images = f" from {counted(images, 'test image')}" if images else ""
    return f"95 % interval of the last accuracy{of_images}: {number(ends[0])} to {number(ends[1])}. "


def class_rows(results: Mapping[str, Any]) -> list[Block]:
    """A line a class, in order of arrival."""
    if not (images := results.get("class_images")):
        return []
    names, body = class_names.of_results(results), []
    for t, ids in enumerate(results["task_classes"]):
        for c in ids:
            accuracy, new = results["class_accuracy"][c], results["class_accuracy_when_new"][c]
            ends = wilson(round((accuracy or 0) / 100 * images[c]), images[c]) if images[c] else None
            span = "-" if ends is None or accuracy is None else f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}"
            change = None if accuracy is None or new is None else accuracy - new
            body.append([names[c], t + 1, images[c] or 0, number(accuracy), span, number(new), number(change)])
    head = ["class", "task", "test images", "accuracy", "95 % interval", "when new", "change"]
    return folded("The classes as numbers", Table(head, body, "rows"))


def pair_rows(results: Mapping[str, Any]) -> list[Block]:
    """The most frequent confusions of two classes."""
    pairs = results.get("class_confusion")
    if not pairs:
        return []
    names, images = class_names.of_results(results), results["class_images"]
    task = {c: t + 1 for t, ids in enumerate(results["task_classes"]) for c in ids}
    body = []
    for true, predicted, count in pairs[:MOST_SHOWN]:
        taken = "no class (scores that are no numbers)" if predicted is None else names[predicted]
        tasks = f"{task[true]}, {task.get(predicted, '-')}"
        body.append([names[true], taken, count, number(100 * count / images[true], 1), tasks])
    wrong = sum(n for *_, n in pairs) + (results["class_confusion_beyond"] or 0)
    text = f"{counted(wrong, 'test image')} of {sum(n or 0 for n in images):,} are wrong, in {counted(len(pairs), 'pair')} "
    text += f"of a true and a predicted class{' and more' if results['class_confusion_beyond'] else ''}. "
    text += f"The most frequent{f' {MOST_SHOWN}' if len(pairs) > MOST_SHOWN else ''}:"
    return [Note(text), Table(["class", "taken for", "images", "% of the class", "their tasks"], body, "rows")]


def mistake_rows(results: Mapping[str, Any], shots: Sequence[Shot]) -> list[Block]:
    """The pictures of the worst mistakes, and a line for each that results.json has."""
    mistakes = results.get("mistakes")
    if not mistakes:
        return []
    names = class_names.of_results(results)

    def taken(entry: Mapping[str, Any]) -> str:
        return "no class" if entry["predicted"] is None else names[entry["predicted"]]

    by_row = {entry["row"]: entry for entry in mistakes}
    pictures = [
        (s.source, s.side, f"{names[e['true']]}, taken for {taken(e)}")
        for s in shots
        if (e := by_row.get(s.row)) is not None
    ]
    body = [
        [one_line(str(e["image"] or f"row {e['row']}")), names[e["true"]], taken(e), number(e["margin"], 3)]
        for e in mistakes
    ]
    about = "Test images whose predicted class outscores the true one by most, the largest margin first."
    if pictures:
        about += " As the network sees them."
    head = ["image, or its row in the test set", "class", "taken for", "margin of the scores"]
    shown: list[Block] = [Pictures(pictures)] if pictures else []
    return [Note(about), *shown, *folded(f"The {len(body)} worst as a table", Table(head, body, "names"))]


def calibration_rows(results: Mapping[str, Any]) -> list[Block]:
    """The calibration error after each task, or why there is none."""
    counts = results.get("calibration")
    if not counts:
        return []
    if counts["ece"] is None:
        return [Note(counts["confidence_is"][:1].upper() + counts["confidence_is"][1:] + ".")]
    text = f"Expected calibration error (ECE): {number(counts['ece'])} points. Confidence is {counts['confidence_is']}."
    curve = Table(["after task", "ECE"], [[t + 1, number(ece)] for t, ece in enumerate(results["ece_curve"])])
    bins, body = len(counts["images"]), []
    for b, (n, p, a) in enumerate(zip(*(counts[k] for k in ("images", "confidence", "accuracy")), strict=True)):
        if n:
            body.append([f"{100 * b / bins:.1f} to {100 * (b + 1) / bins:.1f}", n, number(p), number(a)])
    table = Table(["confidence (%)", "images", "mean confidence", "accuracy"], body, "rows")
    return [Note(text), *folded("The calibration as numbers", table, curve)]


def computation_rows(results: Mapping[str, Any]) -> list[Block]:
    """Operations, parameters and processor time by task, and the hours of the run."""
    if not (operations := results.get("operations")) or not any(operations):
        return []
    body = []
    for t, (count, cpu) in enumerate(zip(operations, results["cpu_seconds"], strict=True)):
        total, trained = results["total_parameters"][t], results["trainable_parameters"][t]
        flops = "-" if count is None else f"{count / 1e9:,.3f}"
        body.append([t + 1, flops, f"{total:,}", f"{trained:,}", number(cpu, 1)])
    head = ["task", "GFLOP an image", "parameters", "trained", "CPU (s)"]
    text = f"CPU hours {number(results['cpu_hours'], 3)}, GPU hours {number(results['gpu_hours'], 3)}. Floating-point "
    text += "operations are those of predicting one image after the task: matrix products and convolutions, 2 a multiply-add."
    return [Note(text), *folded("Operations and parameters by task", Table(head, body))]
