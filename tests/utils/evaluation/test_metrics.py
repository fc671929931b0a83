"""Metrics against tables worked by hand, and their edge cases."""

import math

import numpy as np
import pytest

from utils.evaluation import metrics as m

# Three tasks of 10, 30 and 10 test samples.
CORRECT = [[10], [8, 24], [5, 27, 7]]
SAMPLES = [10, 30, 10]
MATRIX = [[1.0], [0.8, 0.8], [0.5, 0.9, 0.7]]


def test_hand_worked_table():
    assert m.accuracy_rows(CORRECT, SAMPLES) == MATRIX
    curve = m.top1_curve(CORRECT, SAMPLES)
    assert curve == [1.0, 32 / 40, 39 / 50]  # weighted: the mean of the last row would be .7, not .78
    assert m.last_accuracy(curve) == 0.78
    assert m.average_accuracy(curve) == pytest.approx((1 + 0.8 + 0.78) / 3, abs=1e-15)
    assert m.final_task_mean(MATRIX) == pytest.approx((0.5 + 0.9 + 0.7) / 3, abs=1e-15)
    # task 0: best earlier 1.0, now .5; task 1: best earlier .8, now .9 (negative: it improved)
    assert m.forgetting(MATRIX) == pytest.approx((0.5 - 0.1) / 2, abs=1e-15)
    assert m.backward_transfer(MATRIX) == pytest.approx((-0.5 + 0.1) / 2, abs=1e-15)


def test_forgetting_takes_the_best_earlier_row_not_the_diagonal():
    matrix = [[0.5], [0.9, 0.6], [0.7, 0.6, 1.0]]
    assert m.forgetting(matrix) == pytest.approx((0.2 + 0.0) / 2, abs=1e-15)
    assert m.backward_transfer(matrix) == pytest.approx((0.2 + 0.0) / 2, abs=1e-15)


def test_full_matrix_with_nan_equals_the_ragged_one():
    full = np.full((3, 3), np.nan)
    for t, row in enumerate(MATRIX):
        full[t, : t + 1] = row
    for function in (m.final_task_mean, m.forgetting, m.backward_transfer):
        assert function(full) == function(MATRIX)


def test_forgetting_by_task_are_the_terms_of_the_mean():
    assert m.forgetting_by_task(MATRIX) == pytest.approx([0.5, -0.1], abs=1e-15)
    assert m.forgetting_by_task([[0.4]]) == [] == m.forgetting_by_task([])
    assert m.forgetting_by_task([[None], [0.5, 0.75], [0.25, 0.5, 1.0]]) == [0.25, 0.25]


def test_one_task_has_nothing_to_forget():
    assert m.forgetting([[0.4]]) is None
    assert m.backward_transfer([[0.4]]) is None
    assert m.final_task_mean([[0.4]]) == 0.4
    assert m.top1_curve([[2]], [5]) == [0.4]


def test_nothing_at_all():
    assert m.top1_curve([], []) == []
    assert m.last_accuracy([]) is None and m.average_accuracy([]) is None
    assert m.final_task_mean([]) is None and m.forgetting([]) is None and m.backward_transfer([]) is None


def test_a_task_without_test_samples_is_left_out():
    correct, samples = [[0], [0, 3], [0, 2, 4]], [0, 4, 4]
    matrix = m.accuracy_rows(correct, samples)
    assert matrix == [[None], [None, 0.75], [None, 0.5, 1.0]]
    assert m.top1_curve(correct, samples) == [None, 0.75, 6 / 8]
    assert m.average_accuracy([None, 0.75, 0.75]) == 0.75
    assert m.final_task_mean(matrix) == 0.75
    assert m.forgetting(matrix) == 0.25
    assert m.backward_transfer(matrix) == -0.25


def test_curve_refuses_a_short_row():
    with pytest.raises(ValueError, match="row 1 needs counts for 2 tasks"):
        m.top1_curve([[1], [1]], [2, 2])


def test_summary_over_seeds():
    assert m.summarise([1.0, 2.0, 4.0, 5.0]) == m.Summary(3.0, math.sqrt(10 / 3), 4)
    assert m.summarise([0.7]) == m.Summary(0.7, None, 1)
    assert m.summarise([0.5, None]) == m.Summary(0.5, None, 1)
    assert m.summarise([]) == m.Summary(None, None, 0)


