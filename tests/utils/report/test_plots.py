"""The pictures of a run: which there are, what they show, and that no labels overlap."""

import io

import matplotlib
import pytest
from matplotlib.image import imread

from utils.report import plots, plots_nested


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


def with_selection(tasks, experts):
    """Results of a competition that expert t mod K wins in task t, with class statistics that lose a point a task."""
    history = []
    for t in range(tasks):
        accuracies = [100.0 - (k - t) % experts for k in range(experts)]
        facts = {"winner": t % experts, "accuracies": accuracies, "losses": [0.5] * experts, "margin": 1.0}
        history.append({"task": t, **facts, "split": "validation", "samples": 30})
    drift = [{"task": t, "stale": 90.0 - t, "recomputed": 90.0, "cosine": 0.9} for t in range(1, tasks)]
    return {**results(tasks), "selection_history": history, "head_drift": drift}


def merge_row(task, layer, level=1, merged=True, **other):
    row = {"kind": "consolidation", "task": task, "layer": layer, "level": level, "expert": 0, "merged": merged}
    row |= {"slow_norm": 1.0, "fast_norm": 2.0, "slow_output": 0.25, "fast_output": 0.75, "fast_share": 0.75}
    row |= {"cosine": 0.5}
    if merged:
        row |= {"error": 1e-9, "method": "concat", "alpha": 1.0, "rank": 8}
        row |= {"slow_norm_after": 3.0, "fast_norm_after": 1.5, "slow_output_after": 1.0, "fast_output_after": 0.0}
    return row | other


@pytest.mark.parametrize("tasks", [1, 5, 10, 20, 100])
def test_no_labels_overlap(tasks, overlaps):
    for name, figure in plots.draw(results(tasks), rows(tasks)).items():
        assert overlaps(figure) == [], name


@pytest.mark.parametrize("tasks", [2, 10, 25])
@pytest.mark.parametrize("experts", [2, 8])
def test_no_labels_overlap_with_slow_and_fast_adapters(tasks, experts, overlaps):
    merges = [merge_row(t, layer, slow_output=t * 10.0**-layer) for t in range(tasks) for layer in range(3)]
    figures = plots_nested.draw(with_selection(tasks, experts), merges)
    assert list(figures) == ["selection", "slow_and_fast", "head_drift"]
    for name, figure in figures.items():
        assert overlaps(figure) == [], name


def test_no_labels_overlap_at_the_largest_sizes(overlaps):
    figures = plots_nested.draw(with_selection(100, 64), [merge_row(t, n) for t in range(100) for n in range(5)])
    for name, figure in figures.items():
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


def test_named_terms_of_the_loss_have_a_panel_each():
    row = {
        "kind": "epoch",
        "task": 0,
        "phase": "func",
        "loss": 3.0,
        "lr": 0.1,
        "accuracy": 0.5,
        "images": 4,
        "seconds": 1.0,
    }
    epochs = [
        row | {"epoch": e, "loss": 3.0 + e, "task_loss": 2.0 + e, "z": 1.0 / e, "balance": 0.5} for e in (1, 2, 3)
    ]
    more = [{"kind": "epoch", "task": 0, "phase": "rd", "epoch": e, "loss": 1.0 / e} for e in (1, 2)]
    figure = plots.losses([*epochs, *more, {"kind": "epoch", "task": 0, "phase": "once", "epoch": 1, "loss": 1.0}])
    axes = figure.axes
    assert [a.get_ylabel() for a in axes] == [
        "func loss",
        "func task loss",
        "func z",
        "rd loss",
    ]  # no constant, no point
    assert list(axes[1].lines[0].get_ydata()) == [3.0, 4.0, 5.0]
    figure.canvas.draw()
    sizes = {tuple(round(float(edge), 3) for edge in a.get_position().size) for a in axes}
    assert len(sizes) == 1  # small multiples


def test_two_rounds_of_one_phase_in_one_task_are_not_joined():
    twice = [{"kind": "epoch", "task": 0, "phase": "func", "epoch": e, "loss": 1.0 + e} for e in (0, 1, 2, 0, 1, 2)]
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


def test_what_is_constant_is_not_drawn():
    constant = {
        **results(2),
        "accuracy_matrix": [[100.0], [100.0, 100.0]],
        "top1_curve": [100.0, 100.0],
        "top5_curve": [None, 100.0],
        "adapters_per_layer": [{"0": 1}, {"0": 1}],
    }
    assert (
        plots.draw(constant, [{"kind": "epoch", "task": t, "phase": "a", "epoch": 1, "loss": 1.0} for t in (0, 1)])
        == {}
    )
    equal = [{"task": 1, "stale": 90.0, "recomputed": 90.0, "cosine": 1.0}]
    flat = with_selection(2, 2)
    for entry in flat["selection_history"]:
        entry["accuracies"] = [100.0, 100.0]
    assert plots_nested.draw({**flat, "head_drift": equal}, []) == {}
    assert plots.varies([1.0, None, float("nan"), 1.0]) is False and plots.varies([1, 1], [1, 2]) is True


