"""Image files that belong to no data set: found, looked at, and read as the network's input, as a recipe says.

They are read as test images of a run are: the same formats, the same steps. Letters: B images, S side of the input.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from utils.data import inspection, listing, transforms
from utils.data.batches import Source, TaskData
from utils.data.dataset import DataFaults
from utils.data.images import ImageFiles, decode
from utils.data.names import readable
from utils.data.recipe import Recipe
from utils.text import counted


@dataclass(frozen=True)
class NewImages:
    """`files`: paths of images that can be read, in the order they were named, folders sorted; `notes` on the others."""

    files: list[str]
    notes: tuple[str, ...] = ()


def find(
    paths: Sequence[str | Path],
    grey_bits: int = 16,
    skip_broken: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> NewImages:
    """The images that `paths` name, files or folders of any depth, every one decoded once. Files without the suffix of an
    image are passed over, with a note.

    Raises DataFaults with every path that is not there and every image that cannot be read; with `skip_broken` those images are
    left out, with a note. ValueError if no image is left."""
    files, skipped, faults, broken = [], Counter[str](), [], dict[str, str]()
    for path in [os.fspath(path) for path in paths]:
        if os.path.isdir(path):
            below = listing.list_images(path, "folder")
            files += below.files
            skipped += below.skipped
            broken |= below.broken
            faults += below.faults
        elif not os.path.lexists(path):
            faults.append(f"{readable(path)}: no such file or folder")
        elif not listing.is_image(os.path.basename(path)):
            skipped[os.path.splitext(path)[1].lower() or "without suffix"] += 1
        else:
            files.append(path)
            broken |= {path: fault} if (fault := listing.fault_of_file(path)) else {}
    files = list(dict.fromkeys(files))
    report = inspection.inspect([file for file in files if file not in broken], full=True, progress=progress)
    broken |= report.broken | _too_deep(report.deep_grey, grey_bits)
    if faults or (broken and not skip_broken):
        raise DataFaults("the images", [*faults, *({} if skip_broken else broken).values()])
    notes = listing.skipped_note(skipped, "")
    if broken:
        notes.append(f"{counted(len(broken), 'image')} left out: {'; '.join(list(broken.values())[:3])}")
    if not (sound := [file for file in files if file not in broken]):
        raise ValueError("; ".join(["no image to predict", *notes]))
    return NewImages(sound, tuple(notes))


def _too_deep(files: Sequence[str], grey_bits: int) -> dict[str, str]:
    """{file: why} of images whose grey values do not fit."""
    faults = {}
    for file in files:
        try:
            decode(file, grey_bits=grey_bits)
        except ValueError as error:
            faults[file] = str(error)
    return faults


def as_data(files: Sequence[str], how: Recipe, num_workers: int = 0, device: torch.device | None = None) -> TaskData:
    """The files as samples without labels (-1): `batches(size, augment=False, shuffle=False)` reads them, in that order."""
    images = ImageFiles(files, np.zeros(len(files), dtype=np.int64), how.grey_bits)
    transform = OfAnySize(transforms.follow(how))
    source = Source(images, transform, transform, 0, num_workers, device=device)
    return TaskData(source, 0, np.arange(len(files)), torch.full((len(files),), -1))


def read(files: Sequence[str | Path], how: Recipe) -> torch.Tensor:
    """The images as input of the network, float32 [B, 3, S, S] in [0, 1]. Raises ValueError for one that cannot be read."""
    images = [decode(file, grey_bits=how.grey_bits) for file in files]
    if not images:
        return torch.empty(0, 3, how.size, how.size)
    return OfAnySize(transforms.follow(how))(images, np.zeros(len(images), dtype=np.uint64))


class OfAnySize:
    """A test transform for images that differ in size; one that works on a batch gets them one by one."""

    batched = False

    def __init__(self, transform: transforms.Transform):
        self.transform = transform

    def __call__(self, images: torch.Tensor | Sequence[torch.Tensor], seeds: np.ndarray) -> torch.Tensor:
        if not self.transform.batched:
            return self.transform(images, seeds)
        return torch.cat([self.transform(image[None], seeds[k : k + 1]) for k, image in enumerate(images)])
