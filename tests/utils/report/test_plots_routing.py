"""Pictures of routing: what they show, at all sizes without overlapping labels, and their place in the report."""

import html

import numpy as np
import pytest
from matplotlib.colors import to_rgba

from utils.evaluation import routing
from utils.evaluation.metrics import Score
from utils.report import page, plots, plots_routing
from utils.run.record import RunRecord, results_json

NAMES = ["routing_heatmap", "routing_over_time", "routing_drift", "routing_controls"]


def run_rows(tasks=3, per_task=2, layers=2, experts=2, grows=False, seed=0):
    """(results, rows) of a run with random gates; `grows`: one expert more from the second task on."""
    rng, rows = np.random.default_rng(seed), []
    for task in range(tasks):
        count = experts + (grows and task > 0)
        for epoch in (1, 2):
            for layer in range(layers):
                gate = rng.dirichlet(np.ones(count)).tolist()
                rows.append({"kind": "experts", "task": task, "phase": "func", "epoch": epoch, "layer": layer,
                             "gate": gate, "token_entropy": 0.5})  # fmt: skip
        gates = rng.dirichlet(np.full(count, 0.3), ((task + 1) * per_task, layers)).round(4).tolist()
        row = {
            "kind": "gates",
            "task": task,
            "experts": list(range(count)),
            "layers": list(range(layers)),
            "gate": gates,
        }
        row["samples"] = [4] * len(gates)
        if task:
            rows.append({"kind": "routing_drift", "task": task, **routing.drift(rows_of(rows, "gates")[-1], row, {})})
        rows.append(row)
    single = rng.uniform(0.3, 1, (count, tasks)).round(2).tolist()
    accuracy = {kind: rng.uniform(0.3, 1, tasks).round(2).tolist() for kind in ("learned", "uniform", "random", "own")}
    accuracy["oracle"] = np.max(single, axis=0).tolist()
    rows.append({"kind": "routing_controls", "task": tasks - 1, "experts": list(range(count)), "samples": [8] * tasks,
                 "accuracy": accuracy, "single": single, "oracle": [0] * tasks})  # fmt: skip
    classes = [[t * per_task + c for c in range(per_task)] for t in range(tasks)]
    return {"task_classes": classes}, rows


def rows_of(rows, kind):
    return [row for row in rows if row["kind"] == kind]


SIZES = [(1, 2, 1, 1), (2, 1, 2, 4), (5, 2, 3, 4), (20, 5, 4, 16)]  # tasks, classes of each, layers, experts


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_no_labels_overlap(sizes, overlaps):
    figures = plots_routing.draw(*run_rows(*sizes))
    assert list(figures) == NAMES
    for name, figure in figures.items():
        assert overlaps(figure) == [], name


def test_large_pictures_stay_small_in_the_report():
    for name, figure in plots_routing.draw(*run_rows(20, 5, 3, 16)).items():
        assert len(plots.inline_svg(figure, name)) < 350_000, name


def test_the_heat_map_shows_the_means_of_each_tasks_classes_after_the_last_task():
    results, rows = run_rows(tasks=3, per_task=2, layers=2, experts=2)
    figure = plots_routing.heat_map(results, rows)
    gates = np.array(rows_of(rows, "gates")[-1]["gate"])  # [C, L, E]
    for layer, axes in enumerate(figure.axes[:2]):
        assert axes.get_title(loc="left") == f"layer {layer}"
        shown = axes.collections[0].get_array()  # [E, T]
        expected = np.stack([gates[2 * t : 2 * t + 2, layer].mean(axis=0) for t in range(3)], axis=1)
        np.testing.assert_allclose(shown, expected)


def test_entropy_and_utilisation_follow_the_epochs_and_experts_keep_their_colours():
    _, rows = run_rows(tasks=2, layers=1, experts=1, grows=True)
    rows_of(rows, "experts")[-1]["gate"] = [0.1, 0.3]  # of a top-1 router: parts 0.25 and 0.75
    top, panel = plots_routing.over_time(rows).axes
    assert list(top.lines[0].get_ydata()) == [0.5] * 4
    undecided = top.patches[0].get_data().values
    np.testing.assert_allclose(undecided, [0, 0, np.log(2), np.log(2)])
    first, second = (patch.get_data() for patch in panel.patches)
    assert first.values[:2].tolist() == [1, 1] and first.values[3] == pytest.approx(0.25)
    assert (second.values - second.baseline)[:2].tolist() == [0, 0] and second.values[3] == pytest.approx(1)


