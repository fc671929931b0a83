"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from the official files, which `--data fetch` downloads.

It downloads the binary version, which needs no unpickling. The python version, which torchvision's CIFAR classes leave in a
data folder, is read as well (utils/data/cifar_pickle.py), by an unpickler that builds plain values and bytes alone.
Formats: https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.data import cifar_pickle
from utils.data.dataset import Dataset, DatasetInfo
from utils.data.fetch import absent

_PIXELS = 3 * 32 * 32
TRAIN_IMAGES, TEST_IMAGES = 50_000, 10_000


@dataclass(frozen=True)
class _Layout:
    """Names inside the official archives. A binary record has `label_bytes` labels before its pixels; we use the last."""

    binary: str
    binary_train: tuple[str, ...]
    binary_test: str
    names: str
    label_bytes: int
    python: str
    python_train: tuple[str, ...]
    python_test: str
    label_key: str
    names_file: str
    names_key: str
    classes: int


_TEN = _Layout(
    binary="cifar-10-batches-bin",
    binary_train=tuple(f"data_batch_{k}.bin" for k in range(1, 6)),
    binary_test="test_batch.bin",
    names="batches.meta.txt",
    label_bytes=1,
    python="cifar-10-batches-py",
    python_train=tuple(f"data_batch_{k}" for k in range(1, 6)),
    python_test="test_batch",
    label_key="labels",
    names_file="batches.meta",
    names_key="label_names",
    classes=10,
)
_HUNDRED = _Layout(
    binary="cifar-100-binary",
    binary_train=("train.bin",),
    binary_test="test.bin",
    names="fine_label_names.txt",
    label_bytes=2,
    python="cifar-100-python",
    python_train=("train",),
    python_test="test",
    label_key="fine_labels",
    names_file="meta",
    names_key="fine_label_names",
    classes=100,
)


def _layout(info: DatasetInfo) -> _Layout:
    return _TEN if info.num_classes == 10 else _HUNDRED


def missing(info: DatasetInfo, root: Path | None) -> str | None:
    """None if all files of the binary or the python version are under `root`, else one line for the user."""
    if root is None:
        return f"dataset {info.name}: the key data_root must say where the files are ({info.source})"
    layout = _layout(info)
    if _has_binary(layout, root) or _has_python(layout, root):
        return None
    return absent(info, root, f"neither {layout.binary} nor {layout.python} is complete in {root.absolute()}")


def load(info: DatasetInfo, root: Path, training_only: bool = False) -> Dataset:
    """Training and test images in memory, uint8 [50000, 3, 32, 32] and [10000, 3, 32, 32]; classes in the official order.

    With `training_only` the test file is not opened, and the set has no test images.
    Raises FileNotFoundError if the files are missing, ValueError if they are not the official ones."""
    from utils.data import duplicates  # heavy: torch
    from utils.data.images import ImageArray

    layout = _layout(info)
    if lacking := missing(info, root):
        raise FileNotFoundError(lacking)
    reader = _read_binary if _has_binary(layout, root) else _read_python
    names, train, test = reader(layout, root, not training_only)
    parts = [("training", train, TRAIN_IMAGES), *([("test", test, TEST_IMAGES)] if test else [])]
    for split, (images, labels), expected in parts:
        if len(images) != expected:
            raise ValueError(
                f"dataset {info.name}: {len(images)} {split} images under {root}, expected {expected}; unpack again"
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < layout.classes:
            raise ValueError(
                f"dataset {info.name}: {split} labels {labels.min()}..{labels.max()} under {root}, "
                f"expected 0..{layout.classes - 1}; unpack again"
            )
    if len(names) != layout.classes:
        raise ValueError(
            f"dataset {info.name}: {len(names)} class names under {root}, expected {layout.classes}; unpack again"
        )
    sets = ImageArray(*train), ImageArray(*(test or (train[0][:0], train[1][:0])))
    if not test:
        return Dataset(info.name, names, *sets, info.transforms)
    return Dataset(info.name, names, *sets, info.transforms, tuple(duplicates.note(*sets)), as_published=True)


def _has_binary(layout: _Layout, root: Path) -> bool:
    wanted = (*layout.binary_train, layout.binary_test, layout.names)
    return all((root / layout.binary / name).is_file() for name in wanted)


def _has_python(layout: _Layout, root: Path) -> bool:
    wanted = (*layout.python_train, layout.python_test, layout.names_file)
    return all((root / layout.python / name).is_file() for name in wanted)


Labelled = tuple[np.ndarray, np.ndarray]  # images uint8 [N, 3, 32, 32], labels int64 [N]


def _read_binary(layout: _Layout, root: Path, with_test: bool = True) -> tuple[list[str], Labelled, Labelled | None]:
    folder = root / layout.binary
    try:
        names = (folder / layout.names).read_text(encoding="utf-8").split()
    except UnicodeDecodeError as error:
        raise ValueError(f"{folder / layout.names}: is not text (byte {error.start}); unpack it again") from None
    train = [_records(folder / name, layout.label_bytes) for name in layout.binary_train]
    test = _records(folder / layout.binary_test, layout.label_bytes) if with_test else None
    return names, _joined(train), test


def _records(path: Path, label_bytes: int) -> Labelled:
    """Images and labels of a file of records <label bytes><3072 pixel bytes>, red plane first."""
    raw = np.fromfile(path, dtype=np.uint8)
    if len(raw) % (label_bytes + _PIXELS):
        raise ValueError(
            f"{path}: {len(raw)} bytes are not a whole number of {label_bytes + _PIXELS}-byte records; unpack it again"
        )
    table = raw.reshape(-1, label_bytes + _PIXELS)
    return table[:, label_bytes:].reshape(-1, 3, 32, 32).copy(), table[:, label_bytes - 1].astype(np.int64)


def _joined(files: list[Labelled]) -> Labelled:
    return np.concatenate([images for images, _ in files]), np.concatenate([labels for _, labels in files])


def _read_python(layout: _Layout, root: Path, with_test: bool = True) -> tuple[list[str], Labelled, Labelled | None]:
    folder = root / layout.python
    names = cifar_pickle.read(folder / layout.names_file).get(layout.names_key)
    if not isinstance(names, list):
        raise ValueError(f"{folder / layout.names_file}: has no list {layout.names_key!r}; unpack it again")
    train = [_batch(folder / name, layout.label_key) for name in layout.python_train]
    test = _batch(folder / layout.python_test, layout.label_key) if with_test else None
    return [str(name) for name in names], _joined(train), test


def _batch(path: Path, label_key: str) -> Labelled:
    content = cifar_pickle.read(path)
    pixels, labels = content.get("data"), content.get(label_key)
    shape = getattr(pixels, "shape", None)
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (_PIXELS,):
        raise ValueError(
            f"{path}: 'data' should be uint8 [N, {_PIXELS}], it is {type(pixels).__name__} {shape}; unpack it again"
        )
    if not isinstance(labels, list) or len(labels) != len(pixels) or not all(type(k) is int for k in labels):
        raise ValueError(f"{path}: {label_key!r} should be a list of {len(pixels)} whole numbers; unpack it again")
    return pixels.reshape(-1, 3, 32, 32).copy(), np.asarray(labels, dtype=np.int64)
