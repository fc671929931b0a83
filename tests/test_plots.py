"""The pictures of a run: which there are, what they show, and that no labels overlap."""

import io

import matplotlib
import pytest
from matplotlib.image import imread
from matplotlib.text import Text

from utils import plots


def results(tasks, layers=3):
    counts = [{str(layer): 1 + t // 2 for layer in range(layers)} for t in range(tasks)]
    return {
        "accuracy_matrix": [[90.0 - t + k for k in range(t + 1)] for t in range(tasks)],
        "top1_curve": [90.0 - t for t in range(tasks)],
        "top5_curve": [None if t < 2 else 95.0 for t in range(tasks)],
        "average_accuracy": 85.0,
        "adapters_per_layer": counts,
    }


def rows(tasks, epochs=3, layers=3):
    made = []
    for task in range(tasks):
        for layer in range(layers if task else 0):
            made.append(
                {"kind": "detect", "task": task, "layer": layer, "scores": [1.5, 0.5 + task], "threshold": 1.0,
                 "expanded": task % 2 == 1}
            )  # fmt: skip
        for phase in ("func", "rd"):
            for epoch in range(epochs):
                made.append({"kind": "epoch", "task": task, "phase": phase, "epoch": epoch, "loss": 2.0 / (epoch + 1)})
    return made


@pytest.fixture
def overlaps(monkeypatch):
    """Function: the pairs of texts that a figure really draws (no ticks beyond the axes) and whose boxes intersect."""
    drawn, draw = [], Text.draw

    def record(self, renderer):
        if self.get_visible() and self.get_text().strip():
            drawn.append((self.get_text(), self.get_window_extent(renderer).padded(-1)))
        draw(self, renderer)

    monkeypatch.setattr(Text, "draw", record)

    def find(figure):
        drawn.clear()
        plots.png(figure)
        assert drawn
        return [
            (a, b)
            for i, (a, x) in enumerate(drawn)
            for b, y in drawn[i + 1 :]
            if x.overlaps(y) and (a, x.bounds) != (b, y.bounds)
        ]

    return find


@pytest.mark.parametrize("tasks", [1, 5, 10, 20, 100])
def test_no_labels_overlap(tasks, overlaps):
    for name, figure in plots.draw(results(tasks), rows(tasks)).items():
        assert overlaps(figure) == [], name


def test_what_is_drawn_follows_the_data():
    assert list(plots.draw(results(3), rows(3))) == [
        "accuracy_matrix",
        "accuracy_curve",
        "loss",
        "adapters",
        "detection",
    ]
    assert list(plots.draw({**results(3), "adapters_per_layer": [{}, {}, {}]}, [])) == [
        "accuracy_matrix",
        "accuracy_curve",
    ]
    nothing = {**results(0), "average_accuracy": None}
    assert plots.draw(nothing, []) == {}


def test_matrix_shows_every_number_and_leaves_gaps():
    made = results(3)
    made["accuracy_matrix"][2][0] = None
    axes = plots.accuracy_matrix(made).axes[0]
    cells = {(int(x), int(y)): text.get_text() for text in axes.texts for x, y in [text.get_position()]}
    assert cells == {(0, 0): "90.0", (0, 1): "89.0", (1, 1): "90.0", (1, 2): "89.0", (2, 2): "90.0"}  # (task, after)


def test_loss_has_a_panel_a_phase_and_a_line_a_round():
    axes = plots.losses(rows(4)).axes
    assert [a.get_ylabel() for a in axes] == ["func loss", "rd loss"]
    lines = [line for line in axes[0].lines if len(line.get_ydata()) == 3]
    assert [list(line.get_xdata()) for line in lines] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert all(list(line.get_ydata()) == [2.0, 1.0, 2.0 / 3] for line in lines)


def test_two_rounds_of_one_phase_in_one_task_are_not_joined():
    twice = [{"kind": "epoch", "task": 0, "phase": "func", "epoch": e, "loss": 1.0} for e in (0, 1, 2, 0, 1, 2)]
    assert [len(line.get_ydata()) for line in plots.losses(twice).axes[0].lines] == [3, 3]


def test_detection_marks_the_expanded_ones():
    axes = plots.detections(rows(4, layers=2)).axes
    assert [a.get_ylabel() for a in axes] == ["layer 0", "layer 1"]
    scores, expanded = axes[0].collections
    assert scores.get_offsets().tolist() == [[0, 1.5], [0, 1.5], [1, 1.5], [1, 2.5], [2, 1.5], [2, 3.5]]
    assert expanded.get_offsets().tolist() == [[0, 1.5], [2, 1.5]]


def test_scores_without_a_number_are_left_out_of_the_picture():
    event = {"kind": "detect", "task": 1, "scan": 0, "layer": 2, "threshold": 2.0, "expanded": True}
    axes = plots.detections([event | {"scores": [None, 3.0]}, event | {"scores": [None]}]).axes[0]
    scores, expanded = axes.collections
    assert scores.get_offsets().tolist() == [[0, 3.0]]
    assert expanded.get_offsets().tolist() == [[0, 3.0], [1, 2.0]]  # without a score, on the threshold


def test_adapters_stack_to_the_total():
    axes = plots.adapters(results(4, layers=12)).axes[0]
    tops = [bar.get_y() + bar.get_height() for bar in axes.containers[-1]]
    assert tops == [12, 12, 24, 24]


def test_layers_that_never_get_an_adapter_are_not_drawn():
    counts = [{"0": 0, "1": 0}, {"0": 0, "1": 2}]
    axes = plots.adapters({"adapters_per_layer": counts}).axes[0]
    assert [container.get_label() for container in axes.containers] == ["layer 1"]
    assert plots.adapters({"adapters_per_layer": [{"0": 0}]}) is None


def test_png_has_a_white_ground():
    image = imread(io.BytesIO(plots.png(plots.curves(results(3)))))
    assert image.shape[1] == 1080 and (image[0, 0] == 1).all()


def test_inline_svg_links_to_nothing_and_takes_the_page_colour():
    svg = plots.inline_svg(plots.curves(results(3)), "accuracy_curve")
    assert svg.startswith("<svg ") and svg.rstrip().endswith("</svg>")
    assert "http" not in svg and plots.INK not in svg and "currentColor" in svg
    assert "top-1 average 85.00</text>" in svg
    assert svg == plots.inline_svg(plots.curves(results(3)), "accuracy_curve")  # equal runs, equal report


def test_global_state_of_matplotlib_stays():
    import matplotlib.pyplot as plt

    before, backend = dict(matplotlib.rcParams), matplotlib.get_backend()
    for name, figure in plots.draw(results(3), rows(3)).items():
        plots.png(figure)
        plots.inline_svg(figure, name)
    assert dict(matplotlib.rcParams) == before and matplotlib.get_backend() == backend and plt.get_fignums() == []
