"""A data set whose test images are training images: what settings are chosen on, without a look at the real ones.

Shapes: N training images.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np

from utils.data.dataset import Dataset
from utils.process.seeds import named_seed


def rows(name: str, labels: np.ndarray, share: float) -> np.ndarray:
    """Which of the N images are held out, bool [N]: of each class `share`, rounded, at least one, drawn by the set's `name`.
    A class of one image has it in none."""
    rng = np.random.default_rng(named_seed("tune", name))
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        count = min(max(round(share * len(of_class)), 1), len(of_class) - 1)
        held[rng.permutation(of_class)[:count]] = True
    return held


def training_alone(dataset: Dataset) -> Dataset:
    """`dataset` with no test image in it, whatever its test set is."""
    at: Any = dataset.train.at  # type: ignore[attr-defined]  # both kinds of image sets have it
    return replace(dataset, test=at(np.zeros(0, dtype=np.int64)))


def split(dataset: Dataset, share: float) -> tuple[Dataset, dict[str, Any]]:
    """(the training images of `dataset`, parted into those to learn and those held out as its test set; facts on the part).

    The test images of `dataset` are not looked at. A class of one image has it in both parts: `without_held_out` names it."""
    labels, train = dataset.train.labels, dataset.train
    held = rows(dataset.name, labels, share)
    alone = ~np.isin(labels, labels[held])
    scored = np.flatnonzero(held)
    at: Any = train.at  # type: ignore[attr-defined]  # both kinds of image sets have it
    parted = replace(
        dataset, train=at(np.flatnonzero(~held)), test=at(np.flatnonzero(held | alone)), notes=(), left_out={}
    )
    digest = hashlib.sha256(scored.astype(np.int64).tobytes()).hexdigest()[:16]
    return parted, {"share": share, "images": len(scored), "digest": digest}


def without_held_out(dataset: Dataset) -> set[int]:
    """Labels of the classes that have one training image, so that none can be held out."""
    classes, counts = np.unique(dataset.train.labels, return_counts=True)
    return {int(label) for label, count in zip(classes, counts, strict=True) if count == 1}
