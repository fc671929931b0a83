"""Calibration: whether a class that is predicted with confidence p is right in a share p of the cases.

The expected calibration error of Guo et al. (ICML 2017, "On Calibration of Modern Neural Networks", eq. 3): images are put
into BINS bins of equal width by their confidence, the largest softmax probability over the classes seen, and

    ECE = sum_b n_b / n |accuracy(b) - confidence(b)|

with the n_b images of bin b, their share of right predictions and their mean confidence. Bin b from 0 holds confidences in
(b / BINS, (b + 1) / BINS], as in that paper.

It needs scores that are log-probabilities up to a constant: trained by cross-entropy over their softmax, or the log
posteriors of discriminant analysis. Cosines to class means and the
regression scores of a ridge head are none: the softmax of C cosines is nearly 1 / C for every image, whatever is right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

BINS = 15  # Guo et al., section 4
CONFIDENCE = "the largest softmax probability of the scores over the classes seen"
NO_CONFIDENCE = (
    "no calibration: this head's scores (cosines to class means, or ridge regression) are no log-probabilities, so the "
    "softmax of them is no confidence"
)


def confidences(scores: np.ndarray) -> np.ndarray:
    """The largest softmax probability [n] of scores float64 [n, C]; 0 where a score is not a number."""
    with np.errstate(invalid="ignore", over="ignore"):
        parts = np.exp(scores - scores.max(axis=1, keepdims=True))
        return np.nan_to_num(1.0 / parts.sum(axis=1), nan=0.0)


def bins(confidence: np.ndarray, right: np.ndarray) -> dict[str, list[Any]]:
    """For each bin the number of `images`, the sum of their `confidence` [n] and the number of `correct` ones (`right` [n])."""
    edges = np.arange(1, BINS) / BINS
    where = np.searchsorted(edges, confidence, side="left")
    return {
        "images": np.bincount(where, minlength=BINS).tolist(),
        "confidence": [math.fsum(confidence[where == b].tolist()) for b in range(BINS)],
        "correct": np.bincount(where[right], minlength=BINS).tolist(),
    }


def error(counts: Mapping[str, Sequence[float]] | None) -> float | None:
    """The ECE as a fraction from the result of `bins`; None without images."""
    if counts is None or not (images := sum(counts["images"])):
        return None
    gaps = (abs(c - p) for c, p in zip(counts["correct"], counts["confidence"], strict=True))
    return math.fsum(gaps) / images


def in_percent(counts: Mapping[str, Sequence[float]] | None) -> dict[str, Any]:
    """The entry of results.json: `ece`, `confidence_is` (in words, or why there is none) and for each bin the number of
    `images`, mean `confidence` and `accuracy`, in percent."""
    if counts is None:
        return {"ece": None, "confidence_is": NO_CONFIDENCE, "images": [], "confidence": [], "accuracy": []}
    ece, images = error(counts), counts["images"]

    def means(name: str) -> list[float | None]:
        return [100.0 * total / n if n else None for total, n in zip(counts[name], images, strict=True)]

    return {
        "ece": None if ece is None else 100.0 * ece,
        "confidence_is": CONFIDENCE,
        "images": list(images),
        "confidence": means("confidence"),
        "accuracy": means("correct"),
    }
