"""A small memory of training images: which images of a class are stored, and what a later task trains on.

Shapes: n images of a class, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from utils.data.batches import TaskData


def herd(features: Tensor, count: int) -> list[int]:
    """Positions of `count` of the features [n, D], all if there are fewer: one after the other, each such that the mean of
    those chosen so far comes closest to the mean of all (herding; iCaRL, Rebuffi et al. 2017, algorithm 4). In float64; of
    equals the first."""
    rows = features.double()
    mean, total = rows.mean(dim=0), torch.zeros_like(rows[0])
    chosen: list[int] = []
    while len(chosen) < min(count, len(rows)):
        distance = (mean - (total + rows) / (len(chosen) + 1)).norm(dim=1)
        distance[chosen] = torch.inf
        chosen.append(int(distance.argmin()))
        total += rows[chosen[-1]]
    return chosen


def herd_classes(features: Tensor, labels: Tensor, count: int) -> list[int]:
    """Positions of `count` images of each class by `herd`, from features [n, D] and labels [n]; class after class."""
    classes = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
    return [int(images[position]) for images in classes for position in herd(features[images], count)]


def at_rows(past: Sequence[TaskData], rows: Sequence[int]) -> list[TaskData]:
    """The images of earlier tasks that lie at these rows of the data set; tasks without any are left out."""
    stored = [data.subset(np.flatnonzero(np.isin(data.rows, rows))) for data in past]
    return [data for data in stored if len(data)]
