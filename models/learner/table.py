"""Features in the place of images, for phases that train a head or another small part on them.

Shapes: n rows, B batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.data.batches import shards_of, split_padding


@dataclass(frozen=True)
class Table:
    """Features [n, ...] and their labels [n], for `fit(data=...)`; `step` gets rows of both.

    `order` [n]: the positions in which they are shown; None: shuffled anew in each epoch, as the task's images would be.
    `batch_size`: rows a step; None: the settings' key. `are_images`: each row counts as a training image shown."""

    features: Tensor
    labels: Tensor
    order: Tensor | None = None
    batch_size: int | None = None
    are_images: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, order: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """This rank's shard of every batch: features, labels, and the positions of those rows that are no padding."""
        for chunk in shards_of([rows.tolist() for rows in order.split(size)]):
            rows, real = split_padding(chunk)
            yield self.features[rows], self.labels[torch.tensor(rows)], real
