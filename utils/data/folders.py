"""Data sets in class folders: `train/<class>/<image>` and `test/<class>/<image>` as LAMDA-PILOT, or class folders alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from utils.data.dataset import Dataset, DatasetInfo
from utils.process.seeds import named_generator

SPLITS = ("train", "test")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm")


def missing(info: DatasetInfo, folder: Path | None) -> str | None:
    """None if `folder` exists with the expected class folders, else one line for the user. It lists directories and opens no
    image."""
    try:
        fault = _absent(info, folder)
        if fault is None and folder is not None:
            _class_names(info, folder)
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"dataset {info.name}: {error.filename} cannot be read: {error.strerror}"
    return fault


def _absent(info: DatasetInfo, folder: Path | None) -> str | None:
    """One line on the first folder that is missing, None if all exist."""
    if folder is None:
        key = "data_path" if info.folder is None else "data_root"
        return f"dataset {info.name}: the key {key} must say where the images are ({info.source})"
    if not folder.is_dir():
        return f"dataset {info.name}: no folder {folder.absolute()}; needed: {info.source}"
    absent = [split for split in SPLITS if not (folder / split).is_dir()]
    if absent and (info.folder is not None or any(_has_folders(folder / split) for split in SPLITS)):
        return f"dataset {info.name}: no folder {(folder / absent[0]).absolute()}; needed: {info.source}"
    return None


def count_classes(path: Path) -> int | None:
    """The number of classes that `load` would read from `path`, by folder names; None if they cannot be read."""
    try:
        return len(_class_folders(path / "train" if _has_folders(path / "train") else path))
    except (OSError, ValueError):
        return None


def load(info: DatasetInfo, folder: Path, *, test_ratio: float = 0.2) -> Dataset:
    """Lists the images below `folder`, classes and files in plain string order, like torchvision's ImageFolder.

    A class folder is read to any depth. Hidden files and files without an image suffix (in any case) are skipped. Empty image
    files, dangling links and class folders without an image are refused. Links to class folders and to files are followed;
    links to folders further down are not, and a link to a folder that contains it is refused.
    Without train/ and test/ (the set `folder` alone) a share `test_ratio` of each class, at least one image, is the test
    set. It depends on the file names alone, so every seed is tested on the same images.
    A train/ that has images and no folders is a class named "train".
    Raises FileNotFoundError if the folder is missing, ValueError with both numbers if the number of classes is wrong."""
    from utils.data.images import ImageFiles  # heavy: torch

    fault = _absent(info, folder)
    if fault:
        raise FileNotFoundError(fault)
    names = _class_names(info, folder)
    if _is_split(info, folder):
        train, test = (_images(folder / split, names) for split in SPLITS)
    else:
        train, test = _split(_images(folder, names), test_ratio)
    sets = []
    for files_of in (train, test):
        labelled = [(file, label) for label, name in enumerate(names) for file in files_of[name]]
        sets.append(ImageFiles([file for file, _ in labelled], [label for _, label in labelled]))
    return Dataset(info.name, names, sets[0], sets[1], info.transforms)


def _is_split(info: DatasetInfo, folder: Path) -> bool:
    """Whether `folder` has train/ and test/, not class folders directly."""
    return info.folder is not None or _has_folders(folder / "train")


def _class_names(info: DatasetInfo, folder: Path) -> list[str]:
    """The sorted class names. ValueError if there are none, a wrong number, or other ones in train/ than in test/."""
    split = _is_split(info, folder)
    parent = folder / "train" if split else folder
    names = _class_folders(parent)
    if info.num_classes is not None and len(names) != info.num_classes:
        raise ValueError(
            f"dataset {info.name}: {parent} has {len(names)} class folders, expected "
            f"{info.num_classes}; needed: {info.source}"
        )
    if not names:
        raise ValueError(f"{parent}: has no class folders; expected {parent}/<class>/<image>")
    if split:
        _check_same_classes(info.name, folder, names, _class_folders(folder / "test"))
    return names


def _has_folders(folder: Path) -> bool:
    return folder.is_dir() and any(entry.is_dir() for entry in os.scandir(folder) if not entry.name.startswith("."))


def _class_folders(folder: Path) -> list[str]:
    """The sorted names of the folders in `folder`, without hidden ones. ValueError for a dangling link or one that leads to a
    folder above."""
    real = os.path.realpath(folder)
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    for name in names:
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            raise ValueError(f"{path}: is a dangling link; remove it")
        if os.path.isdir(path) and f"{real}{os.sep}".startswith(f"{os.path.realpath(path)}{os.sep}"):
            raise ValueError(f"{path}: is a link to a folder that contains it; remove it")
    return [name for name in names if os.path.isdir(os.path.join(folder, name))]


def _images(folder: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """{class name: its sorted image files}."""
    return {name: _files(folder / name) for name in names}


def _files(folder: Path) -> list[str]:
    """The sorted image files below a class folder, at any depth. ValueError if there are none or one is empty."""
    images: list[str] = []
    others = 0
    for parent, subfolders, names in os.walk(folder, onerror=_refuse, followlinks=False):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            if name.startswith("."):
                continue
            if not name.lower().endswith(IMAGE_SUFFIXES):
                others += 1
                continue
            path = os.path.join(parent, name)
            try:
                size = os.stat(path).st_size
            except OSError:
                raise ValueError(f"{path}: is a dangling link; remove it") from None
            if size == 0:
                raise ValueError(f"{path}: is an empty file; replace or remove it")
            images.append(path)
    if not images:
        also = f" (only {others} files of other kinds)" if others else ""
        raise ValueError(
            f"{folder}: class folder without images{also}; expected files ending in {' '.join(IMAGE_SUFFIXES)}"
        )
    return sorted(images)


def _refuse(error: OSError) -> None:
    raise ValueError(f"{error.filename}: cannot be read: {error.strerror}")


def _check_same_classes(name: str, folder: Path, train: Sequence[str], test: Sequence[str]) -> None:
    for has, lacks, one, other in ((train, test, "train", "test"), (test, train, "test", "train")):
        extra = sorted(set(has) - set(lacks))
        if extra:
            first = ", ".join(extra[:10]) + (", ..." if len(extra) > 10 else "")
            raise ValueError(
                f"dataset {name}: {len(extra)} class folders of {folder / one} are not in {folder / other}: {first} "
                f"({len(train)} classes in train, {len(test)} in test)"
            )


def _split(images: dict[str, list[str]], ratio: float) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """(training, test) files by class: of every class a share `ratio` is for test, drawn from its name and number of files."""
    import torch

    if not 0 < ratio < 1:
        raise ValueError(f"test_ratio: must lie between 0 and 1, got {ratio}")
    train: dict[str, list[str]] = {}
    test: dict[str, list[str]] = {}
    for name, files in images.items():
        if len(files) < 2:
            raise ValueError(
                f"{files[0]}: is the only image of class {name}; at least two are needed for train and test"
            )
        count = min(max(round(ratio * len(files)), 1), len(files) - 1)
        order = torch.randperm(len(files), generator=named_generator("folder split", name)).tolist()
        held_out = set(order[:count])
        train[name] = [file for k, file in enumerate(files) if k not in held_out]
        test[name] = [file for k, file in enumerate(files) if k in held_out]
    return train, test
