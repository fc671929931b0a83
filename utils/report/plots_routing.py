"""Pictures of routed experts: who serves which task and class, how that moves, how undecided routers are, and controls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from utils.evaluation import routing
from utils.report import class_names
from utils.report.plots import COLOURS, INK, Rows, colours_of, legend, new_figure, style, task_ticks
from utils.text import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3  # panels of layers side by side
NOBODY = (0.5, 0.5, 0.5, 0.25)  # colour of a class for which no expert stands out
MANY = 1000  # cells from which on the SVG gets an embedded image instead of an element for each
MOST_NAMED = 20  # classes with a name each beside a picture; of more the tasks are numbered
MOST_ALONE = 16  # bars of single experts


def heat_map(results: Mapping[str, Any], rows: Rows) -> Figure | None:
    """Mean gate of each expert for the test images of each task after the last one, a panel a layer."""
    import numpy as np

    measured = [row for row in rows if row["kind"] == "gates"]
    if not measured:
        return None
    last = measured[-1]
    gates, spans = np.array(last["gate"]), _spans(results, len(last["samples"]))
    table = np.stack([gates[span.start : span.stop].mean(axis=0) for span in spans])  # [T, L, E]
    count, experts = len(last["layers"]), len(last["experts"])
    down = math.ceil(count / COLUMNS)
    figure = new_figure(0.8 + down * min(2.6, 0.8 + 0.22 * experts))
    for place, layer in enumerate(last["layers"]):
        axes = figure.add_subplot(down, min(count, COLUMNS), place + 1)
        image = axes.pcolormesh(table[:, place].T, vmin=0, vmax=table.max(), edgecolors="face", linewidth=0.3)
        image.set_rasterized(table.size > MANY)
        axes.invert_yaxis()
        _labels(axes, place, count, f"layer {layer}", "test classes of task", "expert")
        task_ticks(axes, len(spans), most=8 if count > 1 else 25)
        axes.set_xticks([x + 0.5 for x in axes.get_xticks()], [text.get_text() for text in axes.get_xticklabels()])
        step = math.ceil(experts / 16)
        axes.set_yticks([e + 0.5 for e in range(0, experts, step)], list(map(str, last["experts"][::step])))
        if len(spans) * min(count, COLUMNS) <= 18 and experts <= 16:
            for (t, e), gate in np.ndenumerate(table[:, place]):
                shade = "black" if gate > 0.55 * table.max() else "white"  # viridis turns light there
                axes.text(t + 0.5, e + 0.5, f"{gate:.2f}", ha="center", va="center", fontsize=7, color=shade)
    _colour_bar(figure, image, figure.axes, "mean gate", 0.03)
    return figure


def over_time(rows: Rows) -> Figure | None:
    """Above: the mean entropy of each layer's softmax in every epoch, with that of an undecided router. Below, a panel a
    layer: the experts' parts of the gates, stacked."""
    epochs = [row for row in rows if row["kind"] == "experts"]
    if not epochs:
        return None
    import numpy as np

    layers = sorted({row["layer"] for row in epochs})
    of_layer = {layer: [row for row in epochs if row["layer"] == layer] for layer in layers}
    tasks = [row["task"] for row in of_layer[layers[0]]]
    numbers = {task: routing.numbers_in(rows, task) for task in set(tasks)}
    count = 1 + max(max(known) for known in numbers.values())
    figure, top, panels = _under_a_panel(len(layers), height=1.5)
    for layer, colour in zip(layers, _ramp(len(layers)), strict=True):
        values = [row["token_entropy"] for row in of_layer[layer]]
        top.plot(values, color=colour, marker=".", markersize=4, linewidth=1.2, label=f"layer {layer}")
    undecided = [math.log(len(row["gate"])) for row in of_layer[layers[0]]]
    edges = np.arange(len(tasks) + 1) - 0.5
    top.stairs(undecided, edges, baseline=None, color=INK, linestyle=":", label="undecided")
    style(top, "task, its epochs from left to right", "entropy (nats)")
    top.set_ylim(-0.05 * max(undecided), 1.15 * max(undecided) or 1)
    _layer_legend(top)
    _task_stretches(top, tasks, most=25)
    many = count * len(tasks) * len(layers) > MANY
    for place, (layer, axes) in enumerate(zip(layers, panels, strict=True)):
        parts = np.zeros((count, len(tasks)))
        for i, row in enumerate(of_layer[layer]):
            parts[numbers[row["task"]], i] = np.array(row["gate"]) / (sum(row["gate"]) or 1)
        tops = parts.cumsum(axis=0)
        for expert, colour in enumerate(_colours(count)):
            base = tops[expert] - parts[expert]
            axes.stairs(tops[expert], edges, baseline=base, fill=True, color=colour, rasterized=many)
        _labels(axes, place, len(layers), f"layer {layer}", "task", "part of the gates")
        axes.set_ylim(0, 1)
        axes.set_yticks([0, 0.5, 1])
        _task_stretches(axes, tasks, most=8 if len(layers) > 1 else 20)
    _expert_legend(figure, count)
    return figure