SCORES = np.array(
    [
        [9.0, 1.0, 5.0, 4.0, 3.0],  # class 0: right
        [9.0, 1.0, 5.0, 4.0, 3.0],  # class 1: last of five, and second of its own task {0, 1}
        [9.0, 1.0, 5.0, 4.0, 3.0],  # class 2: second of five, right within its task {2, 3, 4}
        [0.0, 0.0, 0.0, 0.0, 0.0],  # class 3: ties go to the lower class, so fourth, and second within its task
    ]
)
LABELS = np.array([0, 1, 2, 3])
TASKS = [[0, 1], [2, 3, 4]]


def test_score_agrees_with_sorting():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(200, 12)), rng.integers(0, 12, 200)
    order = np.argsort(-scores, axis=1)
    score = m.score(scores, labels, [range(12)])
    assert score.correct == score.correct_oracle == (order[:, 0] == labels).sum()
    assert score.correct_top5 == (order[:, :5] == labels[:, None]).any(axis=1).sum()


def test_correct_with_the_task_known():
    assert m.score(SCORES, LABELS, TASKS).correct_oracle == 2
    assert m.score(SCORES, LABELS, [[1, 0], [4, 2, 3]]).correct_oracle == 2  # the order inside a task has no effect
    assert m.score(SCORES, LABELS, [[0], [1], [2], [3], [4]]).correct_oracle == 4  # tasks of one class
    with pytest.raises(ValueError, match="class 3 belongs to none of the 2 tasks"):
        m.score(SCORES, LABELS, [[0, 1], [2]])


def test_one_class_and_no_samples():
    assert m.score(np.zeros((0, 5)), np.zeros(0, dtype=int), TASKS) == m.Score(0, 0, 0, 0, (0, 0))
    assert m.score([[0.3]], [0], [[0]]) == m.Score(1, 1, None, 1, (1,))


def test_score_counts_and_takes_tensors():
    torch = pytest.importorskip("torch")
    expected = m.Score(samples=4, correct=1, correct_top5=4, correct_oracle=2, predicted=(4, 0))
    assert m.score(SCORES, LABELS, TASKS) == expected
    assert m.score(torch.tensor(SCORES, requires_grad=True), torch.tensor(LABELS), TASKS) == expected


def test_predicted_tasks_follow_the_best_score_as_the_ranks_do():
    table = [[1.0, 5.0, 2.0], [1.0, 2.0, 5.0], [3.0, 3.0, 3.0], [0.0, np.nan, 9.0], [9.0, np.nan, np.nan]]
    score = m.score(table, [1, 2, 0, 0, 0], [[0], [1, 2]])
    assert score.predicted == (1, 4) and score.correct == 3  # a tie goes to the lower class, a NaN stands above all
    assert m.score(np.zeros((0, 0)), np.zeros(0, dtype=int), [[0], [1]]).predicted == (0, 0)
    rng = np.random.default_rng(1)
    table, truth = rng.normal(size=(300, 6)), rng.integers(0, 2, 300)
    owner = np.array([0, 0, 1, 1, 2, 2])[table.argmax(axis=1)]
    assert m.score(table, truth, [[0, 1], [2, 3], [4, 5]]).predicted == tuple(np.bincount(owner, minlength=3))


def test_nan_scores_are_never_right_and_masked_scores_are_fine():
    nan, inf = np.nan, np.inf
    for scores, right in (([nan, nan], 0), ([1.0, nan], 0), ([1.0, -inf], 1)):
        assert m.score([scores], [0], [[0, 1]]).correct == right


def test_scores_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"scores must be \[N, C\]"):
        m.score([1.0, 2.0], [0, 1], [[0, 1]])


def test_top5_counts_the_fifth_place_and_not_the_sixth():
    scores = np.arange(7.0, 0.0, -1.0)[None].repeat(2, axis=0)  # class k has place k + 1
    assert m.score(scores, [4, 5], [range(7)]).correct_top5 == 1
