"""Every figure of merit as a pure function of the accuracy matrix, of test scores, or of one value a seed.

`a[t][k]` is the accuracy (a fraction) on the test classes of task k after learning task t, both counted from 0, k <= t;
T tasks. Rows may be ragged (row t has t+1 entries) or full with NaN or None where nothing was measured. A task without
test samples has no accuracy: its entries are None, and means leave it out. A mean over nothing is None, never 0: after
one task there is nothing to forget, so forgetting and backward transfer are None.
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
    """Over seeds: mean and std with divisor n-1 of the values that exist; std is None for n = 1, both for n = 0."""
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
    """`values - reference` over the seeds that both have, with Student's interval of that mean: n-1 degrees of freedom.

    Both map a seed to its value. A seed that one of them lacks (or has as None) makes no pair. One pair has no interval.
    """
    pairs = [(values[seed], reference[seed]) for seed in values if seed in reference]
    found = summarise(a - b for a, b in pairs if a is not None and b is not None)
    if found.mean is None or found.std is None:
        return PairedDifference(found.mean, None, None, found.n)
    from scipy.special import stdtrit  # quantiles of Student's t as in scipy.stats, without its second of import

    half = float(stdtrit(found.n - 1, 0.5 + confidence / 2)) * found.std / math.sqrt(found.n)
    return PairedDifference(found.mean, found.mean - half, found.mean + half, found.n)


# ------------------------------------------------------------------------------------------------ accuracy matrix


def _at(matrix: Matrix, t: int, k: int) -> float | None:
    value = matrix[t][k] if k < len(matrix[t]) else None
    return None if value is None or math.isnan(value) else float(value)


def accuracy_rows(correct: Sequence[Sequence[int]], samples: Sequence[int]) -> list[list[float | None]]:
    """`a[t][k] = correct[t][k] / samples[k]` from the number right and the number of test samples of each task."""
    return [[c / n if n else None for c, n in zip(row, samples, strict=False)] for row in correct]


def top1_curve(correct: Sequence[Sequence[int]], samples: Sequence[int]) -> list[float | None]:
    """Accuracy over all classes seen after each task: `A_t = sum_{k<=t} correct[t][k] / sum_{k<=t} samples[k]`.

    Weighted by test samples, as published class-incremental curves are: not the mean of row t where sizes differ.
    """
    curve: list[float | None] = []
    for t, row in enumerate(correct):
        if len(row) < t + 1 or len(samples) < t + 1:
            raise ValueError(f"row {t} needs counts for {t + 1} tasks, found {len(row)} and {len(samples)} sizes")
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
    """`1/T sum_k a[T-1][k]`: every task counts alike ("average accuracy" of Lopez-Paz & Ranzato, 2017)."""
    last = len(matrix) - 1
    return mean(_at(matrix, last, k) for k in range(last + 1))


def forgetting(matrix: Matrix) -> float | None:
    """`1/(T-1) sum_{k<T-1} ( max_{k<=t<T-1} a[t][k] - a[T-1][k] )` (Chaudhry et al., 2018, eq. 3).

    The best of the *earlier* rows, so a task that improves in the last row counts negative. None for one task.
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
    """Place [N] of each sample's true class among its scores [N, C], 0 = best; C where it can win no place.

    Of equal scores the lower class comes first. A NaN stands above every number and a true class that is NaN (or not
    among the C) is never right, so that a broken model does not look like a good one.
    """
    classes = table.shape[1]
    known = (truth >= 0) & (truth < classes)
    index = np.where(known, truth, 0)[:, None]
    own = np.take_along_axis(table, index, axis=1) if classes else np.full((len(table), 1), np.nan)
    before = (table > own) | np.isnan(table) | ((table == own) & (np.arange(classes) < index))
    return np.where(known & ~np.isnan(own[:, 0]), before.sum(axis=1), classes)