def drift(results: Mapping[str, Any], rows: Rows) -> Figure | None:
    """Above: how far the gates of old classes moved with each task. Below, a panel a layer: the expert that serves each class
    after each task, grey where the second has nearly the same mean gate."""
    by_task = {row["task"]: row for row in rows if row["kind"] == "gates"}
    if not by_task:
        return None
    import numpy as np
    from matplotlib.colors import to_rgba

    last = by_task[max(by_task)]
    layers, total, classes = last["layers"], max(by_task) + 1, len(last["samples"])
    spans = _spans(results, classes)
    count = 1 + max(expert for row in by_task.values() for expert in row["experts"])
    colours = [to_rgba(colour) for colour in _colours(count)]
    moves = [row for row in rows if row["kind"] == "routing_drift"]
    figure, top, panels = _under_a_panel(len(layers), height=min(2.6, 1.2 + 0.1 * classes), upper=bool(moves))
    if top is not None:
        for place, (layer, colour) in enumerate(zip(layers, _ramp(len(layers)), strict=True)):
            x, y = [row["task"] for row in moves], [row["mean"][place] for row in moves]
            top.plot(x, y, color=colour, marker="o", markersize=4, linewidth=1.2, label=f"layer {layer}")
        style(top, "after task", "gates moved by")
        top.set_ylim(0, 1.15 * max(max(row["mean"]) for row in moves) + 0.01)
        top.set_xlim(-0.5, total - 0.5)
        task_ticks(top, total)
    added = [row["task"] for row in moves if row["added"]]
    texts = class_names.of_results(results)
    named = not class_names.are_numbers(texts) and classes <= MOST_NAMED
    for place, (layer, axes) in enumerate(zip(layers, panels, strict=True)):
        cells = np.zeros((classes, total, 4))
        for task, row in by_task.items():
            for c, gates in enumerate(row["gate"]):
                most, *others = sorted(gates[place], reverse=True)
                expert = row["experts"][gates[place].index(most)]
                tied = bool(others) and others[0] >= routing.TIED * most
                cells[c, task] = NOBODY if tied else colours[expert]
                if not tied and classes <= 20 and total * min(len(layers), COLUMNS) <= 30:
                    axes.text(task, c, str(expert), ha="center", va="center", fontsize=7, color=INK)
        # one small image a panel, also in the SVG: up to thousands of cells without hairlines between them
        axes.imshow(cells, aspect="auto", interpolation="none")
        _labels(axes, place, len(layers), f"layer {layer}", "after task", "" if named else "classes of task")
        task_ticks(axes, total, most=8 if len(layers) > 1 else 25)
        step = math.ceil(len(spans) / 10)
        middles = [(span.start + span.stop - 1) / 2 for span in spans]
        if named:
            beside = (
                [] if place % COLUMNS else [class_names.for_axis(texts[c]) for c in results["class_order"][:classes]]
            )
            axes.set_yticks(range(len(beside)), beside, fontsize=7)
        else:
            axes.set_yticks(middles[::step], [str(t + 1) for t in range(0, len(spans), step)])
        for span in spans[1:]:
            axes.axhline(span.start - 0.5, color=INK, alpha=0.2, linewidth=0.6)
    for axes in [*panels, *([] if top is None else [top])]:
        for n, task in enumerate(added):
            label = "expert added" if axes is top and n == 0 else None
            axes.axvline(task - 0.5, color=INK, linestyle=":", linewidth=1, label=label)
    if top is not None:
        _layer_legend(top)
    _expert_legend(figure, count, nobody=True)
    return figure


