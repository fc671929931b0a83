"""Every metric as a pure function of the accuracy matrix, of test scores, or of one value per seed.

`a[t][k]` is the accuracy (a fraction) on the test classes of task k after learning task t, both counted from 0, k <= t;
there are T tasks. Rows may be ragged (row t has t+1 entries) or full, with NaN or None where nothing was measured. A task
without test samples has no accuracy: its entries are None, and means leave it out. A mean over nothing is None, never 0:
after one task nothing can be forgotten, so forgetting and backward transfer are None.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Matrix = Sequence[Sequence[float | None]]


def mean(values: Iterable[float | None]) -> float | None:
    """Arithmetic mean of the values that exist (not None, not NaN); None where there are none."""
    known = [float(v) for v in values if v is not None and not math.isnan(v)]
    return math.fsum(known) / len(known) if known else None


class Summary(NamedTuple):
    """Mean, sample standard deviation (divisor n-1) and number of values."""

    mean: float | None
    std: float | None
    n: int


def summarise(values: Iterable[float | None]) -> Summary:
    """Mean and standard deviation (divisor n-1) over seeds, of the values that exist; std is None for n = 1, both for n = 0."""
    known = [float(v) for v in values if v is not None and not math.isnan(v)]
    centre = mean(known)
    if centre is None or len(known) < 2:
        return Summary(centre, None, len(known))
    return Summary(centre, math.sqrt(math.fsum((v - centre) ** 2 for v in known) / (len(known) - 1)), len(known))


class PairedDifference(NamedTuple):
    """Mean difference over n pairs and the ends of its confidence interval; None where there are too few pairs."""

    mean: float | None
    low: float | None
    high: float | None
    n: int


def paired_difference(
    values: Mapping[int, float | None], reference: Mapping[int, float | None], confidence: float = 0.95
) -> PairedDifference:
    """The mean of `values - reference` over the seeds that both have, with Student's confidence interval (n-1 degrees of
    freedom).

    Both map a seed to its value. A seed that is missing or None in one of them is left out. One pair has no interval.
    """
    pairs = [(values[seed], reference[seed]) for seed in values if seed in reference]
    centre, std, n = summarise(a - b for a, b in pairs if a is not None and b is not None)
    if centre is None or std is None:
        return PairedDifference(centre, None, None, n)
    from scipy.special import stdtrit  # quantiles of Student's t as in scipy.stats, which takes a second to import

    half = float(stdtrit(n - 1, 0.5 + confidence / 2)) * std / math.sqrt(n)
    return PairedDifference(centre, centre - half, centre + half, n)


# ------------------------------------------------------------------------------------------------ accuracy matrix


def _at(matrix: Matrix, t: int, k: int) -> float | None:
    value = matrix[t][k] if k < len(matrix[t]) else None
    return None if value is None or math.isnan(value) else float(value)


def accuracy_rows(correct: Sequence[Sequence[int]], samples: Sequence[int]) -> list[list[float | None]]:
    """`a[t][k] = correct[t][k] / samples[k]`: correct predictions over test samples of each task."""
    return [[c / n if n else None for c, n in zip(row, samples, strict=False)] for row in correct]


def top1_curve(correct: Sequence[Sequence[int]], samples: Sequence[int]) -> list[float | None]:
    """Accuracy over all classes seen after each task: `A_t = sum_{k<=t} correct[t][k] / sum_{k<=t} samples[k]`.

    Weighted by test samples, as published class-incremental curves are; where task sizes differ it is not the mean of row t.
    """
    curve: list[float | None] = []
    for t, row in enumerate(correct):
        if len(row) < t + 1 or len(samples) < t + 1:
            raise ValueError(f"row {t} needs counts for {t + 1} tasks, got {len(row)} and {len(samples)} sizes")
        seen = sum(samples[: t + 1])
        curve.append(sum(row[: t + 1]) / seen if seen else None)
    return curve


def last_accuracy(curve: Sequence[float | None]) -> float | None:
    """`A_{T-1}`: accuracy over all classes after the last task."""
    return _at([curve], 0, len(curve) - 1) if curve else None


def average_accuracy(curve: Sequence[float | None]) -> float | None:
    """`1/T sum_t A_t`: the "average incremental accuracy" of iCaRL (Rebuffi et al., 2017)."""
    return mean(curve)


def final_task_mean(matrix: Matrix) -> float | None:
    """`1/T sum_k a[T-1][k]`: every task has the same weight ("average accuracy" of Lopez-Paz & Ranzato, 2017)."""
    last = len(matrix) - 1
    return mean(_at(matrix, last, k) for k in range(last + 1))


def forgetting(matrix: Matrix) -> float | None:
    """`1/(T-1) sum_{k<T-1} ( max_{k<=t<T-1} a[t][k] - a[T-1][k] )` (Chaudhry et al., 2018, eq. 3).

    The maximum is over the *earlier* rows, so a task that improves in the last row contributes a negative term. None for one
    task.
    """
    return mean(forgetting_by_task(matrix))


def forgetting_by_task(matrix: Matrix) -> list[float | None]:
    """The terms of `forgetting`, one for each task but the last: `max_{k<=t<T-1} a[t][k] - a[T-1][k]`."""
    last, drops = len(matrix) - 1, []
    for k in range(last):
        best = [v for t in range(k, last) if (v := _at(matrix, t, k)) is not None]
        now = _at(matrix, last, k)
        drops.append(max(best) - now if best and now is not None else None)
    return drops


def backward_transfer(matrix: Matrix) -> float | None:
    """`1/(T-1) sum_{k<T-1} ( a[T-1][k] - a[k][k] )` (Lopez-Paz & Ranzato, 2017, eq. 3). None for one task."""
    last, gains = len(matrix) - 1, []
    for k in range(last):
        then, now = _at(matrix, k, k), _at(matrix, last, k)
        gains.append(now - then if then is not None and now is not None else None)
    return mean(gains)


# ------------------------------------------------------------------------------------------------ scores of samples


def _scores(scores: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Scores [N, C] and labels [N] as arrays (torch tensors may live on any device)."""
    table, truth = (np.asarray(x.detach().cpu() if hasattr(x, "detach") else x) for x in (scores, labels))
    if table.ndim != 2 or truth.shape != table.shape[:1]:
        raise ValueError(f"scores must be [N, C] and labels [N], not {table.shape} and {truth.shape}")
    return table, truth.astype(np.int64)


