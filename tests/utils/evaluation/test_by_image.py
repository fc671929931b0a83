"""Measures by class and image against hand-worked tables, scikit-learn and scipy."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix

from utils.evaluation import by_image, calibration, metrics
from utils.evaluation.intervals import wilson

NAN, INF = float("nan"), float("inf")


def collected(*tasks):
    images = by_image.ByImage()
    for scores, labels in tasks:
        images.add(torch.tensor(scores), torch.tensor(labels))
    return images


def test_classes_pairs_and_mistakes_of_two_tasks():
    first = ([[3.0, 1, 0], [0, 2, 1], [0, 0.5, 4]], [0, 0, 1])  # right; 0 taken for 1; 1 taken for 2
    second = ([[0.0, 0, 1], [0, 5, 1], [1, 1, 0]], [2, 2, 2])  # right; 2 taken for 1; a tie goes to class 0
    counts = collected(first, second).summary([np.array([10, 11, 12]), np.array([4, 5, 6])], 3, True)
    assert counts["images"] == [2, 1, 3] and counts["correct"] == [1, 0, 1]
    assert counts["pairs"] == [[0, 1, 1], [1, 2, 1], [2, 0, 1], [2, 1, 1]] and counts["pairs_beyond"] == 0
    assert counts["mistakes"] == [[5, 2, 1, 4.0], [12, 1, 2, 3.5], [11, 0, 1, 2.0], [6, 2, 0, 1.0]]
    assert sum(counts["bins"]["images"]) == 6 and sum(counts["bins"]["correct"]) == 2


def test_what_is_stored_is_bounded(monkeypatch):
    monkeypatch.setattr(by_image, "MOST_PAIRS", 1)
    monkeypatch.setattr(by_image, "MOST_MISTAKES", 2)
    scores = [[0.0, 1, 0], [0, 2, 0], [0, 0, 3], [0, 1, 0]]
    counts = collected((scores, [0, 0, 0, 2])).summary([np.arange(4)], 3, False)
    assert counts["pairs"] == [[0, 1, 2]] and counts["pairs_beyond"] == 2
    assert counts["mistakes"] == [[2, 0, 2, 3.0], [1, 0, 1, 2.0]] and counts["bins"] is None


def test_scores_that_are_no_numbers_name_no_class_and_are_the_worst_mistakes():
    scores = [[0.0, NAN], [NAN, 9], [1, INF], [0, 2]]
    counts = collected((scores, [0, 0, 0, 0])).summary([np.arange(4)], 2, True)
    assert counts["mistakes"] == [[0, 0, -1, None], [1, 0, -1, None], [2, 0, 1, None], [3, 0, 1, 2.0]]
    assert counts["correct"] == [0, 0] and counts["pairs"] == [[0, -1, 2], [0, 1, 2]]


def test_right_and_wrong_are_those_of_the_metrics():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 3, (300, 7)).astype(float)  # many ties
    scores[rng.random((300, 7)) < 0.02] = NAN
    labels = rng.integers(0, 7, 300)
    got = by_image.outcomes(torch.tensor(scores), torch.tensor(labels))
    assert (got.predicted == labels).sum() == metrics.score(scores, labels, [range(7)]).correct
    empty = by_image.outcomes(torch.empty(0, 7), torch.empty(0), store=True)
    assert len(empty.labels) == 0 and empty.scores.shape == (0, 7)


def test_pairs_are_those_of_scikit_learn():
    rng = np.random.default_rng(1)
    truth, predicted = rng.integers(0, 9, 400), rng.integers(0, 9, 400)
    table = confusion_matrix(truth, predicted)
    np.fill_diagonal(table, 0)
    pairs = by_image.confused_pairs(truth, predicted)
    assert {(a, b): n for a, b, n in pairs} == {(a, b): table[a, b] for a, b in np.argwhere(table).tolist()}
    assert [n for *_, n in pairs] == sorted(table[table > 0].tolist(), reverse=True)


# ---------------------------------------------------------------- calibration


def test_confidences_are_softmax_probabilities():
    scores = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 30
    expected = scores.softmax(dim=1).max(dim=1).values.numpy()
    np.testing.assert_allclose(calibration.confidences(scores.numpy()), expected, rtol=1e-12)
    assert calibration.confidences(np.array([[0.0, NAN]])).tolist() == [0.0]


def test_error_of_calibration_worked_by_hand():
    confidence, right = np.array([0.95, 0.97, 0.6, 0.5, 0.05]), np.array([True, False, True, False, False])
    counts = calibration.bins(confidence, right)
    # bins of a width of 1/15: 0.95 and 0.97 in the last, 0.6 = 9/15 in (8/15, 9/15], 0.5 in (7/15, 8/15], 0.05 in the first
    assert counts["images"] == [1, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 2]
    assert counts["correct"] == [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1]
    expected = (abs(1.92 - 1) + abs(0.6 - 1) + 0.5 + 0.05) / 5
    assert calibration.error(counts) == pytest.approx(expected, abs=1e-12)
    entry = calibration.in_percent(counts)
    assert entry["ece"] == pytest.approx(100 * expected) and entry["accuracy"][14] == 50.0
    assert entry["confidence"][14] == pytest.approx(96.0) and entry["accuracy"][1] is None


def test_the_error_equals_a_slow_loop_over_bins():
    rng = np.random.default_rng(2)
    confidence, right = rng.random(1000), rng.random(1000) < 0.6
    slow = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            slow += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert calibration.error(calibration.bins(confidence, right)) == pytest.approx(slow, abs=1e-12)


def test_heads_without_probabilities_have_no_error():
    assert (
        calibration.error(None) is None and calibration.error(calibration.bins(np.zeros(0), np.zeros(0, bool))) is None
    )
    entry = calibration.in_percent(None)
    assert entry["ece"] is None and "ridge" in entry["confidence_is"]


# ---------------------------------------------------------------- interval


@pytest.mark.parametrize(("correct", "images"), [(0, 1), (0, 40), (7, 9), (40, 40), (9321, 10000)])
def test_the_interval_is_that_of_scipy(correct, images):
    expected = binomtest(correct, images).proportion_ci(method="wilson")
    assert wilson(correct, images) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_no_images_have_no_interval():
    assert wilson(0, 0) is None
