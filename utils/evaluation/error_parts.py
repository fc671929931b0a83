"""What wrong answers are made of: wrong within the right task, a wrong task, and a head that leans to newer or older ones.

With a the accuracy over all classes seen and a_o the one if each sample's task were known (all in percent):

- within-task error = 100 - a_o: wrong even among the sample's own task's classes;
- task confusion = a_o - a: right among its own task's classes, but a class of another task scores higher;
- head bias = 100 (newer - older) / (newer + older), where of the test samples taken for a class of another task `newer`
  counts those whose supposed task came after their own, `older` those before. 100: every such error falls on a newer task,
  -100: on an older one. Tasks of equal size that are confused at random give 0.

The three parts a, task confusion and within-task error add up to 100.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Split(NamedTuple):
    """The error after one task, in percent; None where nothing was counted. `bias` also where no task was mistaken."""

    accuracy: float | None
    known: float | None  # accuracy with the task known
    confusion: float | None
    within: float | None
    bias: float | None


def wrong_task(confusion: Sequence[Sequence[int]]) -> tuple[int, int]:
    """(older, newer): how many samples were taken for a class of a task before and after their own.

    `confusion[k][j]`: samples of task k taken for a class of task j, both from 0."""
    older = sum(n for k, row in enumerate(confusion) for n in row[:k])
    newer = sum(n for k, row in enumerate(confusion) for n in row[k + 1 :])
    return older, newer


def head_bias(older: int, newer: int) -> float | None:
    """`100 (newer - older) / (newer + older)`; None without errors between tasks."""
    return 100.0 * (newer - older) / (newer + older) if newer + older else None


def split(accuracy: float | None, known: float | None, counts: Sequence[int] | None) -> Split:
    """The parts from the two accuracies in percent and [older, newer]."""
    bias = head_bias(*counts) if counts is not None else None
    if accuracy is None or known is None:
        return Split(accuracy, known, None, None, bias)
    return Split(accuracy, known, known - accuracy, 100.0 - known, bias)


def splits(results: Mapping[str, Any]) -> list[Split]:
    """A split for each task of a results.json; of an older version's there is the last task's alone, without a bias."""
    curve = results["top1_curve"]
    known = results.get("task_oracle_curve") or [*[None] * (len(curve) - 1), results["task_oracle_accuracy"]]
    counts = results.get("wrong_task") or [None] * len(curve)
    return [split(a, o, c) for a, o, c in zip(curve, known[: len(curve)], counts, strict=True)]