def test_tasks_have_the_names_of_their_classes_on_the_axis():
    named = results(2) | {"task_classes": [[1, 0], [2]], "class_names": ["$wren$", "great tit", "x" * 40]}
    axes = plots.accuracy_matrix(named).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        r"1: great tit, \$wren\$",
        "2: xxxxxxxxxxxxxxx...xx...",
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2"]


def test_layers_that_never_get_an_adapter_are_not_drawn():
    counts = [{"0": 0, "1": 0}, {"0": 0, "1": 2}]
    axes = plots.adapters({"adapters_per_layer": counts}).axes[0]
    assert [container.get_label() for container in axes.containers] == ["layer 1"]
    assert plots.adapters({"adapters_per_layer": [{"0": 0}]}) is None


def test_selection_rings_and_names_the_winner():
    figure = plots_nested.selection(with_selection(3, 4))
    axes = figure.axes[0]
    *experts, winners = axes.collections
    assert [round(y, 6) for _, y in experts[1].get_offsets()] == [99.0, 100.0, 97.0]
    assert winners.get_offsets().tolist() == [experts[t].get_offsets()[t].tolist() for t in range(3)]
    assert (
        len({x for dots in experts for x, _ in dots.get_offsets().tolist()}) == 12
    )  # equal ones do not hide each other
    assert [text.get_text() for text in axes.child_axes[0].get_xticklabels()] == ["0", "1", "2"]
    assert axes.get_ylabel() == "accuracy on validation data (%)"


def test_selections_of_other_kinds_are_not_drawn():
    made = with_selection(2, 2)
    first, second = made["selection_history"]
    assert plots_nested.is_competition(first)
    others = [{"winner": 0}, "text", None, second | {"layer": 3}, second | {"winner": 2}, second | {"winner": "a"}]
    others += [second | {"accuracies": [None, 1.0]}, {k: v for k, v in second.items() if k != "split"}]
    assert not any(map(plots_nested.is_competition, others))
    figure = plots_nested.selection({**made, "selection_history": [*others, first]})
    assert [len(dots.get_offsets()) for dots in figure.axes[0].collections] == [1, 1, 1]
    assert plots_nested.selection({**made, "selection_history": others}) is None


def test_slow_and_fast_shows_means_of_a_layers_adapters_and_breaks_where_there_are_none():
    merges = [
        merge_row(0, 4),
        merge_row(0, 4, adapter=1, fast_share=0.25, slow_output=0.75),
        merge_row(2, 4, merged=False, fast_share=None),
        merge_row(2, 5),
    ]
    left, right, other, _ = plots_nested.slow_and_fast(results(3), merges).axes
    assert (left.get_ylabel(), other.get_ylabel()) == ("layer 4", "layer 5")
    assert list(map(str, left.lines[0].get_ydata())) == ["50.0", "nan", "nan"]
    drawn = {line.get_label(): list(map(str, line.get_ydata())) for line in right.lines}
    assert drawn == {
        "slow": ["0.5", "nan", "0.25"],
        "fast": ["0.75", "nan", "0.75"],
        "slow after the merge": ["1.0", "nan", "nan"],
    }


def test_of_more_levels_the_fastest_pair_is_drawn():
    merges = [merge_row(0, 4, level=1, fast_share=0.1), merge_row(0, 4, level=2, fast_share=0.5)]
    assert list(plots_nested.slow_and_fast(results(1), merges).axes[0].lines[0].get_ydata()) == [50.0]


def test_head_drift_starts_at_the_second_task():
    lines = {line.get_label(): line for line in plots_nested.head_drift(with_selection(4, 2)).axes[0].lines}
    assert list(lines["stale"].get_xdata()) == [1, 2, 3] and list(lines["stale"].get_ydata()) == [89.0, 88.0, 87.0]
    assert list(lines["recomputed"].get_ydata()) == [90.0, 90.0, 90.0]


def test_results_without_such_fields_have_no_such_pictures():
    assert plots_nested.draw(results(3), rows(3)) == {}
    assert plots_nested.draw({**results(3), "head_drift": None, "selection_history": None}, []) == {}


def test_png_has_a_white_ground():
    image = imread(io.BytesIO(plots.png(plots.curves(results(3)))))
    assert image.shape[1] == 960 and (image[0, 0] == 1).all()


def test_inline_svg_links_to_nothing_and_takes_the_page_colour():
    svg = plots.inline_svg(plots.curves(results(3)), "accuracy_curve")
    assert svg.startswith("<svg ") and svg.rstrip().endswith("</svg>")
    assert "http" not in svg and plots.INK not in svg and "currentColor" in svg
    assert "top-1 average 85.00</text>" in svg
    assert svg == plots.inline_svg(plots.curves(results(3)), "accuracy_curve")  # equal runs, equal report


def test_global_state_of_matplotlib_stays():
    import matplotlib.pyplot as plt

    before, backend, figures = dict(matplotlib.rcParams), matplotlib.get_backend(), plt.get_fignums()
    for name, figure in plots.draw(results(3), rows(3)).items():
        plots.png(figure)
        plots.inline_svg(figure, name)
    assert dict(matplotlib.rcParams) == before and matplotlib.get_backend() == backend and plt.get_fignums() == figures
