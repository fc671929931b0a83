"""Pictures of one seed's run, from its results.json and the rows of metrics.jsonl, as PNG or as inline SVG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from utils.process import stopwatch
from utils.report import class_names
from utils.text import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

WIDTH = 6.4  # inches: letters of 10 points can be read where a phone shows the picture 370 pixels wide
INK = "#010203"  # stands for "the text colour": black in the PNG files, light or dark as the page in report.html
# Okabe and Ito's palette, distinct with any colour vision; the ones that show on white and on black, strongest first
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MORE_COLOURS = ("#8A63D2", "#8C564B", "#8C8C8C")  # where nine must be distinct, such as the parts of a profile


# ------------------------------------------------------------------------------------------------ pictures


def new_figure(height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # the object interface: no pyplot, so neither the backend nor the open figures of other code are touched
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def style(axes: Axes, xlabel: str, ylabel: str, title: str = "") -> None:
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.set_title(title, color=INK, loc="left", fontsize=11)
    axes.tick_params(colors=INK)
    axes.patch.set_alpha(0)
    for side, spine in axes.spines.items():
        spine.set_color(INK)
        spine.set_visible(side in ("left", "bottom"))


def legend(axes: Axes, **options: Any) -> None:
    axes.legend(labelcolor=INK, frameon=False, fontsize=9, **options)


def legend_above(figure: Figure, ncols: int = 4) -> None:
    """One legend for all panels, above them; equal labels are named once."""
    handles = {label: h for a in figure.axes for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside upper left",
        ncols=ncols,
        frameon=False,
        labelcolor=INK,
        fontsize=9,
    )


def task_ticks(axes: Axes, tasks: int, most: int = 25) -> None:
    """Task numbers from 1 at 0, 1, ...; where there are more than `most`, only some of them."""
    step = 1 if tasks <= most else math.ceil(tasks / (0.8 * most))
    axes.set_xticks(range(0, tasks, step), [str(t + 1) for t in range(0, tasks, step)])


def _task_marks(axes: Axes, tasks: Sequence[int], most: int = 24) -> None:
    """Fine lines where `tasks[i]`, the task of point i, changes, and each task's number above its stretch."""
    starts = [i for i, task in enumerate(tasks) if i == 0 or tasks[i - 1] != task]
    ends = [*starts[1:], len(tasks)]
    step = math.ceil(len(starts) / most)  # more numbers than this would touch
    for place, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if start:
            axes.axvline(start - 0.5, color=INK, alpha=0.25, linewidth=0.6)
        if place % step == 0:
            text = f"task {tasks[start] + 1}" if 3 * len(starts) <= most else str(tasks[start] + 1)
            axes.text(
                (start + end - 1) / 2, 1.01, text, transform=axes.get_xaxis_transform(), ha="center", va="bottom",
                fontsize=8, color=INK,
            )  # fmt: skip
    axes.set_xlim(-0.5, len(tasks) - 0.5)


def colours_of(count: int) -> list[str]:
    """A colour for each of `count` things: the palette for a few, else a ramp in which neighbours stay in order.

    The ramp leaves out viridis' ends, of which one does not show on black and the other not on white."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return [to_hex(colormaps["viridis"](0.15 + 0.7 * i / (count - 1))) for i in range(count)]


def varies(*series: Sequence[Any]) -> bool:
    """Whether any of the series has two different values, None and NaN apart: else its picture would be a flat line."""
    return any(len({v for v in values if v is not None and not math.isnan(v)}) > 1 for values in series)


def log_scale_if_wide(axes: Axes, values: Sequence[float]) -> None:
    if values and min(values) > 0 and max(values) > 50 * min(values):
        axes.set_yscale("log")


MOST_NAMED = 12  # tasks that an axis names by their classes


def accuracy_matrix(results: Mapping[str, Any]) -> Figure | None:
    """Heat map of a[t][k] in percent: row t after task t, column k a task's test classes; None where all are equal."""
    matrix = results["accuracy_matrix"]
    if not varies([value for row in matrix for value in row]):
        return None
    import numpy as np

    tasks = len(matrix)
    table = np.full((tasks, tasks), np.nan)
    for t, row in enumerate(matrix):
        table[t, : len(row)] = [math.nan if value is None else value for value in row]
    figure = new_figure(min(5.2, 1.4 + 0.36 * tasks))
    axes = figure.add_subplot()
    edges = np.arange(tasks + 1) - 0.5
    # a mesh, not imshow: its cells stay vectors in the SVG; edges in the cells' colour leave no hairlines between them
    image = axes.pcolormesh(edges, edges, table, vmin=0, vmax=100, cmap="viridis", edgecolors="face", linewidth=0.3)
    axes.invert_yaxis()
    style(axes, "accuracy on the classes of task", "after task")
    axes.spines[:].set_visible(False)
    task_ticks(axes, tasks)
    names = [label.get_text() for label in axes.get_xticklabels()]
    if tasks <= MOST_NAMED and "task_classes" in results:
        names = class_names.of_tasks(results)[:tasks]
    axes.set_yticks(axes.get_xticks(), names, fontsize=8 if any(":" in name for name in names) else None)
    digits, size = (1, 9) if tasks <= 10 else (0, 8 if tasks <= 16 else 7)
    for (t, k), value in np.ndenumerate(table):
        if tasks <= 25 and not math.isnan(value):
            colour = "black" if value > 55 else "white"  # viridis turns light there
            axes.text(k, t, number(value, digits), ha="center", va="center", fontsize=size, color=colour)
    bar = figure.colorbar(image, ax=axes, label="percent", fraction=0.04, pad=0.02)
    bar.ax.tick_params(colors=INK)
    bar.ax.yaxis.label.set_color(INK)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.solids.set(rasterized=False, edgecolor="face")  # type: ignore[union-attr]
    return figure


