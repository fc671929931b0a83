"""What a data set is: labelled images for training and for test, class names, and the kind of its transforms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

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