def topk_accuracy(scores: Any, labels: Any, k: int) -> float | None:
    """Share of samples whose class is among the k best of `scores` [N, C].

    None where it says nothing: fewer than k classes, or no samples.
    """
    table, truth = _scores(scores, labels)
    if table.shape[1] < k or not len(truth):
        return None
    return float((_ranks(table, truth) < k).mean())


def _oracle_hits(table: np.ndarray, truth: np.ndarray, task_classes: Sequence[Sequence[int]]) -> np.ndarray:
    hits = np.zeros(len(truth), dtype=bool)
    owner = {c: t for t, classes in enumerate(task_classes) for c in classes}
    strange = next((c for c in truth.tolist() if c not in owner), None)
    if strange is not None:
        raise ValueError(f"class {strange} belongs to none of the {len(task_classes)} tasks")
    # the tasks there are samples of, mostly one: going through all for each would be quadratic in the run's tasks
    for t in {owner[c] for c in np.unique(truth).tolist()}:
        own = np.sort(np.asarray(task_classes[t], dtype=np.int64))
        rows = np.isin(truth, own)
        hits[rows] = _ranks(table[np.ix_(rows, own)], np.searchsorted(own, truth[rows])) == 0
    return hits


def task_oracle_accuracy(scores: Any, labels: Any, task_classes: Sequence[Sequence[int]]) -> float | None:
    """Accuracy with the task known: the best of `scores` [N, C] is sought among the sample's own task's classes only.

    `task_classes[t]` lists task t's columns of `scores`. A one-class task is always right. None without samples.
    """
    table, truth = _scores(scores, labels)
    return float(_oracle_hits(table, truth, task_classes).mean()) if len(truth) else None


@dataclass(frozen=True)
class Score:
    """Counts of one task's test samples: how many, how many right at top-1, at top-5 (None below five classes),
    and with the task known. `predicted[j]`: for how many the best of all scores is a class of task j."""

    samples: int
    correct: int
    correct_top5: int | None
    correct_oracle: int
    predicted: tuple[int, ...] = ()


def score(scores: Any, labels: Any, task_classes: Sequence[Sequence[int]]) -> Score:
    """Count one task's test samples from `scores` [N, C] over all C classes seen and labels [N] in arrival order.

    `task_classes[t]` lists the columns of task t. Top-1 and top-5 are None-safe: C < 5 gives `correct_top5` None.
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
    """How many of the samples with scores [N, C] have their best class in each task; ties and NaN as in `_ranks`."""
    owner = np.zeros(table.shape[1], dtype=np.int64)
    for t, classes in enumerate(task_classes):
        owner[[c for c in classes if c < len(owner)]] = t
    best = table.argmax(axis=1) if table.size else np.zeros(0, dtype=np.int64)
    return tuple(np.bincount(owner[best], minlength=len(task_classes)).tolist())


def grouped(predicted: Any, labels: Any, known: int, sizes: Sequence[int]) -> dict[str, float]:
    """Accuracy in percent (two decimals) of groups of classes, in the form SEMA-CL and PILOT log it.

    `predicted`, `labels` [N] in arrival order; `sizes[t]` classes of task t; the first `known` classes are "old".
    Keys: `total`, one per task such as `00-09`, `old`, `new`. Two departures: theirs drops a last group of one class
    (`range(.., max(labels), ..)` ends before it) and names a ragged last group beyond its end; ours does neither. As
    there, `old` or `new` without samples is 0; a task without samples is left out, where theirs has NaN.
    """
    guess, truth = np.asarray(predicted), np.asarray(labels)
    right = guess == truth

    def percent(rows: np.ndarray) -> float:
        return round(100.0 * float(right[rows].mean()), 2) if rows.any() else 0.0

    groups, first = {"total": percent(np.ones(len(truth), dtype=bool))}, 0
    for size in sizes:
        rows = (truth >= first) & (truth < first + size)
        if rows.any():
            groups[f"{first:02d}-{first + size - 1:02d}"] = percent(rows)
        first += size
    return {**groups, "old": percent(truth < known), "new": percent(truth >= known)}
