"""Test images that are also training images, by their content: accuracy on them says nothing about new images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from utils.data.images import ImageArray, ImageFiles
from utils.data.names import readable
from utils.text import counted

PIECE = 4096  # bytes compared first, from the middle of files of one size


def note(train: Any, test: Any) -> list[str]:
    """A line that counts the test images with the same content as a training image; none if there are none, or if the sets are
    neither files nor in memory."""
    if isinstance(train, ImageFiles) and isinstance(test, ImageFiles):
        pairs = _same_files(train.paths, test.paths)
    elif isinstance(train, ImageArray) and isinstance(test, ImageArray):
        pairs = _same_arrays(train, test)
    else:
        return []
    if not pairs:
        return []
    first = "; ".join(f"{one} is {other}" for one, other in pairs[:3])
    verb = "is also a training image" if len(pairs) == 1 else "are also training images"
    return [
        f"{len(pairs):,} of {counted(len(test), 'test image')} {verb}, byte for byte ({first}): accuracy on them says "
        "nothing about new images"
    ]


def _same_files(train: Iterable[str], test: Iterable[str]) -> list[tuple[str, str]]:
    """(test file, training file with the same content). Sizes are compared first, then PIECE bytes, then all bytes."""
    old, new = _by(_size, train), _by(_size, test)
    old, new = _narrowed(old, new, _piece)
    old, new = _narrowed(old, new, _whole)
    return [
        (readable(_short(file)), readable(_short(old[key][0]))) for key in old.keys() & new.keys() for file in new[key]
    ]


def _narrowed(old: dict[Any, list[str]], new: dict[Any, list[str]], key: Any) -> tuple[dict[Any, list[str]], ...]:
    both = old.keys() & new.keys()
    return tuple(_by(key, (file for k in sorted(both) for file in files[k])) for files in (old, new))


def _by(key: Any, files: Iterable[str]) -> dict[Any, list[str]]:
    groups: dict[Any, list[str]] = {}
    for file in files:
        if (value := key(file)) is not None:
            groups.setdefault(value, []).append(file)
    return groups


def _size(file: str) -> int | None:
    try:
        return os.stat(file).st_size
    except OSError:
        return None


def _piece(file: str) -> bytes | None:
    try:
        with open(file, "rb", buffering=0) as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(max(0, size // 2 - PIECE // 2))
            return size.to_bytes(8, "little") + hashlib.blake2b(opened.read(PIECE), digest_size=16).digest()
    except OSError:
        return None


def _whole(file: str) -> bytes | None:
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "blake2b").digest() if hasattr(hashlib, "file_digest") else _slow(opened)
    except OSError:
        return None


def _slow(opened: Any) -> bytes:  # Python 3.10
    return hashlib.blake2b(opened.read()).digest()


def _short(file: str) -> str:
    """The last three parts of a path: part, class and name."""
    return str(Path(*Path(file).parts[-3:]))


def _same_arrays(train: ImageArray, test: ImageArray) -> list[tuple[str, str]]:
    """(test image, training image of equal pixels), by their numbers."""
    old: dict[bytes, int] = {}
    for row, image in enumerate(train.images.numpy()):
        old.setdefault(hashlib.blake2b(image.tobytes(), digest_size=16).digest(), row)
    pairs = []
    for row, image in enumerate(test.images.numpy()):
        twin = old.get(hashlib.blake2b(image.tobytes(), digest_size=16).digest())
        if twin is not None:
            pairs.append((f"test image {row}", f"training image {twin}"))
    return pairs