def curves(results: Mapping[str, Any]) -> Figure | None:
    """Accuracy over all seen classes after each task (top-1, top-5 where defined) and the top-1 average; None where each is
    the same after all tasks."""
    if not varies(results["top1_curve"], results["top5_curve"]):
        return None
    figure = new_figure(3.4)
    axes = figure.add_subplot()
    lines = (("top1_curve", "top-1", "o", COLOURS[0]), ("top5_curve", "top-5", "s", COLOURS[1]))
    for key, label, marker, colour in lines:
        values = [math.nan if value is None else value for value in results[key]]
        if not all(map(math.isnan, values)):
            axes.plot(values, color=colour, marker=marker, markersize=4, label=label)
    if (average := results["average_accuracy"]) is not None:
        axes.axhline(average, color=COLOURS[0], linestyle="--", linewidth=1, label=f"top-1 average {number(average)}")
    style(axes, "tasks learned", "accuracy on all seen classes (%)")
    task_ticks(axes, len(results["top1_curve"]))
    axes.set_xlim(-0.5, len(results["top1_curve"]) - 0.5)
    axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)
    legend_above(figure)
    return figure


# what an epoch's row holds besides losses; every other number in it is a term of the loss that the method named
NO_TERMS = frozenset({"time", "task", "epoch", "epochs", "accuracy", "lr", "images", "seconds", "steps", "interval"})


def loss_terms(epochs: Rows) -> list[str]:
    """`loss`, then the named terms of which it is the sum, in the order in which the rows have them."""
    names = dict.fromkeys(["loss"])
    for row in epochs:
        numeric = (k for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool))
        names |= dict.fromkeys(name for name in numeric if name not in NO_TERMS)
    return list(names)


