"""The pictures of a run task by task: the numbers they show, what they leave out, and that no labels overlap."""

import pytest

from utils.report import plots_tasks


def results(tasks, peaks=True):
    curve = [100.0 - t for t in range(tasks)]
    return {
        "accuracy_matrix": [[100.0 - t + k for k in range(t + 1)] for t in range(tasks)],
        "top1_curve": curve,
        "task_oracle_curve": [a + t / 2 for t, a in enumerate(curve)],
        "wrong_task": [[t, 3 * t] for t in range(tasks)],
        "seconds": [{"train": 2.0 + t, "detect": 0.0, "evaluate": 0.5} for t in range(tasks)],
        "peak_memory_by_task": [2**20 * (t + 1) if peaks else None for t in range(tasks)],
    }


def heights(axes, container):
    return [bar.get_height() for bar in axes.containers[container]]


def test_the_bars_are_the_numbers():
    bars = plots_tasks.forgetting(results(3)).axes[0]
    assert heights(bars, 0) == [2, 1]  # task 1: 100, 99 and at last 98; task 2: 100 and at last 99
    above, below = plots_tasks.error_parts(results(3)).axes
    assert [heights(above, part) for part in range(3)] == [[100, 99, 98], [0, 0.5, 1], [0, 0.5, 1]]
    assert heights(below, 0) == [50, 50]  # after the first task there is no other to be taken for
    above, below = plots_tasks.cost(results(3)).axes
    assert [heights(above, part) for part in range(2)] == [[2, 3, 4], [0.5, 0.5, 0.5]]  # nothing was detected
    assert list(below.lines[0].get_ydata()) == [1, 2, 3]


def test_what_was_not_counted_is_left_out():
    assert list(plots_tasks.draw(results(1))) == []
    assert len(plots_tasks.cost(results(2, peaks=False)).axes) == 1
    older = {**results(2), "task_oracle_accuracy": 99.0}
    del older["task_oracle_curve"], older["wrong_task"]
    assert plots_tasks.error_parts(older) is None  # the last task alone
    nothing = {**results(2), "seconds": [{"train": 0.0}] * 2, "accuracy_matrix": [[None], [None, None]]}
    assert list(plots_tasks.draw(nothing)) == ["errors"]


@pytest.mark.parametrize("tasks", [2, 5, 25, 100])
def test_no_labels_overlap(tasks, overlaps):
    for name, figure in plots_tasks.draw(results(tasks)).items():
        assert overlaps(figure) == [], name
