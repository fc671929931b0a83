"""Data sets of image files: found in class folders or by a file of labels, looked at, and split into training and test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from utils.data import layout, listing
from utils.data.dataset import DataFaults, Dataset, DatasetInfo, Place, against_published
from utils.data.listing import FilesOf, Found
from utils.data.names import readable
from utils.process.seeds import named_generator
from utils.text import counted

LOOKED_AT = 20_000  # images; of a larger set no header is read before the run starts: --check reads them


def missing(info: DatasetInfo, folder: Place | None, labels: Path | None = None) -> str | None:
    """None if `folder` exists with the expected class folders, else one line for the user. It lists directories and opens no
    image. `labels`: the file of the key data_split."""
    try:
        class_names(info, folder, labels)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    except OSError as error:
        return f"dataset {info.name}: {error.filename} cannot be read: {error.strerror}"
    return None


def class_names(info: DatasetInfo, folder: Place | None, labels: Path | None = None) -> list[str]:
    """The class names in the order of their numbers. ValueError if there are none, a wrong number, or other ones in train/
    than in test/; FileNotFoundError if a folder is missing."""
    if folder is None:
        key = "data_path" if info.folder is None else "data_root"
        raise ValueError(f"dataset {info.name}: the key {key} must say where the images are ({info.source})")
    if isinstance(folder, tuple):
        return _once([(place, class_names(info, place)) for place in folder])
    if labels is not None:
        from utils.data import label_files

        return label_files.class_names(labels, folder)
    return _class_folders(info, layout.find(info, folder))


def load(
    info: DatasetInfo,
    folder: Place,
    *,
    test_ratio: float = 0.2,
    labels: Path | None = None,
    skip_broken: bool = False,
    grey_bits: int | None = None,
    look_at_all: bool = False,
    full: bool = False,
    progress: Callable[[int, int], None] | None = None,
    training_only: bool = False,
) -> Dataset:
    """Lists the images below `folder`, classes and files in plain string order, like torchvision's ImageFolder.

    A class folder is read to any depth, links included. Hidden files, folders of the system and files without an image suffix
    (in any case) are skipped, and counted in a note. `labels`, a file or folder, says instead which image has which label.
    Without a test set (the set `folder` alone) a share `test_ratio` of each class, at least one image, is held out. It depends
    on the file names alone, so every seed is tested on the same images.
    The headers of up to LOOKED_AT images are read, with `look_at_all` those of more; with `full` all images are decoded. With
    `skip_broken` too, and those that cannot be are left out. `progress` is called with (images done, all).
    Raises FileNotFoundError if the folder is missing, DataFaults with everything that is wrong: no images in a class folder,
    empty files, dangling links, images that cannot be read, another number of classes."""
    how: dict[str, Any] = {"skip_broken": skip_broken, "grey_bits": grey_bits, "progress": progress}
    how["training_only"] = training_only
    return checked(info, find(info, folder, labels), test_ratio, look_at_all=look_at_all, full=full, **how)


def checked(
    info: DatasetInfo,
    found: Found,
    test_ratio: float,
    *,
    skip_broken: bool = False,
    grey_bits: int | None = None,
    look_at_all: bool = False,
    full: bool = False,
    progress: Callable[[int, int], None] | None = None,
    training_only: bool = False,
) -> Dataset:
    """The data set of the files in `found`, looked at and split as `load` says. With `training_only` no test image is opened,
    and the set has none."""
    from utils.data import inspection
    from utils.data.images import ImageFiles  # heavy: torch

    if training_only:
        found = _training_part(info, found, test_ratio, skip_broken)
    files = found.files
    whole = look_at_all or full or skip_broken or len(files) <= LOOKED_AT
    looked_at = [file for file in (files if whole else inspection.spread(files)) if file not in found.broken]
    report = inspection.inspect(looked_at, full=full or skip_broken, progress=progress)
    found, left_out = _without_broken(info.name, found, report.broken, skip_broken)
    bits, notes = inspection.grey_bits_of(report.deep_grey, grey_bits)
    train, test = (found.train, found.test) if found.test is not None else _drawn(found.train, test_ratio)
    sets = []
    for files_of in (train, test):
        labelled = [(file, label) for label, files in enumerate(files_of.values()) for file in files]
        sets.append(ImageFiles([file for file, _ in labelled], [label for _, label in labelled], bits))
    from utils.data import duplicates

    if whole and not training_only:
        notes += duplicates.note(*sets)
    names = [readable(name) for name in train]
    loaded = Dataset(info.name, names, sets[0], sets[1], info.transforms, (*found.notes, *notes), left_out)
    return against_published(info, loaded)


def _once(names: Sequence[tuple[Path, Sequence[str]]]) -> list[str]:
    """The class names of several folders, one after the other. ValueError for a class that is in two of them."""
    where: dict[str, Path] = {}
    for place, of_place in names:
        for name in of_place:
            if name in where:
                raise ValueError(
                    f"class {readable(name)} is in {layout.shown(where[name])} and in {layout.shown(place)}"
                )
            where[name] = place
    return list(where)


def _find_all(info: DatasetInfo, places: Sequence[Path]) -> Found:
    """The files of several folders, in the order of `places`."""
    parts = [find(info, place) for place in places]
    _once([(place, list(part.train)) for place, part in zip(places, parts, strict=True)])
    split = {part.test is not None for part in parts}
    if len(split) > 1:
        shown = next(layout.shown(place) for place, part in zip(places, parts, strict=True) if part.test is None)
        raise ValueError(
            f"dataset {info.name}: {shown} has no test images of its classes and another folder has; split all"
        )
    train = {name: files for part in parts for name, files in part.train.items()}
    test = {name: files for part in parts for name, files in (part.test or {}).items()} if split == {True} else None
    broken = {file: why for part in parts for file, why in part.broken.items()}
    notes, faults = (tuple(text for part in parts for text in getattr(part, key)) for key in ("notes", "faults"))
    return Found(train, test, notes, broken, faults)


def find(info: DatasetInfo, folder: Place, labels: Path | None = None) -> Found:
    """The image files of a data set, none of them opened. Raises as `load` does where there are no classes."""
    if isinstance(folder, tuple):
        return _find_all(info, folder)
    if labels is not None:
        from utils.data import label_files

        return label_files.read(labels, folder)
    where = layout.find(info, folder)
    names = _class_folders(info, where)
    parts, skipped, broken, faults = [], Counter[str](), dict[str, str](), list[str]()
    for parent in (where.train, *([where.test] if where.test else [])):
        lists = {name: listing.list_images(parent / name) for name in names}
        parts.append({name: one.files for name, one in lists.items()})
        for one in lists.values():
            skipped += one.skipped
            broken |= one.broken
            faults += one.faults
    if where.test is None:
        faults += [_alone(name, files) for name, files in parts[0].items() if len(files) == 1]
    notes = (*where.notes, *listing.skipped_note(skipped))
    return Found(parts[0], parts[1] if where.test else None, notes, broken, tuple(faults))


def _class_folders(info: DatasetInfo, where: layout.Layout) -> list[str]:
    names = listing.folders_in(where.train)
    if info.num_classes is not None and len(names) != info.num_classes:
        raise ValueError(
            f"dataset {info.name}: {readable(str(where.train))} has {len(names)} class folders, expected "
            f"{info.num_classes}; needed: {info.source}"
        )
    if not names:
        place = readable(str(where.train))
        raise ValueError(f"{place}: has no class folders; expected {place}/<class>/<image>")
    if where.test is not None:
        layout.check_same_classes(info.name, (where.train, where.test), names, listing.folders_in(where.test))
    return names


def _training_part(info: DatasetInfo, found: Found, test_ratio: float, skip_broken: bool) -> Found:
    """The training files of `found`, as a run would split it, and an empty test set.

    Raises ValueError where that split depends on which test images can be decoded."""
    train = found.train
    if found.test is None:
        if skip_broken:
            raise ValueError(
                f"skip_broken: dataset {info.name} has no test set, and which images are drawn for it depends on those that "
                "can be decoded, test images among them; remove the broken files, or give a test set"
            )
        DataFaults.refuse(f"dataset {info.name}", found.faults)
        train, _ = _drawn(found.train, test_ratio)
    files = {file for of_class in train.values() for file in of_class}
    broken = {file: why for file, why in found.broken.items() if file in files}
    return replace(found, train=train, test={}, broken=broken)


def _without_broken(name: str, found: Found, broken: dict[str, str], skip: bool) -> tuple[Found, dict[str, int]]:
    """The files without those that cannot be read, and how many were left out of each part. DataFaults with everything that
    is wrong: faults of classes, and files that cannot be read unless they are to be skipped."""
    reasons = [*found.broken.values(), *broken.values()]
    remedy = "skip_broken=true leaves such files out and counts them" if reasons and not skip else ""
    DataFaults.refuse(name, [*found.faults, *([] if skip else reasons)], remedy)
    if not reasons:
        return found, {"train": 0, "test": 0} if skip else {}
    gone = found.broken.keys() | broken.keys()
    parts, faults, left_out = [], [], {}
    for part, files_of in (("train", found.train), ("test", found.test or {})):
        sound = {name: [f for f in files if f not in gone] for name, files in files_of.items()}
        faults += [
            f"class {readable(name)}: no {part} image of it can be read" for name, files in sound.items() if not files
        ]
        left_out[part] = sum(map(len, files_of.values())) - sum(map(len, sound.values()))
        parts.append(sound)
    if found.test is None:
        faults += [_alone(one, files) for one, files in parts[0].items() if len(files) == 1]
    DataFaults.refuse(f"{name} without what skip_broken leaves out", faults)
    first = "; ".join(reasons[:3]) + "; ..." * (len(reasons) > 3)
    note = f"skip_broken: {len(reasons):,} of {counted(len(found.files), 'image')} left out: {first}"
    test = None if found.test is None else parts[1]
    return replace(found, train=parts[0], test=test, notes=(*found.notes, note)), left_out


def _alone(name: str, files: Sequence[str]) -> str:
    return (
        f"{readable(files[0])}: is the only image of class {readable(name)}; at least two are needed for train and test"
    )


def _drawn(images: FilesOf, ratio: float) -> tuple[FilesOf, FilesOf]:
    """(training, test) files by class: of every class a share `ratio` is for test, drawn from its name and number of files."""
    import torch

    if not 0 < ratio < 1:
        raise ValueError(f"test_ratio: must lie between 0 and 1, got {ratio}")
    train: FilesOf = {}
    test: FilesOf = {}
    for name, files in images.items():
        count = min(max(round(ratio * len(files)), 1), len(files) - 1)
        order = torch.randperm(len(files), generator=named_generator("folder split", name)).tolist()
        held_out = set(order[:count])
        train[name] = [file for k, file in enumerate(files) if k not in held_out]
        test[name] = [file for k, file in enumerate(files) if k in held_out]
    return train, test