def losses(rows: Rows) -> Figure | None:
    """Mean loss of each epoch, a panel a phase (their losses have different scales) and one for each named term of the loss,
    all of one size, two side by side. Panels without two different values are left out; None without any."""
    epochs = [row for row in rows if row["kind"] == "epoch" and row.get("loss") is not None]
    phases: dict[str, list[Mapping[str, Any]]] = {}
    for row in epochs:
        phases.setdefault(str(row.get("phase", "train")), []).append(row)
    panels = [(phase, term) for phase, of_phase in phases.items() for term in loss_terms(of_phase)]
    panels = [(phase, term) for phase, term in panels if varies([row.get(term) for row in phases[phase]])]
    if not panels:
        return None
    from matplotlib.ticker import MaxNLocator

    columns = min(2, len(panels))
    down = math.ceil(len(panels) / columns)
    figure = new_figure(0.4 + 2.0 * down)
    colours = dict(zip(phases, COLOURS * len(phases), strict=False))
    for panel, (phase, term) in enumerate(panels):
        of_phase, axes = phases[phase], figure.add_subplot(down, columns, panel + 1)
        start = 0
        for i in range(1, len(of_phase) + 1):  # a line breaks where a new round of epochs begins
            ended = i == len(of_phase) or of_phase[i]["task"] != of_phase[i - 1]["task"]
            if ended or of_phase[i]["epoch"] <= of_phase[i - 1]["epoch"]:
                values = [math.nan if row.get(term) is None else row[term] for row in of_phase[start:i]]
                axes.plot(range(start, i), values, color=colours[phase], marker=".", markersize=3, linewidth=1.2)
                start = i
        lowest = panel + columns >= len(panels)
        style(axes, "epochs (tasks above)" if lowest else "", f"{phase} {term}".replace("_", " "))
        log_scale_if_wide(axes, [row[term] for row in of_phase if row.get(term) is not None])
        _task_marks(axes, [row["task"] for row in of_phase], most=24 // columns)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    return figure


def adapters(results: Mapping[str, Any]) -> Figure | None:
    """Number of adapters after each task, stacked by layer; None where no layer's number changes."""
    counts = results["adapters_per_layer"]
    layers = list(dict.fromkeys(layer for entry in counts for layer, n in entry.items() if n))
    if not varies(*([entry.get(layer, 0) for entry in counts] for layer in layers)):
        return None
    from matplotlib.ticker import MaxNLocator

    colours = colours_of(len(layers))
    figure = new_figure(3.2)
    axes = figure.add_subplot()
    base = [0] * len(counts)
    for i, layer in enumerate(layers):
        height = [entry.get(layer, 0) for entry in counts]
        axes.bar(range(len(counts)), height, bottom=base, color=colours[i], width=0.8, label=f"layer {layer}")
        base = [b + h for b, h in zip(base, height, strict=True)]
    style(axes, "tasks learned", "adapters")
    task_ticks(axes, len(counts))
    axes.set_xlim(-0.6, len(counts) - 0.4)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    legend_above(figure, ncols=5)
    return figure


def detections(rows: Rows) -> Figure | None:
    """Shift scores of every adapter at each detection, one panel a layer, with the threshold and the expansions."""
    events = [row for row in rows if row["kind"] == "detect" and row.get("scores")]
    layers = sorted({row["layer"] for row in events})
    if not layers:
        return None
    figure = new_figure(0.6 + (1.9 if len(layers) <= 4 else 1.4) * len(layers))
    for panel, layer in enumerate(layers):
        of_layer = [row for row in events if row["layer"] == layer]
        # a score is null where it was infinite, for a record without deviation: the axis has no place for it
        points = [(i, score) for i, row in enumerate(of_layer) for score in row["scores"] if score is not None]
        x, y = [i for i, _ in points], [score for _, score in points]
        axes = figure.add_subplot(len(layers), 1, panel + 1)
        many = len(y) > 1000  # then smaller dots, and in the SVG one embedded image instead of thousands of elements
        axes.scatter(x, y, s=3 if many else 14, color=COLOURS[0], rasterized=many, label="score of an adapter")
        if grown := [i for i, row in enumerate(of_layer) if row["expanded"]]:
            lowest = [
                min((s for s in of_layer[i]["scores"] if s is not None), default=of_layer[i]["threshold"])
                for i in grown
            ]
            axes.scatter(grown, lowest, s=80, facecolors="none", edgecolors=COLOURS[1], zorder=4, label="expanded")
        limits = [row["threshold"] for row in of_layer]
        axes.step(
            range(len(of_layer)), limits, where="mid", color=COLOURS[2], linewidth=1.2, zorder=3, label="threshold"
        )
        if len(of_layer) == 1:  # a step of one point is invisible
            axes.axhline(limits[0], color=COLOURS[2], linewidth=1.2)
        style(axes, "detections (tasks above)" if panel + 1 == len(layers) else "", f"layer {layer}")
        log_scale_if_wide(axes, y)
        _task_marks(axes, [row["task"] for row in of_layer])
        if len(of_layer) <= 30:
            axes.set_xticks([])  # few: the task numbers above say it all
    legend_above(figure)
    return figure


def times(rows: Rows) -> Figure | None:
    """Seconds of each task, stacked by section in a fixed order and in fixed colours; None without profile rows."""
    profiles = [row for row in rows if row["kind"] == "profile"]
    if not profiles:
        return None
    figure = new_figure(3.6)
    axes = figure.add_subplot()
    places, base = [row["task"] for row in profiles], [0.0] * len(profiles)
    for name, colour in zip(stopwatch.SECTIONS, (*COLOURS, *MORE_COLOURS), strict=True):
        height = [row["seconds"][name] for row in profiles]
        if any(height):
            axes.bar(places, height, bottom=base, color=colour, width=0.8, label=name)
            base = [b + h for b, h in zip(base, height, strict=True)]
    tasks = max(places) + 1
    style(axes, "task", "seconds")
    task_ticks(axes, tasks)
    axes.set_xlim(-0.6, tasks - 0.4)
    axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)
    axes.set_axisbelow(True)
    legend_above(figure)
    return figure


def draw(results: Mapping[str, Any], rows: Rows) -> dict[str, Figure]:
    """Every picture there are data for, by file name without ending; what would be constant is left out."""
    figures: dict[str, Figure | None] = {
        "accuracy_matrix": accuracy_matrix(results),
        "accuracy_curve": curves(results),
        "loss": losses(rows),
        "adapters": adapters(results),
        "detection": detections(rows),
        "profile": times(rows),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def png(figure: Figure) -> bytes:
    """The picture on white, 150 dots an inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()


def inline_svg(figure: Figure, name: str) -> str:
    """The picture as an <svg> element that takes the page's text colour, links to nothing; its ids begin with `name`."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": name}
    ):  # text stays text; equal runs, equal file
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # HTML needs no name spaces, and they look like links
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    title = name.replace("_", " ")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
    return svg.replace(INK, "currentColor")