def _ranks(table: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The rank [N] of each sample's true class among its scores [N, C], 0 = best; C if that class has no score.

    Of equal scores the lower class comes first. A NaN ranks above every number, and a true class whose score is NaN or
    missing is never right, so that a broken model does not look like a good one.
    """
    classes = table.shape[1]
    known = (truth >= 0) & (truth < classes)
    index = np.where(known, truth, 0)[:, None]
    true = np.take_along_axis(table, index, axis=1) if classes else np.full((len(table), 1), np.nan)
    before = (table > true) | np.isnan(table) | ((table == true) & (np.arange(classes) < index))
    return np.where(known & ~np.isnan(true[:, 0]), before.sum(axis=1), classes)


def _oracle_hits(table: np.ndarray, truth: np.ndarray, task_classes: Sequence[Sequence[int]]) -> np.ndarray:
    """Whether each sample [N] is right if its task is known: its class has the best score among the classes of its task."""
    hits = np.zeros(len(truth), dtype=bool)
    task_of = {c: t for t, classes in enumerate(task_classes) for c in classes}
    strange = next((c for c in truth.tolist() if c not in task_of), None)
    if strange is not None:
        raise ValueError(f"class {strange} belongs to none of the {len(task_classes)} tasks")
    # only tasks that have samples here, mostly one: a loop over all tasks for each would be quadratic in their number
    for t in {task_of[c] for c in np.unique(truth).tolist()}:
        classes = np.sort(np.asarray(task_classes[t], dtype=np.int64))
        rows = np.isin(truth, classes)
        hits[rows] = _ranks(table[np.ix_(rows, classes)], np.searchsorted(classes, truth[rows])) == 0
    return hits


@dataclass(frozen=True)
class Score:
    """Counts of one task's test samples: all, correct at top-1, correct at top-5 (None below five classes), and correct if the
    task is known. `predicted[j]`: samples whose best score is a class of task j."""

    samples: int
    correct: int
    correct_top5: int | None
    correct_oracle: int
    predicted: tuple[int, ...] = ()


def share(scores: Sequence[Score]) -> float:
    """Correct over all test samples of several tasks, at least one sample."""
    return sum(s.correct for s in scores) / sum(s.samples for s in scores)


def score(scores: Any, labels: Any, task_classes: Sequence[Sequence[int]]) -> Score:
    """Counts one task's test samples from `scores` [N, C] over all C classes seen and labels [N] in order of arrival.

    `task_classes[t]` lists the columns of task t; their order has no effect. Raises ValueError for other shapes, or for a
    label that belongs to no task.
    """
    table, truth = _scores(scores, labels)
    ranks = _ranks(table, truth)
    return Score(
        samples=len(truth),
        correct=int((ranks == 0).sum()),
        correct_top5=int((ranks < 5).sum()) if table.shape[1] >= 5 else None,
        correct_oracle=int(_oracle_hits(table, truth, task_classes).sum()),
        predicted=_predicted_tasks(table, task_classes),
    )


def _predicted_tasks(table: np.ndarray, task_classes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """For each task the number of samples whose best score [N, C] is one of its classes; ties and NaN as in `_ranks`."""
    task_of = np.zeros(table.shape[1], dtype=np.int64)
    for t, classes in enumerate(task_classes):
        task_of[[c for c in classes if c < len(task_of)]] = t
    best = table.argmax(axis=1) if table.size else np.zeros(0, dtype=np.int64)
    return tuple(np.bincount(task_of[best], minlength=len(task_classes)).tolist())
