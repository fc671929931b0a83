"""Fewer training images: a number of each class, or a long tail. The test images stay all there.

Which images stay depends on `subset_seed` and the class's name and number of images alone: runs of several seeds learn from the
same images, and the digests of a run are those of the images that stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from utils.data.dataset import Dataset, ImageSet
from utils.data.images import ImageArray, ImageFiles
from utils.data.names import listed
from utils.process.seeds import named_generator
from utils.text import counted


def long_tail(counts: Sequence[int], imbalance: float, ranks: Sequence[int]) -> list[int]:
    """Images to keep of each class: int(m * imbalance^(-rank / (C - 1))) of `counts` [C], at least 1 and at most all.

    m is the mean of `counts`, as in the authors' code (Cao et al. 2019, `imbalance_cifar.py`, whose factor is 1 / imbalance);
    `ranks` [C]: 0 for the class that keeps most."""
    most, last = sum(counts) / len(counts), max(len(counts) - 1, 1)
    return [min(n, max(1, int(most * imbalance ** (-rank / last)))) for n, rank in zip(counts, ranks, strict=True)]


def reduced(dataset: Dataset, shots: int | None, imbalance: float | None, order: str, seed: int) -> Dataset:
    """`dataset` with `shots` training images of each class, or with a long tail over the classes in their `order`: "index" or
    "shuffled". A note says what was left out."""
    import torch

    names, labels = dataset.class_names, dataset.train.labels
    counts = np.bincount(labels, minlength=len(names)).tolist()
    if shots is not None:
        keep = [min(n, shots) for n in counts]
        few = [name for name, n in zip(names, counts, strict=True) if n < shots]
        text = f"shots: {shots} training images of each class"
        if few:
            text += f"; {counted(len(few), 'class', 'classes')} with fewer keep all: {listed(few)}"
    else:
        assert imbalance is not None
        ranks = list(range(len(names)))
        if order == "shuffled":
            ranks = torch.randperm(len(names), generator=named_generator("long tail", seed)).tolist()
        keep = long_tail(counts, imbalance, ranks)
        text = f"imbalance: from {max(keep):,} to {min(keep):,} training images of a class"
    rows: list[int] = []
    for label, (name, count) in enumerate(zip(names, keep, strict=True)):
        of_class = np.flatnonzero(labels == label)
        drawn = torch.randperm(len(of_class), generator=named_generator("subset", seed, name))[:count]
        rows += of_class[drawn.numpy()].tolist()
    note = f"{text}; {len(rows):,} of {len(labels):,} stay (subset_seed {seed})"
    return replace(dataset, train=_rows(dataset.train, sorted(rows)), notes=(*dataset.notes, note))


def _rows(images: ImageSet, rows: Sequence[int]) -> ImageSet:
    """These images of a set, in this order."""
    labels = images.labels[rows]
    if isinstance(images, ImageFiles):
        return ImageFiles([images.paths[row] for row in rows], labels, images.grey_bits)
    assert isinstance(images, ImageArray)
    return ImageArray(images.images[rows], labels)
