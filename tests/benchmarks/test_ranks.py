"""Rank correlations of the leaderboard with published numbers, by hand and against scipy."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from benchmarks import ranks


def test_the_coefficient_is_that_of_the_ranks():
    # ranks 1 2 3 4 and 2 1 4 3: 1 - 6 * (1 + 1 + 1 + 1) / (4 * 15) = 0.6
    assert ranks.spearman([1, 5, 6, 100], [20, 10, 90, 30]) == pytest.approx(0.6)
    assert ranks.spearman([1, 2], [3, 3]) is None


def test_ties_share_their_rank_as_in_scipy():
    random = np.random.default_rng(0)
    a, b = random.integers(5, size=30), random.integers(5, size=30)
    assert ranks.spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)


def test_only_methods_with_both_numbers_count_and_few_have_no_coefficient():
    ours = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "mine": 5.0}
    result = ranks.correlation(ours, {"a": 10.0, "b": 20.0, "c": 30.0, "d": 40.0, "theirs": 0.0}, draws=200)
    assert result == (pytest.approx(1.0), pytest.approx(1.0), pytest.approx(1.0), 4)
    assert ranks.correlation(ours, {"a": 1.0, "b": 2.0, "c": 3.0}) == (None, None, None, 3)


def test_the_interval_contains_the_coefficient_and_lies_in_its_range():
    ours = {name: float(i) for i, name in enumerate("abcdefgh")}
    theirs = dict(zip(ours, (2.0, 1.0, 4.0, 3.0, 7.0, 5.0, 8.0, 6.0), strict=True))
    rho, low, high, n = ranks.correlation(ours, theirs, draws=500)
    assert n == 8 and -1 <= low < rho < high <= 1
