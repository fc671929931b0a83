"""What a data set is: labelled images for training and for test, class names, and the kind of its transforms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

Place = Path | tuple[Path, ...]  # where the class folders are: one folder, or several whose classes follow each other

if TYPE_CHECKING:
    import numpy as np
    import torch


class ImageSet(Protocol):
    """Images with labels: `labels` is int64 [N], `image(i)` is uint8 [3, H, W] in RGB."""

    labels: np.ndarray

    def __len__(self) -> int: ...

    def image(self, index: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class Dataset:
    """A loaded data set. Labels are positions in `class_names`."""

    name: str
    class_names: list[str]
    train: ImageSet
    test: ImageSet
    transforms: str  # a kind that utils.data.transforms.build knows
    notes: tuple[str, ...] = ()  # what the user should know of how the data were read
    left_out: dict[str, int] = field(default_factory=dict)  # images that skip_broken left out of train and test
    as_published: bool = False  # the numbers of classes and images are those of DatasetInfo.counts


@dataclass(frozen=True)
class File:
    """A file to download, with what it becomes below the data root."""

    address: str
    size: int  # bytes, about: the server says the exact number
    md5: str | None  # as torchvision has it; None: nobody publishes one
    places: dict[str, str]  # {path inside of the archive, or the file's name: place below the data root}
    unpacked: int = 0  # bytes below the data root, about; 0: as many as `size`


@dataclass(frozen=True)
class DatasetInfo:
    """The facts of a data set that are known without opening it."""

    name: str
    num_classes: int | None  # None: the number of class folders
    image_size: int  # side of the stored images in pixels; 0: varies
    source: str  # what it is and where to get it
    kind: Literal["embedded", "torchvision", "folders"]
    folder: str | None  # its folder under the data root
    transforms: str  # kind of utils.data.transforms
    counts: tuple[int, int] | None = None  # training and test images of the published split
    licence: str = ""
    files: tuple[File, ...] = ()  # what `--data fetch` downloads
    reader: str = ""  # the class of torchvision.datasets that lists the images
    needs: tuple[str, ...] = ()  # places below the data root, where no file can be downloaded


MOST_FAULTS = 20


class DataFaults(ValueError):
    """Everything that is wrong with a data set, one line each in `faults`; the message shows the first ones."""

    def __init__(self, what: str, faults: Sequence[str], remedy: str = ""):
        self.what, self.faults, self.remedy = what, list(faults), remedy
        first, *more = lines = self.lines()
        remedy = f" ({remedy})" if remedy else ""
        head = f"{what}: {len(self.faults):,} faults{remedy}"
        super().__init__(f"{first}{remedy}" if not more else "\n  - ".join([head, *lines]))

    def lines(self) -> tuple[str, ...]:
        """The first faults, and how many more there are."""
        more = len(self.faults) - MOST_FAULTS
        return (*self.faults[:MOST_FAULTS], *([f"and {more:,} more in the data"] if more > 0 else []))

    @classmethod
    def refuse(cls, name: str, faults: Sequence[str], remedy: str = "") -> None:
        """Raises if there are faults."""
        if faults:
            raise cls(f"dataset {name}", faults, remedy)


def against_published(info: DatasetInfo, dataset: Dataset) -> Dataset:
    """`dataset`, marked if its numbers of images are the published ones, else with a note that says where they differ."""
    if info.counts is None:
        return dataset
    found = len(dataset.train), len(dataset.test)
    if found == info.counts:
        return replace(dataset, as_published=True)
    (train, test), (expected_train, expected_test) = found, info.counts
    note = (
        f"not the published split of {info.name}: {train:,} training and {test:,} test images here, {expected_train:,} and "
        f"{expected_test:,} there; do not put its numbers beside published ones"
    )
    return replace(dataset, notes=(*dataset.notes, note))
