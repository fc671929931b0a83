"""Data sets in class folders: LAMDA-PILOT's `train/<class>/<image>` and `test/...`, or class folders alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from utils.data.dataset import Dataset, DatasetInfo

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm")


def missing(info: DatasetInfo, place: Path | None) -> str | None:
    """None if the folder stands where it should with the class folders it should have, else one line for the user.

    Directories are listed, no image is looked at."""
    try:
        fault = _absent(info, place)
        if fault is None and place is not None:
            _class_names(info, place)
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"dataset {info.name}: {error.filename} cannot be read: {error.strerror}"
    return fault


def _absent(info: DatasetInfo, place: Path | None) -> str | None:
    """One line on the folder that is not there, None if all are."""
    if place is None:
        key = "data_path" if info.folder is None else "data_root"
        return f"dataset {info.name}: the key {key} must say where the images are ({info.source})"
    if not place.is_dir():
        return f"dataset {info.name}: no folder {place.absolute()}; needed: {info.source}"
    absent = [part for part in ("train", "test") if not (place / part).is_dir()]
    if absent and (info.folder is not None or any(_holds_folders(place / part) for part in ("train", "test"))):
        return f"dataset {info.name}: no folder {(place / absent[0]).absolute()}; needed: {info.source}"
    return None


def count_classes(path: Path) -> int | None:
    """Classes `load` would find in `path`, from the names of the folders; None if they cannot be read."""
    try:
        return len(_class_folders(path / "train" if _holds_folders(path / "train") else path))
    except (OSError, ValueError):
        return None


def load(info: DatasetInfo, place: Path, *, test_ratio: float = 0.2) -> Dataset:
    """Lists the images below `place`, classes and files in plain string order as torchvision's ImageFolder has them.

    A class folder is read to any depth. Files without an image suffix (any case) and hidden files are passed over;
    empty image files, dangling links and class folders without an image are refused. Links to class folders and to
    files are followed, links below a class folder and links back to a folder above are not.
    Without train/ and test/ (`folder` only) a share `test_ratio` of each class, at least one image, is held out: always
    the same one for the same file names, so that runs of every seed are tested on the same images.
    A train/ that holds images and no folders is a class of that name.
    Raises FileNotFoundError if the folder is missing, ValueError with both numbers if the count of classes is wrong."""
    from utils.data.dataset import Dataset
    from utils.data.images import ImageFiles

    fault = _absent(info, place)
    if fault:
        raise FileNotFoundError(fault)
    names = _class_names(info, place)
    if _in_parts(info, place):
        train, test = _images(place / "train", names), _images(place / "test", names)
    else:
        train, test = _split(_images(place, names), test_ratio)
    parts = [[(file, label) for label, name in enumerate(names) for file in part[name]] for part in (train, test)]
    sets = [ImageFiles([file for file, _ in part], [label for _, label in part]) for part in parts]
    return Dataset(info.name, names, sets[0], sets[1], info.transforms)


def _in_parts(info: DatasetInfo, place: Path) -> bool:
    """Whether `place` is read as train/ and test/ instead of as class folders."""
    return info.folder is not None or _holds_folders(place / "train")


def _class_names(info: DatasetInfo, place: Path) -> list[str]:
    """Names of the classes, sorted. ValueError if there are none, not as many as known, or not the same in both parts."""
    parts = _in_parts(info, place)
    folder = place / "train" if parts else place
    names = _class_folders(folder)
    if info.num_classes is not None and len(names) != info.num_classes:
        raise ValueError(
            f"dataset {info.name}: {folder} holds {len(names)} class folders, expected "
            f"{info.num_classes}; needed: {info.source}"
        )
    if not names:
        raise ValueError(f"{folder}: holds no class folders; expected {folder}/<class>/<image>")
    if parts:
        _same_classes(info.name, place, names, _class_folders(place / "test"))
    return names


def _holds_folders(place: Path) -> bool:
    return place.is_dir() and any(entry.is_dir() for entry in os.scandir(place) if not entry.name.startswith("."))


def _class_folders(place: Path) -> list[str]:
    """Names of the folders in `place`, sorted, hidden ones left out. ValueError for a link to nowhere or back up."""
    here = os.path.realpath(place)
    names = sorted(name for name in os.listdir(place) if not name.startswith("."))
    for name in names:
        path = os.path.join(place, name)
        if not os.path.exists(path):
            raise ValueError(f"{path}: is a dangling link; remove it")
        if os.path.isdir(path) and f"{here}{os.sep}".startswith(f"{os.path.realpath(path)}{os.sep}"):
            raise ValueError(f"{path}: is a link to a folder that contains it; remove it")
    return [name for name in names if os.path.isdir(os.path.join(place, name))]


def _images(place: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """Class name to its image files, these sorted."""
    return {name: _files(place / name) for name in names}


def _files(folder: Path) -> list[str]:
    found: list[str] = []
    others = 0
    for where, below, names in os.walk(folder, onerror=_refuse, followlinks=False):
        below[:] = [b for b in below if not b.startswith(".")]
        for name in names:
            if name.startswith("."):
                continue
            if not name.lower().endswith(IMAGE_SUFFIXES):
                others += 1
                continue
            path = os.path.join(where, name)
            try:
                size = os.stat(path).st_size
            except OSError:
                raise ValueError(f"{path}: is a dangling link; remove it") from None
            if size == 0:
                raise ValueError(f"{path}: is an empty file; replace or remove it")
            found.append(path)
    if not found:
        also = f" (only {others} files of other kinds)" if others else ""
        raise ValueError(
            f"{folder}: class folder without images{also}; expected files ending in {' '.join(IMAGE_SUFFIXES)}"
        )
    return sorted(found)


def _refuse(error: OSError) -> None:
    raise ValueError(f"{error.filename}: cannot be read: {error.strerror}")


def _same_classes(name: str, place: Path, train: Sequence[str], test: Sequence[str]) -> None:
    for has, lacks, one, other in ((train, test, "train", "test"), (test, train, "test", "train")):
        extra = sorted(set(has) - set(lacks))
        if extra:
            shown = ", ".join(extra[:10]) + (", ..." if len(extra) > 10 else "")
            raise ValueError(
                f"dataset {name}: {len(extra)} class folders of {place / one} are not in {place / other}: {shown} "
                f"({len(train)} classes in train, {len(test)} in test)"
            )


def _split(images: dict[str, list[str]], ratio: float) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Holds out a share of every class. A class's draw depends on its own name and number of files only."""
    import torch

    from utils.process.seeds import named_generator

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
        draw = torch.randperm(len(files), generator=named_generator("folder split", name)).tolist()
        held = set(draw[:count])
        train[name] = [file for k, file in enumerate(files) if k not in held]
        test[name] = [file for k, file in enumerate(files) if k in held]
    return train, test
