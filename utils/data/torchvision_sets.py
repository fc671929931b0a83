"""Data sets that torchvision's classes list: their images as arrays or files, with the split that their authors publish.

torchvision reads the lists and arrays; nothing of it unpickles (idx and MATLAB files are numbers, `scipy.io.loadmat` runs no
code, the files `processed/*.pt` of old versions are read with weights_only). Image files are decoded by utils/data/images.py.
"""

from __future__ import annotations

import importlib
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.data import fetch
from utils.data.dataset import Dataset, DatasetInfo, against_published
from utils.data.listing import Found, fault_of_file
from utils.text import counted, one_line

# What follows the data root, and the arguments that give training and test images. A val part is trained on: the runner
# selects nothing by it, and methods hold out training images themselves.
_ROOT = {"SVHN": "svhn"}
_TWO = ({"split": "train"},), ({"split": "test"},)
_FLAG = ({"train": True},), ({"train": False},)
_WITH_VAL = (*_TWO[0], {"split": "val"}), _TWO[1]
_SPLITS: Mapping[str, tuple[tuple[dict[str, Any], ...], tuple[dict[str, Any], ...]]] = {
    **dict.fromkeys(("MNIST", "FashionMNIST", "KMNIST"), _FLAG),
    "EMNIST": (({"split": "balanced", "train": True},), ({"split": "balanced", "train": False},)),
    **dict.fromkeys(("SVHN", "GTSRB", "Food101", "StanfordCars"), _TWO),
    **dict.fromkeys(("DTD", "Flowers102"), _WITH_VAL),
    **{name: (({"split": "trainval"},), _TWO[1]) for name in ("OxfordIIITPet", "FGVCAircraft")},
    "EuroSAT": (({},), ()),
    "Country211": ((*_TWO[0], {"split": "valid"}), _TWO[1]),
}
TEST_RATIO = (
    0.2  # share of each class that is the test set where none is published: drawn by name, the same for every seed
)
_BORDER = 2  # pixels around the 28 x 28 of MNIST and its like
# What torchvision raises for damaged lists and arrays.
_DAMAGE = (
    *(OSError, RuntimeError, ValueError, LookupError, AssertionError, TypeError, AttributeError, EOFError),
    *(MemoryError, zlib.error, zipfile.BadZipFile),
)


def missing(info: DatasetInfo, root: Path | None) -> str | None:
    """None if everything that the set needs is under `root`, else one line for the user. It opens no file."""
    if root is None:
        return f"dataset {info.name}: the key data_root must say where the files are ({info.source})"
    needed = info.needs or [place for file in info.files for place in file.places.values()]
    lacking = [place for place in needed if not (root / place).exists()]
    if not lacking:
        return None
    more = f" and {len(lacking) - 1} more" * (len(lacking) > 1)
    return fetch.absent(info, root, f"no {root.absolute() / lacking[0]}{more}")


def load(info: DatasetInfo, root: Path, **how: Any) -> Dataset:
    """Images in memory, uint8 [N, 3, 32, 32], or lists of files that are looked at as `how` says (utils/data/folders.py).

    Raises FileNotFoundError if the files are missing, ValueError or DataFaults if they are damaged or of other classes."""
    if lacking := missing(info, root):
        raise FileNotFoundError(lacking)
    try:
        of_memory, training_only = info.image_size == 32, bool(how.get("training_only"))
        wanted = _SPLITS[info.reader][: 1 if of_memory and training_only else 2]
        parts = [[_of_torchvision(info, root, split) for split in part] for part in wanted]
        if of_memory:
            return _in_memory(info, parts) if training_only else against_published(info, _in_memory(info, parts))
        found = _found(info, parts)
    except _DAMAGE as error:
        raise ValueError(
            one_line(
                f"dataset {info.name}: its files under {root.absolute()} cannot be read ({error}); remove them and "
            )
            + (f"run `{fetch.command(info, root)}`" if info.files else f"get them again: {info.source}")
        ) from None
    from utils.data import folders

    return folders.checked(info, found, TEST_RATIO, **how)


