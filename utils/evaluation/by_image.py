"""What each test image was taken for, from the one pass that scores a task: the source of every measure by class and image.

`ByImage` collects beside `utils.evaluation.scores.evaluate`, and `summary` counts what a record stores of it: test images and
hits by class, confused pairs of classes, the worst mistakes, and the bins of the calibration. Classes are numbered in
order of arrival. Shapes: n test images, C classes seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.evaluation import calibration

if TYPE_CHECKING:
    import torch

MOST_PAIRS = 2000  # confused pairs that a record stores: all of up to 45 classes
MOST_MISTAKES = 100  # wrongly classified images that a record stores
NO_CLASS = -1  # the prediction where a score is not a number


@dataclass(frozen=True)
class Outcomes:
    """The test images of one task. `labels`, `predicted` int64 [n]: a class, or NO_CLASS where a score is not a number.

    `margins` float64 [n]: the score of the predicted class minus that of the true one, 0 where the image is right, NaN without
    a prediction. `confidence` float64 [n]: the largest softmax probability of the scores. `scores` float32 [n, C], where
    they are stored."""

    labels: np.ndarray
    predicted: np.ndarray
    margins: np.ndarray
    confidence: np.ndarray
    scores: np.ndarray | None = None


def outcomes(scores: torch.Tensor, labels: torch.Tensor, store: bool = False) -> Outcomes:
    """Of scores [n, C] and labels [n] below C. Of equal scores the lower class wins, as in `metrics.score`: an image is
    predicted as its class exactly where that counts it as correct."""
    table = scores.detach().cpu().double().numpy()
    truth = labels.detach().cpu().numpy().astype(np.int64)
    if not table.size:
        nothing, numbers = np.zeros(0, dtype=np.int64), np.zeros(0)
        return Outcomes(nothing, nothing, numbers, numbers, _stored(scores) if store else None)
    broken = np.isnan(table).any(axis=1)
    best = np.where(broken, NO_CLASS, table.argmax(axis=1))
    rows = np.arange(len(table))
    with np.errstate(invalid="ignore"):  # inf - inf
        margins = table[rows, best] - table[rows, truth]
        margins[best == truth] = 0.0
        margins[broken] = np.nan
    return Outcomes(truth, best, margins, calibration.confidences(table), _stored(scores) if store else None)


def _stored(scores: torch.Tensor) -> np.ndarray:
    return scores.detach().cpu().float().numpy()


@dataclass
class ByImage:
    """Collects the outcomes of tasks 0, 1, ... in this order; `store`: with their scores."""

    store: bool = False
    tasks: list[Outcomes] = field(default_factory=list)

    def add(self, scores: torch.Tensor, labels: torch.Tensor) -> None:
        self.tasks.append(outcomes(scores, labels, self.store))

    def summary(self, rows: Sequence[np.ndarray], classes: int, log_probabilities: bool) -> dict[str, Any]:
        """Counts as plain JSON values.

        `rows[k]` are the rows of task k's test images in the test set, `classes` the number C. `log_probabilities`: the softmax
        of the scores is a probability, so that there is a calibration. Keys:

        - `images`, `correct` [C]: test images of each class, and those that are right;
        - `pairs`: [true, predicted, images] of confused pairs, the most frequent first, at most MOST_PAIRS; `pairs_beyond`: the
          images of the others;
        - `mistakes`: [row in the test set, true, predicted, margin], the largest margins first, at most MOST_MISTAKES;
        - `bins`: see `calibration.bins`, None without log-probabilities.
        """
        truth, best = self._joined("labels"), self._joined("predicted")
        right, where = truth == best, np.concatenate([np.asarray(r, dtype=np.int64) for r in rows])
        pairs = confused_pairs(truth, best)
        margins = self._joined("margins")
        worst = np.flatnonzero(~right)
        worst = worst[np.lexsort((where[worst], -np.nan_to_num(margins[worst], nan=np.inf)))][:MOST_MISTAKES]
        return {
            "images": np.bincount(truth, minlength=classes).tolist(),
            "correct": np.bincount(truth[right], minlength=classes).tolist(),
            "pairs": pairs[:MOST_PAIRS],
            "pairs_beyond": sum(n for *_, n in pairs[MOST_PAIRS:]),
            "mistakes": [
                [int(where[i]), int(truth[i]), int(best[i]), float(margins[i]) if np.isfinite(margins[i]) else None]
                for i in worst.tolist()
            ],
            "bins": calibration.bins(self._joined("confidence"), right) if log_probabilities else None,
        }

    def _joined(self, name: str) -> np.ndarray:
        return np.concatenate([getattr(task, name) for task in self.tasks])


def confused_pairs(truth: np.ndarray, predicted: np.ndarray) -> list[list[int]]:
    """[true class, predicted class, images] of every pair of different classes, the most frequent first, then by class."""
    wrong = truth != predicted
    pairs, counts = np.unique(np.stack([truth[wrong], predicted[wrong]], axis=1), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")  # unique sorts by true, then by predicted class
    return np.column_stack([pairs, counts])[order].tolist()
