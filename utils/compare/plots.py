"""Pictures of several runs side by side: a line with a band of one standard deviation over seeds for each row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from utils.compare.rows import Arm
from utils.evaluation import metrics
from utils.report.plots import COLOURS, INK, MORE_COLOURS, legend_above, new_figure, style, task_ticks, varies
from utils.report.plots_tasks import PARTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = (*COLOURS, *MORE_COLOURS)  # nine distinct colours
Chosen = Sequence[tuple[int, Arm]]  # rows with their numbers from 1
Series = Callable[[Mapping[str, Any]], Sequence[float | None]]  # a value a task from a run's results


def over_seeds(row: Arm, series: Series) -> list[metrics.Summary]:
    """For each task the summary over the row's seeds."""
    values = zip_longest(*(series(run.results) for run in row.runs.values()))
    return [metrics.summarise(column) for column in values]


def _lines(axes: Axes, rows: Chosen, series: Series, xlabel: str, ylabel: str) -> None:
    """Each row's line and band, in a colour that is the row's in every picture."""
    longest = 0
    for (number, row), colour in zip(rows, PALETTE, strict=False):
        summaries = over_seeds(row, series)
        if not any(summary.n for summary in summaries):
            continue
        longest = max(longest, len(summaries))
        means = [math.nan if s.mean is None else s.mean for s in summaries]
        axes.plot(means, color=colour, marker="o", markersize=3.5, linewidth=1.4, label=_label(number, row))
        spread = [s.std or 0.0 for s in summaries]
        low, high = ([m + sign * d for m, d in zip(means, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(range(len(means)), low, high, color=colour, alpha=0.18, linewidth=0)
    style(axes, xlabel, ylabel)
    if longest:
        task_ticks(axes, longest)
        axes.set_xlim(-0.5, longest - 0.5)
    axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)


def _label(number: int, row: Arm) -> str:
    return f"{number}: {row.label[:72]}".replace("$", r"\$")  # a dollar sign would begin a formula


Panel = tuple[Series, str, str]  # with the labels of x and y


def _picture(rows: Chosen, panels: Sequence[Panel], limits: tuple[float, float | None] | None = None) -> Figure | None:
    """One panel below the other for each in which a row's mean changes with the tasks, y within `limits`; None without any."""
    drawn = [panel for panel in panels if varies(*([s.mean for s in over_seeds(row, panel[0])] for _, row in rows))]
    if not drawn:
        return None
    figure = new_figure(0.4 + 2.5 * len(drawn) + 0.2 * len(rows))
    for place, (series, xlabel, ylabel) in enumerate(drawn, start=1):
        axes = figure.add_subplot(len(drawn), 1, place)
        _lines(axes, rows, series, xlabel if place == len(drawn) else "", ylabel)
        if limits is not None:
            axes.set_ylim(*limits)
    legend_above(figure, ncols=1)
    return figure


def error_bars(rows: Chosen) -> Figure | None:
    """Accuracy, task confusion and within-task error of the finished models, a bar a row, means over seeds."""
    numbers, parts = [], []
    for number, row in rows:
        last = [run.results["splits"][-1] for run in row.runs.values() if run.results["splits"]]
        means = [metrics.mean(getattr(split, part) for split in last) for part in PARTS]
        if None not in means:
            numbers.append(str(number))
            parts.append([mean or 0.0 for mean in means])
    if not numbers:
        return None
    figure = new_figure(0.9 + 0.36 * len(numbers))
    axes = figure.add_subplot()
    base = [0.0] * len(numbers)
    for index, (label, colour) in enumerate(PARTS.values()):
        width = [shares[index] for shares in parts]
        axes.barh(range(len(numbers)), width, left=base, color=colour, height=0.75, label=label)
        base = [b + w for b, w in zip(base, width, strict=True)]
    style(axes, "test images (%)", "row")
    axes.set_yticks(range(len(numbers)), numbers)
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    legend_above(figure)
    return figure


def draw(rows: Chosen) -> dict[str, Figure]:
    """Every picture there are data for, by name; `rows` are at most as many as PALETTE has colours."""

    def adapters(results: Mapping[str, Any]) -> Sequence[float | None]:
        return results["adapters"] if any(results["adapters"]) else ()

    def seconds(results: Mapping[str, Any]) -> list[float | None]:
        return [sum(entry.values()) for entry in results["seconds"]]

    def memory(results: Mapping[str, Any]) -> list[float | None]:
        return [peak and peak / 2**20 for peak in results["peaks"]]

    seen, task = "tasks learned", "task"
    figures = {
        "accuracy": _picture(rows, [(lambda r: r["top1_curve"], seen, "accuracy on all seen classes (%)")]),
        "forgetting": _picture(rows, [(lambda r: r["forgetting_by_task"], task, "forgetting (points)")]),
        "errors": error_bars(rows),
        "bias": _picture(
            rows, [(lambda r: [split.bias for split in r["splits"]], seen, "head bias (%)")], limits=(-105, 105)
        ),
        "adapters": _picture(rows, [(adapters, seen, "adapters")]),
        "cost": _picture(rows, [(seconds, task, "seconds"), (memory, task, "peak memory (MiB)")], limits=(0, None)),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}
