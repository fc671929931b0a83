"""Data sets by name: the facts in DATASETS, the images from `load`; transforms, tasks and batches in a file each.

Importing this package loads no torch, torchvision, scikit-learn or matplotlib: names in experiment files are checked with it.
May import utils.files, utils.process and utils.text; never the experiment's configuration, backbone, models or commands.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.data import folders
from utils.data.dataset import DataFaults as DataFaults
from utils.data.dataset import Dataset, DatasetInfo, Place
from utils.data.names import readable
from utils.data.published import PUBLISHED
from utils.text import nearest

_KNOWN = (
    DatasetInfo("digits", 10, 32, "1,797 handwritten digits that ship inside scikit-learn", "embedded", None, "small"),
    DatasetInfo(
        "glyphs", 100, 32, "characters drawn with the fonts that ship inside matplotlib", "embedded", None, "small"
    ),
    DatasetInfo("fractals", 100, 32, "iterated function systems rendered on the spot", "embedded", None, "small"),
    DatasetInfo(
        "icons",
        100,
        32,
        "100 concepts as 112 icon sets draw them, tested on other designers",
        "embedded",
        None,
        "small",
    ),
    DatasetInfo("fashion", 10, 32, "4,000 photographs of clothes, from Fashion-MNIST", "embedded", None, "small"),
    DatasetInfo("domains", 30, 32, "ten classes each of digits, glyphs and fractals", "embedded", None, "small"),
    *PUBLISHED,
    DatasetInfo("folder", None, 0, "your own class folders, key data_path", "folders", None, "imagenet"),
)
DATASETS: dict[str, DatasetInfo] = {info.name: info for info in _KNOWN}


def places(cfg: Any) -> dict[str, Any]:
    """Where the settings `cfg` say that the data are: arguments of `load`, `missing`, `class_names` and `count_classes`."""
    texts = {"root": cfg.data_root, "path": cfg.data_path, "labels": cfg.data_split}
    return {name: _expanded(text) if text else None for name, text in texts.items()}


def _expanded(text: str | tuple[str, ...]) -> Place:
    return tuple(Path(one).expanduser() for one in text) if isinstance(text, tuple) else Path(text).expanduser()


def reading(cfg: Any) -> dict[str, Any]:
    """How the settings `cfg` say that images are read: further arguments of `load`."""
    keys = ("test_ratio", "skip_broken", "grey_bits", "shots", "imbalance", "imbalance_order", "subset_seed")
    return {key: getattr(cfg, key) for key in keys}


def load(
    name: str,
    *,
    root: Path | None = None,
    path: Place | None = None,
    labels: Path | None = None,
    test_ratio: float = 0.2,
    skip_broken: bool = False,
    grey_bits: int | None = None,
    look_at_all: bool = False,
    full: bool = False,
    progress: Callable[[int, int], None] | None = None,
    shots: int | None = None,
    imbalance: float | None = None,
    imbalance_order: str = "index",
    subset_seed: int = 0,
    training_only: bool = False,
) -> Dataset:
    """The data set `name`: small images in memory, others as lists of checked files.

    `root` is the data root, which has a folder for each set; `path`, `labels` and `test_ratio` are for the set `folder` alone,
    `skip_broken`, `grey_bits`, `look_at_all`, `full` and `progress` for sets of files (utils/data/folders.py). `shots` and the
    keys after it leave out training images (utils/data/subset.py).
    With `training_only` no test image is opened, and the set has none. It downloads nothing. Raises FileNotFoundError where
    data are missing and ValueError where they are damaged; both messages name the path and say what to do."""
    how: dict[str, Any] = {"skip_broken": skip_broken, "grey_bits": grey_bits, "progress": progress}
    how |= {"look_at_all": look_at_all, "full": full, "training_only": training_only}
    whole = _whole(_info(name), root, path, labels, test_ratio, how)
    if shots is None and imbalance is None:
        return whole
    from utils.data import subset

    return subset.reduced(whole, shots, imbalance, imbalance_order, subset_seed)


def _whole(
    info: DatasetInfo,
    root: Path | None,
    path: Place | None,
    labels: Path | None,
    test_ratio: float,
    how: dict[str, Any],
) -> Dataset:
    """The data set with all its training images."""
    if info.kind == "embedded":
        return _embedded(info, how["training_only"])
    if info.kind == "torchvision":
        under = _required(info, root, "data_root")
        if info.reader:
            from utils.data import torchvision_sets

            return torchvision_sets.load(info, under, **how)
        from utils.data import cifar

        return cifar.load(info, under, training_only=how["training_only"])
    if info.folder is None:
        place = path if isinstance(path, tuple) else _required(info, path, "data_path")
        return folders.load(info, place, test_ratio=test_ratio, labels=labels, **how)
    return folders.load(info, _required(info, root, "data_root") / info.folder, **how)


def missing(
    name: str, *, root: Path | None = None, path: Place | None = None, labels: Path | None = None
) -> str | None:
    """None if the data are on this machine, else one line with the path that was searched and how to get them.

    It opens no image. In folder sets it also compares the names of the class folders with what `load` expects."""
    info = _info(name)
    if info.kind == "embedded":
        return None
    if info.kind == "torchvision":
        if info.reader:
            from utils.data import torchvision_sets

            return torchvision_sets.missing(info, root)
        from utils.data import cifar

        return cifar.missing(info, root)
    return folders.missing(info, _folder(info, root, path), labels)


def is_absent(name: str, *, root: Path | None = None, path: Place | None = None, labels: Path | None = None) -> bool:
    """Whether there is nothing at all where the data are looked for, so that they may be on another machine."""
    info = _info(name)
    if info.kind == "torchvision":
        return missing(name, root=root) is not None
    folder = _folder(info, root, path)
    places = folder if isinstance(folder, tuple) else (folder,)
    return info.kind == "folders" and any(place is None or not place.exists() for place in places)


def class_names(
    name: str, *, root: Path | None = None, path: Place | None = None, labels: Path | None = None
) -> list[str] | None:
    """The class names of a set of files, readable; None if they are missing (`missing` explains) or the set has none there."""
    info = _info(name)
    if info.kind != "folders":
        return None
    try:
        return [readable(text) for text in folders.class_names(info, _folder(info, root, path), labels)]
    except (OSError, ValueError):
        return None


def count_classes(
    name: str, *, root: Path | None = None, path: Place | None = None, labels: Path | None = None
) -> int | None:
    """Number of classes; for the set `folder` those under `path`, None if that is missing (`missing` explains)."""
    info = _info(name)
    if info.num_classes is not None or path is None:
        return info.num_classes
    names = class_names(name, root=root, path=path, labels=labels)
    return None if names is None else len(names)


def shipped_names(name: str) -> tuple[str, ...]:
    """Class names of an embedded set whose images lie in utils/data/shipped, read without them; () for any other set."""
    file = Path(__file__).parent / "shipped" / f"{name}.npz"
    if not file.is_file():
        return ()
    import numpy as np

    with np.load(file, allow_pickle=False) as arrays:
        return tuple(arrays["classes"].tolist())


def _folder(info: DatasetInfo, root: Path | None, path: Place | None) -> Place | None:
    return path if info.folder is None else root / info.folder if root is not None else None


def _info(name: str) -> DatasetInfo:
    if name not in DATASETS:
        raise ValueError(f"dataset {name!r} is not known{nearest(name, DATASETS)}; known are {', '.join(DATASETS)}")
    return DATASETS[name]


def _required(info: DatasetInfo, path: Path | None, key: str) -> Path:
    """`path`; ValueError if the experiment's key `key`, which sets it, is missing."""
    if path is None:
        raise ValueError(f"dataset {info.name}: the key {key} must say where the images are ({info.source})")
    return Path(path)


def _embedded(info: DatasetInfo, training_only: bool = False) -> Dataset:
    """Loads an embedded set: the module of that name has `load()`, which returns (class names, training images uint8
    [N, 3, 32, 32], training labels [N], test images, test labels)."""
    from utils.data.images import ImageArray

    names, *parts = importlib.import_module(f"{__name__}.{info.name}").load()
    train = ImageArray(*parts[:2])
    test = train.without_images() if training_only else ImageArray(*parts[2:])
    return Dataset(info.name, list(names), train, test, info.transforms)
