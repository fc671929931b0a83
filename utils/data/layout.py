"""Where the class folders of a data set lie: train/ and test/ (or val/) with class folders in each, or class folders alone.

Names of parts are read in any case. What looks like parts of a split and cannot be one is refused: taken for classes, it
would give a number that means nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.data.dataset import DatasetInfo
from utils.data.listing import folders_in, has_folders, images_in
from utils.data.names import listed, readable, same_but_for_form
from utils.text import counted

# What the parts of a split are called, in lower case; the first name is the one we write.
PARTS = {
    "train": ("train", "training", "train_set", "trainset"),
    "test": ("test", "testing", "test_set", "testset"),
    "val": ("val", "valid", "validation", "dev", "val_set"),
}


@dataclass(frozen=True)
class Layout:
    """`train`, `test`: folders of class folders; without `test` a share of each class is held out."""

    train: Path
    test: Path | None
    notes: tuple[str, ...] = ()


def part_of(name: str) -> str | None:
    """train, test or val if `name` is a name of that part in any case, else None."""
    return next((part for part, words in PARTS.items() if name.lower() in words), None)


def find(info: DatasetInfo, folder: Path) -> Layout:
    """The layout of `folder`. Raises FileNotFoundError if a folder is missing, ValueError if what is there is no data set."""
    if not folder.is_dir():
        raise FileNotFoundError(f"dataset {info.name}: no folder {shown(folder)}; needed: {info.source}")
    if info.folder is not None:  # packed by others: exactly these names
        for part in ("train", "test"):
            if not (folder / part).is_dir():
                raise FileNotFoundError(f"dataset {info.name}: no folder {shown(folder / part)}; needed: {info.source}")
        return Layout(folder / "train", folder / "test")
    names = folders_in(folder)
    parts: dict[str, str] = {}
    for part in PARTS:
        called = [name for name in names if part_of(name) == part and has_folders(folder / name)]
        if len(called) > 1 and part not in called and part != "val":
            raise ValueError(f"{shown(folder)}: has {called[0]}/ and {called[1]}/, two folders for {part}; remove one")
        if called:
            parts[part] = part if part in called else called[0]
    if parts:
        return _split(info, folder, parts, names)
    _refuse_what_is_no_class(folder, names)
    return Layout(folder, None, (*_alike(folder, names), *_loose(folder)))


def _split(info: DatasetInfo, folder: Path, parts: dict[str, str], names: Sequence[str]) -> Layout:
    """The layout of a folder that has parts with class folders in them: `parts` by their names."""
    if "train" not in parts:
        flat = next((f"; {name}/ has no class folders" for name in names if part_of(name) == "train"), "")
        raise FileNotFoundError(
            f"dataset {info.name}: no folder {shown(folder / 'train')}; needed: {info.source}{flat}"
        )
    train, notes = folder / parts["train"], []
    if "test" in parts:
        test = parts["test"]
        if "val" in parts:
            notes.append(
                f"{parts['val']}/ is not used, {test}/ is the test set; to score on {parts['val']}/, set data_path to a folder "
                f"with links to {parts['train']}/ and {parts['val']}/ alone"
            )
    elif "val" in parts:
        test = parts["val"]
        notes.append(f"{test}/ is the test set, since there is no test/ with class folders")
    else:
        flat = next((f"; {name}/ has no class folders" for name in names if part_of(name) == "test"), "")
        raise FileNotFoundError(
            f"dataset {info.name}: no folder {shown(folder / 'test')}; needed: {info.source}{flat}; or set data_path to "
            f"{shown(train)}: then a share test_ratio of each class is the test set"
        )
    if train.name != "train" or test not in ("test", "val"):
        notes.append(f"{train.name}/ is read as the training set and {test}/ as the test set, as their names say")
    if others := [name for name in names if name not in parts.values()]:
        notes.append(f"not read, since it lies beside {train.name}/: {listed(others)}")
    return Layout(train, folder / test, (*notes, *_loose(train), *_loose(folder / test)))


def _refuse_what_is_no_class(folder: Path, names: Sequence[str]) -> None:
    """ValueError for folders that are no classes: parts of a split without class folders, or one folder around them all."""
    if names and all(part_of(name) for name in names):
        raise ValueError(
            f"{shown(folder)}: its folders {listed(names)} are called like parts of a split and have no class folders in them; "
            f"expected {names[0]}/<class>/<image>, or a file with the labels in the key data_split"
        )
    if len(names) == 1 and has_folders(folder / names[0]) and not images_in(folder / names[0]):
        inner = folders_in(folder / names[0])
        raise ValueError(
            f"{shown(folder)}: has one folder, {readable(names[0])}, which holds {counted(len(inner), 'folder')} "
            f"({listed(inner, 3)}); set data_path to {shown(folder / names[0])}"
        )


def _alike(folder: Path, names: Sequence[str]) -> list[str]:
    """A note if every folder holds the same folders and no images: they may be parts of a split, or of domains."""
    if len(names) < 2 or images_in(folder / names[0]):
        return []
    first = folders_in(folder / names[0])
    if len(first) < 2 or any(images_in(folder / name) or folders_in(folder / name) != first for name in names[1:]):
        return []
    return [
        f"{listed(names, 3)} are read as {len(names)} classes, and each holds the same {len(first)} folders "
        f"({listed(first, 3)}): if those are the classes, set data_path to one of the {len(names)} folders"
    ]


def _loose(folder: Path) -> list[str]:
    """A note on images beside the class folders, where they belong to no class."""
    count = images_in(folder)
    return [f"not read, since outside of class folders: {counted(count, 'image')} in {shown(folder)}"] if count else []


def check_same_classes(name: str, folders: tuple[Path, Path], train: Sequence[str], test: Sequence[str]) -> None:
    """ValueError with the names that one part has and the other lacks."""
    counts = f"{len(train)} classes in {folders[0].name}, {len(test)} in {folders[1].name}"
    first, second = folders
    ways = [(train, test, first, second), (test, train, second, first)]
    for has, lacks, one, other in ways:
        if extra := sorted(set(has) - set(lacks)):
            verb = "is" if len(extra) == 1 else "are"
            raise ValueError(
                f"dataset {name}: {counted(len(extra), 'class folder')} of {readable(str(one))} {verb} not in "
                f"{readable(str(other))}: {listed(extra)} ({counts}){same_but_for_form(extra, lacks)}"
            )


def shown(path: Path) -> str:
    """A path in full, readable."""
    return readable(os.path.abspath(path))
