"""Pictures by class of a finished model: accuracy of each class, what is taken for what, and the calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from utils.evaluation.intervals import wilson
from utils.report import class_names
from utils.report.plots import COLOURS, INK, legend_above, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_DRAWN = 40  # classes in a picture; tables have the others


def _order(results: Mapping[str, Any]) -> list[int]:
    """The classes in order of arrival, where there are few enough to be drawn and their test images were counted."""
    order = [c for ids in results["task_classes"] for c in ids]
    images = results.get("class_images") or []
    return order if 1 < len(order) <= MOST_DRAWN and None not in images and sum(images) else []


def _borders(results: Mapping[str, Any]) -> list[float]:
    """Where a new task's classes begin, between the positions of two classes."""
    ends, count = [], 0
    for ids in results["task_classes"][:-1]:
        count += len(ids)
        ends.append(count - 0.5)
    return ends


def accuracies(results: Mapping[str, Any]) -> Figure | None:
    """A bar for each class in order of arrival, its 95 % interval, and a mark where it stood right after its task."""
    if not (order := _order(results)):
        return None
    names, images = class_names.of_results(results), results["class_images"]
    now = [results["class_accuracy"][c] for c in order]
    new = [results["class_accuracy_when_new"][c] for c in order]
    figure = new_figure(1.0 + 0.21 * len(order))
    axes = figure.add_subplot()
    places = range(len(order))
    axes.barh(places, [0.0 if a is None else a for a in now], color=COLOURS[0], height=0.75, label="at the end")
    for place, c, accuracy in zip(places, order, now, strict=True):
        if accuracy is not None and (ends := wilson(round(accuracy / 100 * images[c]), images[c])):
            axes.plot([100 * end for end in ends], [place, place], color=INK, linewidth=1.0, alpha=0.7)
    known = [(a, place) for place, a in zip(places, new, strict=True) if a is not None]
    axes.scatter(
        [a for a, _ in known], [place for _, place in known], color=COLOURS[1], s=22, zorder=3, label="when new"
    )
    for border in _borders(results):
        axes.axhline(border, color=INK, alpha=0.25, linewidth=0.6)
    style(axes, "accuracy (%)", "")
    axes.set_yticks(list(places), [names[c] for c in order], fontsize=9)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_xlim(0, 101)
    legend_above(figure)
    return figure


def table_of(results: Mapping[str, Any], order: Sequence[int]) -> list[list[int]]:
    """The counts [true][predicted] of the classes of `order`, from the pairs and the right ones of results.json."""
    place = {c: i for i, c in enumerate(order)}
    table = [[0] * len(order) for _ in order]
    for c in order:
        accuracy = results["class_accuracy"][c]
        table[place[c]][place[c]] = 0 if accuracy is None else round(accuracy / 100 * results["class_images"][c])
    for true, predicted, count in results["class_confusion"]:
        if predicted is not None:
            table[place[true]][place[predicted]] = count
    return table


def confusion(results: Mapping[str, Any]) -> Figure | None:
    """Heat map: row a true class, column what its test images are taken for, in percent of the row."""
    order = _order(results)
    if not order or results["class_confusion_beyond"]:
        return None
    import numpy as np

    counts = np.array(table_of(results, order), dtype=float)
    totals = np.array([results["class_images"][c] for c in order], dtype=float)[:, None]
    shares = np.divide(100 * counts, totals, out=np.zeros_like(counts), where=totals > 0)
    figure = new_figure(min(7.0, 2.2 + 0.34 * len(order)))
    axes = figure.add_subplot()
    edges = np.arange(len(order) + 1) - 0.5
    image = axes.pcolormesh(edges, edges, shares, vmin=0, vmax=100, cmap="viridis", edgecolors="face", linewidth=0.3)
    axes.invert_yaxis()
    style(axes, "taken for", "class")
    axes.spines[:].set_visible(False)
    names, size = class_names.of_results(results), 9 if len(order) <= 20 else 7
    short = max(len(names[c]) for c in order) <= 2
    axes.set_xticks(range(len(order)), [names[c] for c in order], fontsize=size, rotation=0 if short else 90)
    axes.set_yticks(range(len(order)), [names[c] for c in order], fontsize=size)
    if len(order) <= 20:
        for (i, j), count in np.ndenumerate(counts):
            if count:
                colour = "black" if shares[i, j] > 55 else "white"  # viridis turns light there
                axes.text(j, i, f"{count:.0f}", ha="center", va="center", fontsize=8, color=colour)
    for border in _borders(results):
        axes.axhline(border, color="white", linewidth=0.8)
        axes.axvline(border, color="white", linewidth=0.8)
    bar = figure.colorbar(image, ax=axes, label="percent of the class", fraction=0.04, pad=0.02)
    bar.ax.tick_params(colors=INK)
    bar.ax.yaxis.label.set_color(INK)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.solids.set(rasterized=False, edgecolor="face")  # type: ignore[union-attr]
    return figure


def _bin_axes(axes: Axes) -> None:
    axes.set_xlim(0, 100)
    axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)
    axes.set_axisbelow(True)


def reliability(results: Mapping[str, Any]) -> Figure | None:
    """Accuracy of the images in each bin of confidence, the diagonal of a calibrated model, and the images of each bin."""
    counts = results.get("calibration")
    if not counts or counts["ece"] is None:
        return None
    bins, images = len(counts["images"]), counts["images"]
    width = 100 / bins
    middles = [(b + 0.5) * width for b in range(bins)]
    figure = new_figure(4.4)
    upper, lower = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    accuracy = [math.nan if a is None else a for a in counts["accuracy"]]
    upper.bar(middles, accuracy, width=0.9 * width, color=COLOURS[0], label="accuracy")
    upper.plot([0, 100], [0, 100], color=INK, linestyle="--", linewidth=1, label="calibrated")
    confidence = [math.nan if p is None else p for p in counts["confidence"]]
    upper.scatter(confidence, accuracy, color=COLOURS[1], s=22, zorder=3, label="mean confidence")
    style(upper, "", "accuracy (%)")
    upper.set_ylim(0, 101)
    lower.bar(middles, [100 * n / sum(images) for n in images], width=0.9 * width, color=COLOURS[2])
    style(lower, "confidence (%)", "images (%)")
    for axes in (upper, lower):
        _bin_axes(axes)
    legend_above(figure)
    return figure


def draw(results: Mapping[str, Any]) -> dict[str, Figure]:
    """Every picture there are data for, by file name without ending."""
    figures = {
        "classes": accuracies(results),
        "class_confusion": confusion(results),
        "calibration": reliability(results),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}
