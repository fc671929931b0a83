"""The tasks of a run as far as they are known before it starts, and how messages name some of them.

Imports nothing heavy: settings judge by it which of their keys have no effect (`Experiment.remarks_on`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """Classes of each task, and training images of each where they were counted."""

    classes: Sequence[int]
    images: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.classes)

    def steps(self, epochs: int, batch: int, held_out: float = 0.0) -> list[int] | None:
        """Training steps of each task: `epochs` passes in batches of `batch`; None if its images were not counted.

        `held_out`: share of each class's images, at least one, that is not trained on."""
        if self.images is None:
            return None
        left = list(self.images)
        if held_out:
            pairs = zip(self.images, self.classes, strict=True)
            left = [n - max(classes, round(n * held_out)) for n, classes in pairs]
        return [epochs * math.ceil(max(n, 1) / batch) for n in left]


def named(tasks: Iterable[int], count: int) -> str:
    """Tasks, counted from 0, as a message has them: "task 5", "tasks 1 and 3 to 5", or "every task" of `count`."""
    numbers = sorted({t + 1 for t in tasks})
    if count > 1 and len(numbers) == count:
        return "every task"
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    parts = [text for run in runs for text in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run))]
    listed = " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]
    return f"task{'s' * (len(numbers) > 1)} {listed}"
