"""Pictures of a run task by task: what was forgotten, which kinds of errors there are, what each task took."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from utils.evaluation import error_parts as errors
from utils.evaluation import metrics
from utils.report.plots import COLOURS, INK, legend_above, new_figure, style, task_ticks, varies
from utils.run.record import PHASES
from utils.text import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS = {  # field of a split: name, colour
    "accuracy": ("accuracy", COLOURS[0]),
    "confusion": ("task confusion", COLOURS[1]),
    "within": ("within-task error", COLOURS[3]),
}


def _grid(axes: Axes, tasks: int) -> None:
    task_ticks(axes, tasks)
    axes.set_xlim(-0.6, tasks - 0.4)
    axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)
    axes.set_axisbelow(True)


def forgetting(results: Mapping[str, Any]) -> Figure | None:
    """What each task but the last has lost at the end against its best earlier accuracy; None for a single task and
    where nothing was forgotten."""
    drops = metrics.forgetting_by_task(results["accuracy_matrix"])
    if not any(drops):
        return None
    figure = new_figure(2.8)
    axes = figure.add_subplot()
    axes.bar(range(len(drops)), [math.nan if drop is None else drop for drop in drops], color=COLOURS[1], width=0.8)
    if (mean := results.get("forgetting", metrics.mean(drops))) is not None:  # as the page has it
        axes.axhline(mean, color=COLOURS[0], linestyle="--", linewidth=1, label=f"mean {number(mean)}")
    axes.axhline(0, color=INK, linewidth=0.6)
    style(axes, "task", "forgetting (points)")
    _grid(axes, len(drops))
    legend_above(figure)
    return figure


def error_parts(results: Mapping[str, Any]) -> Figure | None:
    """Accuracy, task confusion and within-task error after each task, stacked to 100; below, the head bias. None where all are
    the same after all tasks."""
    splits = errors.splits(results)
    known = [t for t, split in enumerate(splits) if split.within is not None]
    if len(known) < 2 or not varies(*([getattr(splits[t], name) for t in known] for name in PARTS)):
        return None
    biased = [t for t, split in enumerate(splits) if split.bias is not None]
    biased = biased if any(splits[t].bias for t in biased) else []
    figure = new_figure(4.6 if biased else 3.2)
    axes = figure.add_subplot(2 if biased else 1, 1, 1)
    base = [0.0] * len(known)
    for name, (label, colour) in PARTS.items():
        height = [getattr(splits[t], name) for t in known]
        axes.bar(known, height, bottom=base, color=colour, width=0.8, label=label)
        base = [b + h for b, h in zip(base, height, strict=True)]
    style(axes, "" if biased else "tasks learned", "test images (%)")
    _grid(axes, len(splits))
    legend_above(figure)
    if biased:
        below = figure.add_subplot(2, 1, 2)
        below.bar(biased, [splits[t].bias or 0.0 for t in biased], color=COLOURS[2], width=0.8)
        below.axhline(0, color=INK, linewidth=0.6)
        below.set_ylim(-105, 105)
        style(below, "tasks learned", "head bias (%)")
        _grid(below, len(splits))
    return figure


def cost(results: Mapping[str, Any]) -> Figure | None:
    """Seconds of each task by phase, stacked; below, the largest memory of the process so far, where it was recorded
    and grew. None for a single task."""
    seconds = results["seconds"]
    if not varies(*([entry.get(phase) for entry in seconds] for phase in PHASES)):
        return None
    peaks = results.get("peak_memory_by_task") or []
    known = [(t, peak / 2**20) for t, peak in enumerate(peaks) if peak]
    known = known if varies([peak for _, peak in known]) else []
    figure = new_figure(4.4 if known else 2.8)
    axes = figure.add_subplot(2 if known else 1, 1, 1)
    base = [0.0] * len(seconds)
    for phase, colour in zip(PHASES, (COLOURS[0], COLOURS[2], COLOURS[4]), strict=True):
        height = [entry[phase] for entry in seconds]
        if any(height):
            axes.bar(range(len(seconds)), height, bottom=base, color=colour, width=0.8, label=phase)
            base = [b + h for b, h in zip(base, height, strict=True)]
    style(axes, "" if known else "task", "seconds")
    _grid(axes, len(seconds))
    legend_above(figure)
    if known:
        below = figure.add_subplot(2, 1, 2)
        below.plot([t for t, _ in known], [peak for _, peak in known], color=COLOURS[3], marker="o", markersize=4)
        style(below, "task", "peak memory (MiB)")
        _grid(below, len(seconds))
        below.set_ylim(0, 1.1 * max(peak for _, peak in known))
    return figure


def draw(results: Mapping[str, Any]) -> dict[str, Figure]:
    """Every picture there are data for, by file name without ending."""
    figures = {"forgetting": forgetting(results), "errors": error_parts(results), "cost": cost(results)}
    return {name: figure for name, figure in figures.items() if figure is not None}
