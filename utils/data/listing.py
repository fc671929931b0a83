"""Which files below a class folder are images, and what else lies there: other files, links, folders of the system."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from utils.data.names import readable
from utils.text import counted

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp", ".avif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".ico", ".tga"),
)
# Folders that systems, shares and editors put beside images; thumbnails and copies, no data. Hidden ones are left out anyway.
SYSTEM_FOLDERS = frozenset(
    {"@eadir", "@__thumb", "@recycle", "#recycle", "#snapshot", "__macosx", "$recycle.bin", "system volume information"}
    | {"lost+found", "__pycache__", "recycler"}
)
SYSTEM_FILES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "picasa.ini", "icon\r"})


FilesOf = dict[str, list[str]]  # class name: its sorted files


@dataclass(frozen=True)
class Found:
    """The image files of a data set by class, in the order of the class numbers; without `test` it is still to be drawn.

    `broken`: {file: why} of those that cannot be images, as far as it shows without opening them; `faults` of classes."""

    train: FilesOf
    test: FilesOf | None
    notes: tuple[str, ...] = ()
    broken: dict[str, str] = field(default_factory=dict)
    faults: tuple[str, ...] = ()

    @property
    def files(self) -> list[str]:
        """All files, those for training first."""
        return [file for part in (self.train, self.test or {}) for files in part.values() for file in files]


@dataclass
class Listing:
    """`files`: sorted paths of the images below a folder; `skipped`: other files by suffix; `broken`: {file: why} of images
    that are empty or gone; `faults` of the folder, one line each."""

    files: list[str]
    skipped: Counter[str] = field(default_factory=Counter)
    broken: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def is_system(name: str) -> bool:
    """Whether a file or folder is hidden or the system's."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS | SYSTEM_FILES


def has_folders(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` is one that holds others, those of the system apart."""
    return os.path.isdir(folder) and any(_is_folder(entry) for entry in os.scandir(folder) if not is_system(entry.name))


def folders_in(folder: str | os.PathLike[str]) -> list[str]:
    """The sorted names of the folders in `folder`, without those of the system. ValueError for a dangling link or one that
    leads to a folder above."""
    real = os.path.realpath(folder)
    names = sorted(name for name in os.listdir(folder) if not is_system(name))
    for name in names:
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            raise ValueError(f"{readable(path)}: is a dangling link; remove it")
        if os.path.isdir(path) and _contains(os.path.realpath(path), real):
            raise ValueError(f"{readable(path)}: is a link to a folder that contains it; remove it")
    return [name for name in names if os.path.isdir(os.path.join(folder, name))]


def images_in(folder: str | os.PathLike[str]) -> int:
    """How many images lie in `folder` itself."""
    return sum(is_image(entry.name) and not _is_folder(entry) for entry in os.scandir(folder))


def is_image(name: str) -> bool:
    """Whether a file name has the suffix of an image and is no hidden file."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not is_system(name)


def list_images(folder: str | os.PathLike[str], what: str = "class folder") -> Listing:
    """The images below a folder, at any depth; `what` it is. Links to files and folders are followed, as torchvision does."""
    listing = Listing([])
    for path in _files(os.fspath(folder), (os.path.realpath(folder),), listing.faults):
        name = os.path.basename(path)
        if not is_image(name):
            listing.skipped[os.path.splitext(name)[1].lower() or "without suffix"] += 1
            continue
        listing.files.append(path)
        if fault := fault_of_file(path):
            listing.broken[path] = fault
    if not listing.files and not listing.faults:
        others = f" ({_kinds(listing.skipped)} skipped)" if listing.skipped else ""
        listing.faults.append(f"{readable(os.fspath(folder))}: is a {what} without images{others}")
    listing.files.sort()
    return listing


def fault_of_file(path: str) -> str | None:
    """Why a file cannot be an image, without opening it; None if it can."""
    try:
        facts = os.stat(path)
    except OSError as error:
        what = "is a dangling link; remove it" if os.path.islink(path) else f"cannot be read: {error.strerror}"
        return f"{readable(path)}: {what}"
    if stat.S_ISDIR(facts.st_mode):
        return f"{readable(path)}: is a folder with the name of an image; rename it"
    if not stat.S_ISREG(facts.st_mode):
        return f"{readable(path)}: is a pipe or device, no file; remove it"
    return f"{readable(path)}: is an empty file; replace or remove it" if facts.st_size == 0 else None


def skipped_note(skipped: Counter[str], where: str = " in class folders") -> list[str]:
    """One line on the files that were passed over, by suffix; none if there were none."""
    if not (total := skipped.total()):
        return []
    return [f"{counted(total, 'file')}{where} skipped, since the name is not that of an image: {_kinds(skipped)}"]


def _kinds(skipped: Counter[str]) -> str:
    """How many files of each suffix."""
    more = f" and {len(skipped) - 8} more kinds" if len(skipped) > 8 else ""
    return ", ".join(f"{count:,} {readable(suffix)}" for suffix, count in skipped.most_common(8)) + more


def _files(folder: str, above: tuple[str, ...], faults: list[str]) -> Iterator[str]:
    """Every file below `folder`; `above`: the real paths of the folders on the way, to which no link may lead back."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        faults.append(f"{readable(folder)}: cannot be read: {error.strerror}")
        return
    for entry in entries:
        if is_system(entry.name):
            continue
        if not _is_folder(entry):
            yield entry.path
            continue
        real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(above[-1], entry.name)
        if any(_contains(real, place) for place in above):
            faults.append(f"{readable(entry.path)}: is a link to a folder that contains it; remove it")
        else:
            yield from _files(entry.path, (*above, real), faults)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _contains(outer: str, inner: str) -> bool:
    """Whether the real path `outer` is `inner` or a folder above it."""
    return f"{inner}{os.sep}".startswith(outer if outer.endswith(os.sep) else f"{outer}{os.sep}")
