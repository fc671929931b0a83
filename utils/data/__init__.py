"""The data sets by name: light facts first, images only when `load` is called.

Importing this module brings in neither torch nor torchvision nor scikit-learn nor matplotlib, because the
configuration is checked against `DATASETS` before any heavy import.

May import utils.files, utils.process and utils.text; never the experiment's configuration, backbone, models or commands.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from utils.data.dataset import Dataset, DatasetInfo

_PILOT = "train/<class> and test/<class> as LAMDA-PILOT packs it: https://github.com/LAMDA-CL/LAMDA-PILOT#datasets"
_TORONTO = "https://www.cs.toronto.edu/~kriz/cifar.html"
_KNOWN = (
    DatasetInfo("digits", 10, 32, "1,797 handwritten digits that ship inside scikit-learn", "embedded", None, "small"),
    DatasetInfo(
        "glyphs", 100, 32, "characters drawn with the fonts that ship inside matplotlib", "embedded", None, "small"
    ),
    DatasetInfo("fractals", 100, 32, "iterated function systems rendered on the spot", "embedded", None, "small"),
    DatasetInfo("domains", 30, 32, "ten classes each of digits, glyphs and fractals", "embedded", None, "small"),
    DatasetInfo("cifar10", 10, 32, f"CIFAR-10, {_TORONTO}", "torchvision", "cifar-10-batches-bin", "cifar"),
    DatasetInfo("cifar100", 100, 32, f"CIFAR-100, {_TORONTO}", "torchvision", "cifar-100-binary", "cifar"),
    DatasetInfo("cifar224", 100, 32, f"CIFAR-100 enlarged, {_TORONTO}", "torchvision", "cifar-100-binary", "imagenet"),
    DatasetInfo("imagenetr", 200, 0, f"ImageNet-R, {_PILOT}", "folders", "imagenet-r", "imagenet"),
    DatasetInfo("imageneta", 200, 0, f"ImageNet-A, {_PILOT}", "folders", "imagenet-a", "imagenet"),
    DatasetInfo("vtab", 50, 0, f"five VTAB sets, {_PILOT}", "folders", "vtab", "imagenet"),
    DatasetInfo("cub", 200, 0, f"CUB-200-2011, {_PILOT}", "folders", "cub", "imagenet"),
    DatasetInfo("omnibenchmark", 300, 0, f"OmniBenchmark, {_PILOT}", "folders", "omnibenchmark", "imagenet"),
    DatasetInfo("objectnet", 200, 0, f"ObjectNet, {_PILOT}", "folders", "objectnet", "imagenet"),
    DatasetInfo("folder", None, 0, "your own class folders, key data_path", "folders", None, "imagenet"),
)
DATASETS: dict[str, DatasetInfo] = {info.name: info for info in _KNOWN}


def load(
    name: str,
    *,
    root: Path | None = None,
    path: Path | None = None,
    test_ratio: float = 0.2,
    download: bool = True,
) -> Dataset:
    """The data set `name`: embedded sets and CIFAR in memory, folder sets as lists of checked files.

    `root` is the data root that holds each set's folder; `path` and `test_ratio` matter to `folder` only.
    CIFAR is downloaded to `root` if it is not there and `download` is true.
    Raises FileNotFoundError where data are missing and ValueError where they are not what they should be; both messages
    name the path looked in and say what to do."""
    info = _info(name)
    if info.kind == "embedded":
        return _embedded(info)
    if info.kind == "torchvision":
        from utils.data import cifar

        return cifar.load(info, _needs(info, root, "data_root"), download=download)
    from utils.data import folders

    if info.folder is None:
        return folders.load(info, _needs(info, path, "data_path"), test_ratio=test_ratio)
    return folders.load(info, _needs(info, root, "data_root") / info.folder)


def missing(name: str, *, root: Path | None = None, path: Path | None = None) -> str | None:
    """None if the data are here, else one line with the path looked in and how to get them. Opens no image.

    Of folder sets the names of the class folders are compared with what `load` expects too."""
    info = _info(name)
    if info.kind == "embedded":
        return None
    if info.kind == "torchvision":
        from utils.data import cifar

        return cifar.missing(info, root)
    from utils.data import folders

    place = path if info.folder is None else root / info.folder if root is not None else None
    return folders.missing(info, place)


def count_classes(name: str, *, root: Path | None = None, path: Path | None = None) -> int | None:
    """Number of classes; for `folder` the class folders under `path`, None if it is not there (`missing` explains)."""
    info = _info(name)
    if info.num_classes is not None or path is None:
        return info.num_classes
    from utils.data import folders

    return folders.count_classes(path)


def _info(name: str) -> DatasetInfo:
    if name not in DATASETS:
        raise ValueError(f"dataset {name!r} is not known; known are {', '.join(DATASETS)}")
    return DATASETS[name]


def _needs(info: DatasetInfo, place: Path | None, key: str) -> Path:
    if place is None:
        raise ValueError(f"dataset {info.name}: the key {key} must say where the images are ({info.source})")
    return Path(place)


def _embedded(info: DatasetInfo) -> Dataset:
    """Every embedded source is a module of that name whose `load()` gives (class names, train images uint8 [N,3,32,32],
    train labels [N], test images, test labels)."""
    from utils.data.images import ImageArray

    names, train, train_labels, test, test_labels = importlib.import_module(f"utils.data.{info.name}").load()
    return Dataset(
        info.name, list(names), ImageArray(train, train_labels), ImageArray(test, test_labels), info.transforms
    )