def _of_torchvision(info: DatasetInfo, root: Path, split: Mapping[str, Any]) -> Any:
    """The data set of torchvision's class for one split. It downloads nothing."""
    cls = getattr(importlib.import_module("torchvision.datasets"), info.reader)
    return cls(str(root / _ROOT.get(info.reader, "")), **split)


def _in_memory(info: DatasetInfo, parts: Sequence[Sequence[Any]]) -> Dataset:
    """Grey images of 28 pixels get a black border of 2 and three equal channels; EMNIST's lie on their side in its files."""
    from utils.data import duplicates
    from utils.data.images import ImageArray

    sets = []
    for ((one,),) in zip(parts, strict=True):
        images = np.asarray(one.data)
        labels = np.asarray(one.targets if hasattr(one, "targets") else one.labels, dtype=np.int64)
        if images.ndim == 3:
            images = images.transpose(0, 2, 1) if info.reader == "EMNIST" else images
            border = (_BORDER, _BORDER)
            images = np.repeat(np.pad(images, ((0, 0), border, border))[:, None], 3, axis=1)
        if images.shape[1:] != (3, 32, 32) or images.dtype != np.uint8 or labels.shape != images.shape[:1]:
            raise ValueError(f"{len(labels)} labels and images {images.dtype} {list(images.shape)}")
        _check_labels(info, labels.tolist())
        sets.append(ImageArray(images, labels))
    first = parts[0][0]
    names = [_plain(info, str(name)) for name in getattr(first, "classes", range(info.num_classes or 0))]
    if len(sets) == 1:
        return Dataset(info.name, names, sets[0], sets[0].without_images(), info.transforms)
    return Dataset(info.name, names, sets[0], sets[1], info.transforms, tuple(duplicates.note(*sets)))


def _plain(info: DatasetInfo, name: str) -> str:
    """MNIST's classes are called "0 - zero" there."""
    return name.partition(" - ")[0] if info.reader == "MNIST" else name


def _found(info: DatasetInfo, parts: Sequence[Sequence[Any]]) -> Found:
    """The files of each class, in the order of torchvision's lists; without a published test set there is none."""
    classes = getattr(parts[0][0], "classes", None) or [str(k) for k in range(info.num_classes or 0)]
    names = [str(name) for name in classes]
    if len(set(names)) != info.num_classes:
        raise ValueError(f"{counted(len(set(names)), 'class', 'classes')}, expected {info.num_classes}")
    by_part: list[dict[str, list[str]]] = []
    broken: dict[str, str] = {}
    for part in parts:
        files: dict[str, list[str]] = {name: [] for name in names}
        for one in part:
            paths, labels = _listed(one)
            _check_labels(info, labels)
            for path, label in zip(paths, labels, strict=True):
                files[names[label]].append(path)
                if fault := fault_of_file(path):
                    broken[path] = fault
        by_part.append(files)
    test = by_part[1] if parts[1] else None
    faults = [
        f"class {name}: no {part} image"
        for part, files in (("training", by_part[0]), ("test", test or {}))
        for name, of_class in files.items()
        if not of_class
    ]
    return Found(by_part[0], test, (), broken, tuple(faults))


def _listed(one: Any) -> tuple[list[str], list[int]]:
    """Paths and labels of a data set of torchvision, which keeps them in one of three forms."""
    pairs = getattr(one, "samples", None) or getattr(one, "_samples", None)
    if pairs is None:
        paths = one._images if hasattr(one, "_images") else one._image_files
        pairs = list(zip(paths, one._labels, strict=True))
    return [str(path) for path, _ in pairs], [int(label) for _, label in pairs]


def _check_labels(info: DatasetInfo, labels: Sequence[int]) -> None:
    if labels and not 0 <= min(labels) <= max(labels) < (info.num_classes or 0):
        raise ValueError(f"labels {min(labels)}..{max(labels)}, expected 0..{(info.num_classes or 0) - 1}")