def controls(rows: Rows) -> Figure | None:
    """Left: accuracy of the finished model under each routing. Right: the same by task."""
    measured = [row for row in rows if row["kind"] == "routing_controls"]
    if not measured:
        return None
    import numpy as np

    row = measured[-1]
    listed = {name: (values, routing.overall(values, row["samples"])) for name, values in routing.controls(row)}
    alone = sorted((name for name in listed if name.startswith("only")), key=lambda name: -listed[name][1])
    for name in alone[MOST_ALONE:]:
        del listed[name]
    names = list(listed)
    values, means = zip(*listed.values(), strict=True)
    table = 100 * np.array(values)  # [routings, T]
    total = [100 * mean for mean in means]
    kinds = {"learned": COLOURS[0], "uniform": COLOURS[4], "random": COLOURS[4]}
    colours = [COLOURS[5] if name.startswith("only") else kinds.get(name, COLOURS[2]) for name in names]
    tasks = table.shape[1]
    figure = new_figure(1.0 + 0.24 * len(names))
    grid = figure.add_gridspec(1, 2, width_ratios=[1, 1.25]) if tasks > 1 else figure.add_gridspec(1, 1)
    bars = figure.add_subplot(grid[0, 0])
    bars.barh(range(len(names)), total, color=colours, height=0.75)
    for y, accuracy in enumerate(total):
        bars.text(accuracy + 1.5, y, number(accuracy, 1), va="center", fontsize=8, color=INK)
    bars.set_yticks(range(len(names)), names)
    bars.set_ylim(len(names) - 0.5, -0.5)
    bars.set_xlim(0, 118)
    bars.set_xticks([0, 50, 100])
    style(bars, "accuracy on all classes (%)", "")
    if len(alone) > MOST_ALONE:
        bars.set_title(f"the {MOST_ALONE} best of {len(alone)} experts", color=INK, loc="left", fontsize=9)
    if tasks == 1:
        return figure
    axes = figure.add_subplot(grid[0, 1], sharey=bars)
    low = min(10 * math.floor(table.min() / 10), 90)
    edges = np.arange(tasks + 1) - 0.5, np.arange(len(names) + 1) - 0.5
    image = axes.pcolormesh(*edges, table, vmin=low, vmax=100, edgecolors="face", linewidth=0.3)
    image.set_rasterized(table.size > MANY)
    style(axes, "classes of task", "")
    axes.spines[:].set_visible(False)
    axes.tick_params(labelleft=False, left=False)
    task_ticks(axes, tasks, most=12)
    if tasks <= 10:
        for (y, t), accuracy in np.ndenumerate(table):
            shade = "black" if accuracy > low + 0.55 * (100 - low) else "white"
            axes.text(t, y, number(accuracy, 0), ha="center", va="center", fontsize=7, color=shade)
    _colour_bar(figure, image, [axes], "percent", 0.05)
    return figure


# Parts of the pictures ---------------------------------------------------------------------------------------------


def _spans(results: Mapping[str, Any], classes: int) -> list[range]:
    """Positions of each task's classes among the first `classes` in order of arrival."""
    ends = list(accumulate(len(ids) for ids in results["task_classes"]))
    return [range(a, b) for a, b in zip([0, *ends], ends, strict=False) if b <= classes]


