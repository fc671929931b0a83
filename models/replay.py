"""A small memory of training images: which of a class are kept, and where they are found again.

Shapes: n images of a class, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from utils.tasks import TaskData


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
    found = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
    return [int(own[position]) for own in found for position in herd(features[own], count)]


def at_rows(past: Sequence[TaskData], rows: Sequence[int]) -> list[TaskData]:
    """The images of earlier tasks that lie at these rows of the data set; tasks without any are left out."""
    parts = [data.subset(np.flatnonzero(np.isin(data.rows, rows))) for data in past]
    return [part for part in parts if len(part)]
