"""The parts of the error: wrong class within the right task, wrong task, and the head's bias to newer or older tasks.

With a the accuracy over all classes seen and a_o the task-incremental accuracy (the task of each sample is known), both in
percent:

- within-task error = 100 - a_o: wrong even among the classes of the sample's task;
- task confusion = a_o - a: right among the classes of its task, but a class of another task scores higher;
- head bias = 100 (newer - older) / (newer + older). Of the test samples that are predicted as a class of another task,
  `newer` counts those whose predicted task is newer than theirs, `older` the others. With 100 every such error falls on a
  newer task, with -100 on an older one. Tasks of equal size that are confused at random give 0.

The three parts a, task confusion and within-task error add up to 100.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Split(NamedTuple):
    """The parts of the error after one task, in percent; None where nothing was counted. `bias` is also None if no sample was
    predicted as a class of another task."""

    accuracy: float | None
    known: float | None  # task-incremental accuracy
    confusion: float | None  # task confusion
    within: float | None  # within-task error
    bias: float | None  # head bias, from -100 to 100


def wrong_task(confusion: Sequence[Sequence[int]]) -> tuple[int, int]:
    """(older, newer): how many samples were predicted as a class of an older and of a newer task than theirs.

    `confusion[k][j]`: samples of task k predicted as a class of task j, both from 0."""
    older = sum(n for k, row in enumerate(confusion) for n in row[:k])
    newer = sum(n for k, row in enumerate(confusion) for n in row[k + 1 :])
    return older, newer


def head_bias(older: int, newer: int) -> float | None:
    """`100 (newer - older) / (newer + older)`; None without errors between tasks."""
    return 100.0 * (newer - older) / (newer + older) if newer + older else None


def split(accuracy: float | None, known: float | None, counts: Sequence[int] | None) -> Split:
    """The parts of the error from the two accuracies in percent and the counts [older, newer]."""
    bias = head_bias(*counts) if counts is not None else None
    if accuracy is None or known is None:
        return Split(accuracy, known, None, None, bias)
    return Split(accuracy, known, known - accuracy, 100.0 - known, bias)


def splits(results: Mapping[str, Any]) -> list[Split]:
    """A split for each task of a results.json. Files of older versions have it for the last task alone, without the bias."""
    curve = results["top1_curve"]
    known = results.get("task_oracle_curve") or [*[None] * (len(curve) - 1), results["task_oracle_accuracy"]]
    counts = results.get("wrong_task") or [None] * len(curve)
    return [split(a, o, c) for a, o, c in zip(curve, known[: len(curve)], counts, strict=True)]
