"""Classes are shown by name wherever they appear, shortened and escaped; without names by number."""

import numpy as np

from tests.helpers.toy import toy_dataset, toy_stream
from utils.evaluation.metrics import Score
from utils.report import class_names, tables
from utils.report.console import task_table
from utils.report.plots_routing import drift
from utils.run.record import RunRecord, results_json

NAMES = ["great tit", "\u202ewren", "a" * 20 + "b" * 20, "$x_{", "  old\nowl"]


def birds():
    record = RunRecord("sema", "folder", 7, [4, 0, 1, 3, 2], [[4, 0], [1, 3, 2]])
    where = {"adapters_per_layer": {0: 1}, "trainable_parameters": 1, "total_parameters": 2, "seconds": {}, "images": 1}
    record.add_task([Score(10, 9, None, 10, (10,))], **where)
    record.add_task([Score(10, 8, 10, 9, (9, 1)), Score(30, 24, 29, 27, (4, 26))], **where)
    return record


def test_labels_are_short_and_print_on_one_line():
    shown = ["great tit", "\\u202ewren", "aaaaaaaaaaaaaaa...bbbbbb", "$x_{", "old\\nowl"]
    assert class_names.labels(NAMES, 5) == shown and not class_names.are_numbers(shown)
    for names in (None, ["a"], ["0", "1", "2", "3", "4"]):
        assert class_names.are_numbers(class_names.labels(names, 5))
    assert class_names.labels([" ", "b"], 2) == ["0", "b"]
    assert class_names.listed([1, 0], ["x", "y"]) == "y, x"
    assert class_names.listed(range(12), [str(c) for c in range(12)], most=2) == "0, 1 and 10 more"


def test_a_stream_has_the_names_in_both_orders():
    stream = toy_stream(toy_dataset(classes=6))
    assert stream.original_names() == [f"class {c}" for c in range(6)]
    assert stream.class_names == [f"class {c}" for c in stream.order]


def test_results_console_and_report_have_the_names():
    results = results_json(birds(), NAMES)
    assert results["class_names"] == NAMES and "class_names" not in results_json(birds())
    lines = task_table(birds(), NAMES).splitlines()
    assert lines[1] == "  classes   \\u202ewren, $x_{, aaaaaaaaaaaaaaa...bbbbbb"
    assert lines[:1] + lines[2:] == task_table(birds()).splitlines() == task_table(birds(), list("01234")).splitlines()
    (table,) = tables.task_rows(results)
    assert table.head[-1] == "names" and table.rows[0][-1] == "old\\nowl, great tit"
    (table,) = tables.task_rows(results_json(birds(), list("01234")))
    assert "names" not in table.head and {len(row) for row in table.rows} == {len(table.head)}


def test_the_axis_of_classes_has_names_that_matplotlib_does_not_interpret():
    gates = {"kind": "gates", "layers": [3, 4], "experts": [0], "samples": [1] * 5, "gate": [[[1.0], [1.0]]] * 5}
    rows = [{**gates, "task": 0, "samples": [1, 1], "gate": [[[1.0], [1.0]]] * 2}, {**gates, "task": 1}]
    figure = drift(results_json(birds(), NAMES), rows)
    left, right = figure.axes[:2]
    assert [label.get_text() for label in left.get_yticklabels()][:2] == ["old\\nowl", "great tit"]
    assert r"\$x_{" in [label.get_text() for label in left.get_yticklabels()] and not len(right.get_yticks())
    figure.canvas.draw()
    figure = drift(results_json(birds()), rows)
    assert np.allclose(figure.axes[0].get_yticks(), [0.5, 3.0])
