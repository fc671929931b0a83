"""Pictures of methods with slow and fast adapters: the experts' competition, the merges, and the age of class statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

from utils.report.plots import COLOURS, INK, Rows, colours_of, legend_above, new_figure, style, task_ticks, varies

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPETITION = {"task", "winner", "accuracies", "losses", "margin", "split", "samples"}  # models/moe_parallel.py


def is_competition(entry: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether an entry of `selection_history` is a competition of experts; other methods select other things."""
    return (
        isinstance(entry, Mapping)
        and set(entry) == COMPETITION
        and isinstance(entry["task"], int)
        and isinstance(entry["accuracies"], list)
        and all(isinstance(accuracy, int | float) for accuracy in entry["accuracies"])
        and entry["winner"] in range(len(entry["accuracies"]))
    )


def selection(results: Mapping[str, Any]) -> Figure | None:
    """Accuracy of each expert on what the winner of a task was selected on, side by side, the winner ringed and named;
    None where all accuracies are equal."""
    entries = [entry for entry in results.get("selection_history") or () if is_competition(entry)]
    if not varies([accuracy for entry in entries for accuracy in entry["accuracies"]]):
        return None
    tasks = [entry["task"] for entry in entries]
    total = max(len(results["top1_curve"]), *(t + 1 for t in tasks))
    count = max(len(entry["accuracies"]) for entry in entries)
    step = math.ceil(count / 14)  # a longer legend would stand out below
    figure = new_figure(3.6)
    axes = figure.add_subplot()
    size = max(5, min(30, 900 / (total * count)))

    def place(task: int, expert: int) -> float:  # experts stand beside each other: their accuracies are often equal
        return task + 0.64 * ((expert + 0.5) / count - 0.5)

    for k, colour in enumerate(colours_of(count)):
        points = [(place(e["task"], k), e["accuracies"][k]) for e in entries if k < len(e["accuracies"])]
        label = f"expert {k}" if k % step == 0 else None
        many = total * count > 1000  # then, in the SVG, an embedded image instead of thousands of elements
        x, y = [x for x, _ in points], [y for _, y in points]
        axes.scatter(x, y, s=size, color=colour, label=label, zorder=3, rasterized=many)
    won = [(place(e["task"], e["winner"]), e["accuracies"][e["winner"]]) for e in entries]
    axes.scatter(
        [x for x, _ in won], [y for _, y in won], s=2 * size + 30, facecolors="none", edgecolors=INK, zorder=4,
        label="winner",
    )  # fmt: skip
    for task in range(1, total):
        axes.axvline(task - 0.5, color=INK, alpha=0.2, linewidth=0.6)
    splits = {str(entry["split"]) for entry in entries}
    data = f"{splits.pop()} data" if len(splits) == 1 else "the data selected on"
    style(axes, "task", f"accuracy on {data} (%)")
    task_ticks(axes, total)
    axes.set_xlim(-0.5, total - 0.5)
    axes.margins(y=0.12)
    top = axes.secondary_xaxis("top")
    shown = entries[:: 1 if len(entries) <= 25 else math.ceil(len(entries) / 20)]
    top.set_xticks([e["task"] for e in shown], [str(e["winner"]) for e in shown])
    top.set_xlabel("winner", color=INK)
    top.tick_params(colors=INK, length=0)
    top.spines["top"].set_visible(False)
    legend_above(figure, ncols=5)
    return figure


def slow_and_fast(results: Mapping[str, Any], rows: Rows) -> Figure | None:
    """A row of panels a layer: fast's share of the output, and how large slow's and fast's are before and after a merge.

    Where a layer has several adapters, their mean; of more than two levels, the fastest and the one below it."""
    merges = [row for row in rows if row["kind"] == "consolidation"]
    if not merges:
        return None
    top = max(row["level"] for row in merges)
    merges = [row for row in merges if row["level"] == top]
    layers = sorted({row["layer"] for row in merges})
    total = max(len(results["top1_curve"]), *(row["task"] + 1 for row in merges))

    def means(layer: int, key: str) -> list[float]:
        """Value of each task, NaN where there is none, so that the line breaks there."""
        of_task: list[list[float]] = [[] for _ in range(total)]
        for row in merges:
            if row["layer"] == layer and row.get(key) is not None:
                of_task[row["task"]].append(row[key])
        return [sum(values) / len(values) if values else math.nan for values in of_task]

    lines = (
        ("slow_output", "slow", "o", "-", COLOURS[0]),
        ("fast_output", "fast", "^", "-", COLOURS[1]),
        ("slow_output_after", "slow after the merge", "s", "--", COLOURS[2]),
    )
    figure = new_figure(0.9 + (1.7 if len(layers) <= 4 else 1.3) * len(layers))
    for panel, layer in enumerate(layers):
        left, right = (figure.add_subplot(len(layers), 2, 2 * panel + side) for side in (1, 2))
        share = [100 * value for value in means(layer, "fast_share")]
        left.plot(share, color=COLOURS[1], marker="^", markersize=4, linewidth=1.2)
        left.set_ylim(-6, 106)
        largest = 0.0
        for key, label, marker, line, colour in lines:
            values = means(layer, key)
            largest = max(largest, *(value for value in values if not math.isnan(value)), 0)
            if not all(map(math.isnan, values)):
                right.plot(
                    values, color=colour, marker=marker, markersize=4, linestyle=line, linewidth=1.2, label=label
                )
        first, last = panel == 0, panel + 1 == len(layers)
        xlabel = "tasks learned" if last else ""
        style(left, xlabel, f"layer {layer}", "fast's share of the output (%)" if first else "")
        style(right, xlabel, "", "size of the output" if first else "")
        right.set_ylim(*(edge * (largest or 1.0) for edge in (-0.06, 1.1)))  # room for whole markers
        for axes in (left, right):
            task_ticks(axes, total, most=12)
            axes.set_xlim(-0.5, total - 0.5)
            axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)
    legend_above(figure)
    return figure


def head_drift(results: Mapping[str, Any]) -> Figure | None:
    """Test accuracy after each task with class statistics as they were gathered, perhaps repaired, and gathered anew; None
    where they never differ."""
    drift = results.get("head_drift") or ()
    if all(entry[key] == entry["recomputed"] for entry in drift for key in {"stale", "repaired"} & entry.keys()):
        return None
    tasks = [entry["task"] for entry in drift]
    figure = new_figure(3.2)
    axes = figure.add_subplot()
    # open and larger below, so that both show where they are equal
    lines = [("recomputed", "s", 8, "--", COLOURS[1]), ("stale", "o", 4, "-", COLOURS[0])]
    if any("repaired" in entry for entry in drift):
        lines.append(("repaired", "^", 4, "-.", COLOURS[2]))
    for key, marker, size, line, colour in lines:
        values = [entry.get(key, math.nan) for entry in drift]
        axes.plot(
            tasks, values, color=colour, marker=marker, markersize=size, markerfacecolor="none" if size > 4 else colour,
            linestyle=line, label=key,
        )  # fmt: skip
    style(axes, "tasks learned", "accuracy on all seen classes (%)")
    total = max(len(results["top1_curve"]), tasks[-1] + 1)
    task_ticks(axes, total)
    axes.set_xlim(-0.5, total - 0.5)
    axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)
    legend_above(figure, ncols=5)
    return figure


def draw(results: Mapping[str, Any], rows: Rows) -> dict[str, Figure]:
    """Every picture there are data for, by file name without ending."""
    figures = {
        "selection": selection(results),
        "slow_and_fast": slow_and_fast(results, rows),
        "head_drift": head_drift(results),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}
