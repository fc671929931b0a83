"""What errors are made of, on tables worked by hand."""

import pytest

from tests.helpers.toy import learn_and_score, toy_stream
from utils.evaluation import error_parts
from utils.run.record import RunRecord, results_json


def test_wrong_tasks_are_counted_by_side():
    assert error_parts.wrong_task([[5, 2, 1], [4, 3, 0], [1, 6, 2]]) == (4 + 1 + 6, 2 + 1 + 0)
    assert error_parts.wrong_task([[5]]) == (0, 0)


@pytest.mark.parametrize(
    ("counts", "bias"), [((0, 4), 100.0), ((4, 0), -100.0), ((2, 2), 0.0), ((1, 3), 50.0), ((0, 0), None)]
)
def test_head_bias(counts, bias):
    assert error_parts.head_bias(*counts) == bias


def test_the_parts_add_up():
    split = error_parts.split(62.5, 87.5, [3, 1])
    assert split == error_parts.Split(accuracy=62.5, known=87.5, confusion=25.0, within=12.5, bias=-50.0)
    assert split.accuracy + split.confusion + split.within == 100
    assert error_parts.split(None, None, [0, 0]) == error_parts.Split(None, None, None, None, None)
    assert error_parts.split(50.0, None, None) == error_parts.Split(50.0, None, None, None, None)


def test_results_of_an_older_version_have_the_last_task_alone():
    older = {"top1_curve": [90.0, 60.0], "task_oracle_accuracy": 80.0}
    assert error_parts.splits(older) == [
        error_parts.Split(90.0, None, None, None, None),
        error_parts.Split(60.0, 80.0, 20.0, 20.0, None),
    ]
    assert error_parts.splits({"top1_curve": [], "task_oracle_accuracy": None}) == []


def test_a_run_records_counts_that_fit_its_accuracies(toy_learner):
    learner, stream = toy_learner("finetune"), toy_stream()
    record = RunRecord("finetune", "toy", 1, stream.order, [[0, 1], [2, 3], [4, 5]])
    for task in range(3):
        learn_and_score(learner, stream, task, record)
    results = results_json(record)
    matrix = results["task_confusion"]
    assert [sum(row) for row in matrix] == record.samples and len(matrix) == 3
    assert results["wrong_task"][0] == [0, 0] and results["wrong_task"][2] == list(error_parts.wrong_task(matrix))
    own = sum(matrix[k][k] for k in range(3))
    # finetune takes all for the newest classes: its errors between tasks lean that way
    assert sum(record.correct[-1]) <= own < sum(record.samples)
    assert error_parts.splits(results)[-1].bias > 0
    assert results["task_oracle_curve"][-1] == results["task_oracle_accuracy"] >= results["last_accuracy"]