def _under_a_panel(count: int, height: float, upper: bool = True) -> tuple[Figure, Any, list[Axes]]:
    """A new figure: one wide panel (None without `upper`), and below it one for each of `count` layers, side by side."""
    down, columns = math.ceil(count / COLUMNS), min(count, COLUMNS)
    heights = [1.7] * upper + [height + 0.3] * down
    figure = new_figure(0.7 + sum(heights))
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    top = figure.add_subplot(grid[0, :]) if upper else None
    panels = [figure.add_subplot(grid[upper + n // COLUMNS, n % COLUMNS]) for n in range(count)]
    return figure, top, panels


def _labels(axes: Axes, place: int, count: int, title: str, xlabel: str, ylabel: str) -> None:
    """Labels of panel `place` of `count`: x where no panel is below, y at the left."""
    style(axes, xlabel if place + COLUMNS >= count else "", "" if place % COLUMNS else ylabel)
    axes.set_title(title, color=INK, loc="left", fontsize=10)
    axes.spines[:].set_visible(False)


def _task_stretches(axes: Axes, tasks: Sequence[int], most: int) -> None:
    """Fine lines where `tasks[i]`, the task of point i, changes, and each task's number below its stretch."""
    starts = [i for i, task in enumerate(tasks) if i == 0 or tasks[i - 1] != task]
    ends = [*starts[1:], len(tasks)]
    for start in starts[1:]:
        axes.axvline(start - 0.5, color=INK, alpha=0.25, linewidth=0.6)
    step = 1 if len(starts) <= most else math.ceil(len(starts) / (0.8 * most))
    middles = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]
    axes.set_xticks(middles[::step], [str(tasks[start] + 1) for start in starts[::step]])
    axes.set_xlim(-0.5, len(tasks) - 0.5)


def _ramp(count: int) -> list[str]:
    """Colours of layers by depth: an order, and none of the colours of few experts."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["plasma"](0.1 + 0.7 * i / max(count - 1, 1))) for i in range(count)]


def _colours(count: int) -> list[str]:
    """A colour for each of `count` experts. Up to 18 have distinct colours; more of them a ramp by age."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    named = [to_hex(colour) for i, colour in enumerate(colormaps["tab20"].colors) if i // 2 != 7]  # type: ignore[attr-defined]
    if len(COLOURS) < count <= len(named):  # the two greys are left out: they look like no expert
        return named[:count]
    return colours_of(count)


def _expert_legend(figure: Figure, count: int, nobody: bool = False) -> None:
    """Colours of the experts, above all panels; of very many only some."""
    from matplotlib.patches import Patch

    colours, step = _colours(count), 1 if count <= 18 else math.ceil(count / 16)
    shown = [Patch(color=colours[e], label=f"expert {e}" if e == 0 else str(e)) for e in range(0, count, step)]
    if nobody:
        shown.append(Patch(color=NOBODY, label="none stands out"))
    figure.legend(
        handles=shown, loc="outside upper left", ncols=10, frameon=False, labelcolor=INK, fontsize=9,
        handlelength=1, columnspacing=1,
    )  # fmt: skip


def _layer_legend(axes: Axes) -> None:
    legend(axes, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=6, handlelength=1.5, columnspacing=1)


def _colour_bar(figure: Figure, image: Any, axes: list[Axes], label: str, fraction: float) -> None:
    bar = figure.colorbar(image, ax=axes, label=label, fraction=fraction, pad=0.02)
    bar.ax.tick_params(colors=INK)
    bar.ax.yaxis.label.set_color(INK)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.solids.set(rasterized=False, edgecolor="face")  # type: ignore[union-attr]


def draw(results: Mapping[str, Any], rows: Rows) -> dict[str, Figure]:
    """Every picture there are data for, by file name without ending."""
    figures = {
        "routing_heatmap": heat_map(results, rows),
        "routing_over_time": over_time(rows),
        "routing_drift": drift(results, rows),
        "routing_controls": controls(rows),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}