def test_merged_experts_leave_their_place_to_nobody():
    row = {"kind": "experts", "layer": 0, "token_entropy": 0.1, "epoch": 1, "phase": "func"}
    gates = {"kind": "gates", "layers": [0], "gate": [[[0.4, 0.6]]], "samples": [4]}
    rows = [row | {"task": 0, "gate": [0.5, 0.5]}, gates | {"task": 0, "experts": [0, 1]},
            row | {"task": 1, "gate": [0.1, 0.2, 0.7]}, gates | {"task": 1, "experts": [1, 2]},
            row | {"task": 2, "gate": [0.4, 0.6]}, gates | {"task": 2, "experts": [1, 2]}]  # fmt: skip
    stacks = [patch.get_data() for patch in plots_routing.over_time(rows).axes[1].patches]
    parts = np.array([stack.values - stack.baseline for stack in stacks])
    np.testing.assert_allclose(parts, [[0.5, 0.1, 0], [0.5, 0.2, 0.4], [0, 0.7, 0.6]], atol=1e-12)


def test_drift_colours_each_class_by_its_expert_and_greys_what_is_undecided():
    rows = [
        {"kind": "gates", "task": 0, "layers": [3], "experts": [0, 1], "gate": [[[0.9, 0.1]], [[0.5, 0.5]]]},
        {"kind": "gates", "task": 1, "layers": [3], "experts": [1, 2],
         "gate": [[[0.2, 0.8]], [[0.8, 0.2]], [[0.48, 0.52]]]},
    ]  # fmt: skip
    for row in rows:
        row["samples"] = [4] * len(row["gate"])
    rows.insert(1, {"kind": "routing_drift", "task": 1, **routing.drift(*rows, {0: 1})})
    top, panel = plots_routing.drift({"task_classes": [[0, 1], [2]]}, rows).axes
    cells = panel.images[0].get_array()
    blue, red, green = (to_rgba(colour) for colour in plots.COLOURS[:3])
    nobody, empty = plots_routing.NOBODY, (0, 0, 0, 0)
    expected = [[blue, green], [nobody, red], [empty, nobody]]
    np.testing.assert_allclose(cells, expected)
    assert [text.get_text() for text in panel.texts] == ["0", "2", "1"]
    assert list(top.lines[0].get_xdata()) == [1] and [line.get_label() for line in top.lines] == [
        "layer 3",
        "expert added",
    ]


def test_one_task_has_no_drift_but_its_servers():
    results, rows = run_rows(tasks=1)
    assert [axes.get_title(loc="left") for axes in plots_routing.drift(results, rows).axes] == ["layer 0", "layer 1"]


def test_controls_show_overall_and_by_task():
    _, rows = run_rows(tasks=2, experts=2)
    row = rows_of(rows, "routing_controls")[0] | {"samples": [1, 3]}
    bars, heat = plots_routing.controls([row]).axes[:2]
    names = [label.get_text() for label in bars.get_yticklabels()]
    assert names == [
        "learned",
        "uniform",
        "random",
        "only expert 0",
        "only expert 1",
        "each task's expert",
        "oracle expert",
    ]
    a, b = row["accuracy"]["learned"]
    assert bars.patches[0].get_width() == pytest.approx(25 * a + 75 * b)
    shown = heat.collections[0].get_array()
    np.testing.assert_allclose(shown[[0, 3, 6]], 100 * np.array([[a, b], row["single"][0], row["accuracy"]["oracle"]]))


def test_of_many_experts_the_best_have_bars():
    _, rows = run_rows(tasks=2, experts=20)
    axes = plots_routing.controls(rows).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    means = np.array(rows_of(rows, "routing_controls")[0]["single"]).mean(axis=1)
    best = sorted(np.argsort(-means)[:16])
    assert (
        names[3:-2] == [f"only expert {e}" for e in best] and axes.get_title(loc="left") == "the 16 best of 20 experts"
    )


def test_without_routing_there_are_no_pictures():
    assert plots_routing.draw({"task_classes": [[0]]}, [{"kind": "epoch", "task": 0}]) == {}


def test_the_report_has_pictures_captions_and_numbers(tmp_path):
    facts, rows = run_rows(tasks=2)
    record = RunRecord("sparse_moe", "toy", 1, [0, 1, 2, 3], facts["task_classes"])
    for task in range(2):
        more = {"trainable_parameters": 1, "total_parameters": 2, "seconds": {"train": 1.0}, "images": 8}
        record.add_task([Score(8, 4, None, 8)] * (task + 1), adapters_per_layer={0: 1}, **more)
    path = page.write_report(tmp_path, results_json(record), {}, {}, rows=rows)
    text = path.read_text(encoding="utf-8")
    for name in NAMES:
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        heading, caption = page.FIGURES[name]
        assert f"<h2>{heading}</h2>" in text and caption in html.unescape(text)
    control = rows_of(rows, "routing_controls")[0]
    cells = "".join(f"<td>{100 * accuracy:.2f}</td>" for accuracy in control["accuracy"]["uniform"])
    assert f"<td>uniform</td><td>{50 * sum(control['accuracy']['uniform']):.2f}</td>{cells}" in text
    move = rows_of(rows, "routing_drift")[0]
    assert f"<td>{move['mean'][1]:.3f}, {move['changed'][1]} of 2</td>" in text
