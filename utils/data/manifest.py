"""What data a run was computed from: class names, image files with their sizes and times, and digests of their content.

A manifest is made from names, sizes and times alone, without opening an image. Where a file has another time later, its
content decides: its digest is taken when the run first reads the image (`Contents`), and compared when a later process does.
Images in memory are digested whole. Letters: N images, those for training before those for test.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from utils.data.dataset import Dataset
from utils.files import storage
from utils.text import printable, shortened

SHOWN = 3  # names in a sentence


@dataclass(frozen=True)
class Manifest:
    """`classes`: names in the order of the labels; `train`: how many of the N images are for training; `names`: files below
    their common folder `root`; `labels`, `sizes` (bytes), `times` (ns): int64 [N]. Of images in memory there are no names,
    sizes and times, and `pixels` is their digest."""

    classes: tuple[str, ...]
    train: int
    labels: np.ndarray
    names: tuple[str, ...]
    sizes: np.ndarray
    times: np.ndarray
    root: str = ""
    pixels: str = ""

    @cached_property
    def digest(self) -> str:
        """16 hex digits over class names, labels, file names and sizes, or pixels; not over times and the folder's place."""
        return self._hashed(b"")

    @cached_property
    def stamp(self) -> str:
        """As `digest`, and over the times: while it is the same, no file was written."""
        return self._hashed(self.times.tobytes()) if self.names else self.digest

    def _hashed(self, more: bytes) -> str:
        digest = hashlib.sha256(json.dumps([self.classes, self.train, self.pixels]).encode())
        digest.update(_joined(self.names))
        for values in (self.labels, self.sizes):
            digest.update(values.astype(np.int64).tobytes())
        digest.update(more)
        return digest.hexdigest()[:16]

    def place(self, row: int) -> str:
        """The path of image `row`."""
        return os.path.join(self.root, self.names[row])


def of(dataset: Dataset) -> Manifest:
    """The manifest of a data set as it is now. A file that is gone has size -1."""
    labels = np.concatenate([np.asarray(images.labels, dtype=np.int64) for images in (dataset.train, dataset.test)])
    classes, train = tuple(dataset.class_names), len(dataset.train)
    lists = [getattr(images, "paths", None) for images in (dataset.train, dataset.test)]
    none = np.zeros(0, dtype=np.int64)
    if None in lists:
        digest = hashlib.sha256()
        for images in (dataset.train, dataset.test):
            if isinstance(pixels := getattr(images, "images", None), torch.Tensor):
                digest.update(str(tuple(pixels.shape)).encode())
                digest.update(pixels.contiguous().numpy().data)
        return Manifest(classes, train, labels, (), none, none, "", digest.hexdigest()[:16])
    paths = [path for paths in lists for path in paths or ()]
    sizes, times = np.empty(len(paths), dtype=np.int64), np.empty(len(paths), dtype=np.int64)
    for row, path in enumerate(paths):
        try:
            facts = os.stat(path)
            sizes[row], times[row] = facts.st_size, facts.st_mtime_ns
        except OSError:  # it went since the folder was read: whoever decodes it says so
            sizes[row], times[row] = -1, 0
    root = _shared_folder(paths)
    return Manifest(classes, train, labels, tuple(path[len(root) :] for path in paths), sizes, times, root)


def _shared_folder(paths: Sequence[str]) -> str:
    """The folder that holds all files, with a separator at its end; empty where there is none."""
    try:
        return os.path.join(os.path.commonpath([os.path.dirname(min(paths)), os.path.dirname(max(paths))]), "")
    except ValueError:  # no files, or some with an absolute path and some without
        return ""


def _joined(names: Sequence[str]) -> bytes:
    """Names of files as bytes, also those that are not UTF-8."""
    return os.fsencode("\0".join(names))


def write(path: Path, manifest: Manifest) -> None:
    """Writes the file names, sizes and times of a manifest, compressed: about 15 bytes a file."""
    arrays = [values.astype(np.int64).tobytes() for values in (manifest.labels, manifest.sizes, manifest.times)]
    head = {"classes": manifest.classes, "train": manifest.train, "root": manifest.root, "count": len(manifest.labels)}
    text = json.dumps(head).encode()  # ASCII: class names that are not UTF-8 are escaped
    content = b"".join([len(text).to_bytes(8, "little"), text, *arrays, _joined(manifest.names)])
    storage.write_sealed(path, zlib.compress(content, 1), durable=False)


def read(path: Path) -> Manifest | None:
    """The manifest that `write` wrote; None if it is missing or damaged."""
    try:
        content = zlib.decompress(storage.read_sealed(path))
        size = int.from_bytes(content[:8], "little")
        head = json.loads(content[8 : 8 + size])
        count, at = head["count"], 8 + size
        arrays = np.frombuffer(content, dtype=np.int64, count=3 * count, offset=at).reshape(3, count)
        names = os.fsdecode(content[at + 24 * count :]).split("\0") if count else []
        return Manifest(
            tuple(head["classes"]), head["train"], arrays[0], tuple(names), arrays[1], arrays[2], head["root"]
        )
    except (OSError, ValueError, KeyError, TypeError, zlib.error):
        return None


# What differs ----------------------------------------------------------------------------------------------------------


def classes_differ(old: Sequence[str], new: Sequence[str]) -> str:
    """What became of the class names, in a sentence; empty if they are equal."""
    if list(old) == list(new):
        return ""
    gone, added = [n for n in old if n not in set(new)], [n for n in new if n not in set(old)]
    if not gone and not added:
        return f"the same {len(new)} classes come in another order"
    if len(gone) == len(added) == 1:
        return f"class {_quoted(gone)} is now {_quoted(added)}, or was replaced by it ({len(new)} classes)"
    texts = [f"added {_quoted(added)}"] * bool(added) + [f"removed {_quoted(gone)}"] * bool(gone)
    return f"{' and '.join(texts)} ({len(old)} classes then, {len(new)} now)"


def _quoted(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{printable(shortened(name, 60))}'" for name in names[:SHOWN])
    return shown + f" and {len(names) - SHOWN} more" * (len(names) > SHOWN)


@dataclass(frozen=True)
class Changes:
    """What became of the files of a run. `fatal`: a sentence if the numbers so far come from other data; `unread`: names of
    files that changed before the run read them, which it may use as they are now."""

    fatal: str = ""
    unread: tuple[str, ...] = ()


def compare(old: Manifest, new: Manifest, contents: np.ndarray | None) -> Changes:
    """What differs between the files of `old`, of which `contents` int64 [N] are digests (0: never read), and of `new`.

    Files with another size or time, and the same name, are read and digested. Without `contents` another size is fatal."""
    if text := classes_differ(old.classes, new.classes):
        return Changes(text)
    if old.names != new.names:
        gone, added = sorted({*old.names} - {*new.names}), sorted({*new.names} - {*old.names})
        texts = [f"{_images(names)} {what}" for what, names in (("added", added), ("removed", gone)) if names]
        return Changes(" and ".join(texts) or "the images come in another order")
    if old.train != new.train or not np.array_equal(old.labels, new.labels):
        return Changes("images moved to another class or split")
    changed, unread = [], []
    for row in np.flatnonzero((old.sizes != new.sizes) | (old.times != new.times)).tolist():
        other_size, known = old.sizes[row] != new.sizes[row], 0 if contents is None else int(contents[row])
        if contents is not None and not known:
            unread.append(new.names[row])
        elif other_size or (known and digest_of_file(new.place(row)) != known):
            changed.append(new.names[row])
    if changed:
        return Changes(f"{_images(changed)} with other contents")
    return Changes("", tuple(unread))


def _images(names: Sequence[str]) -> str:
    return f"{len(names):,} image{'s' * (len(names) != 1)} ({_quoted(names)})"


# Contents --------------------------------------------------------------------------------------------------------------


def digest_of_bytes(content: bytes) -> int:
    """A digest as int64, never 0."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little", signed=True) or 1


def digest_of_file(path: str) -> int:
    """The digest of a file's content, 0 if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return digest_of_bytes(file.read())
    except OSError:
        return 0


class Changed(ValueError):
    """An image is not the one that this run has read before."""


class Contents:
    """The digests of the image files that a run has read, int64 [N], 0: not read yet. Loader processes share them.

    A file is digested when this process, or a loader process of it, reads it for the first time, and again only if its size
    or time changes."""

    def __init__(self, manifest: Manifest, known: np.ndarray | None = None):
        count = len(manifest.names)
        self.manifest = manifest
        self._digests = torch.zeros(count, dtype=torch.int64).share_memory_()
        self._checked = torch.zeros(count, dtype=torch.bool).share_memory_()
        if known is not None and len(known) == count:
            self._digests.copy_(torch.from_numpy(known.copy()))
        self._saved = self.known().copy()
        self._new = 0  # the digest of the file that this process read last, 0 if it was compared before

    def known(self) -> np.ndarray:
        """The digests, int64 [N]."""
        return self._digests.numpy()

    def read(self, row: int, path: str) -> bytes | None:
        """The content of image `row`, None if the file cannot be read. Raises Changed if the run has read another content."""
        self._new = 0
        try:
            with open(path, "rb") as file:
                facts = os.fstat(file.fileno())
                content = file.read()
        except OSError:
            return None  # whoever decodes it says why
        same = facts.st_size == self.manifest.sizes[row] and facts.st_mtime_ns == self.manifest.times[row]
        if same and self._checked[row]:
            return content
        digest, before = digest_of_bytes(content), int(self._digests[row])
        if before not in (0, digest):
            raise Changed(
                f"{path}: the image has another content than when this run read it first: put the old one back and run the "
                "same command, or start afresh with --resume never"
            )
        self._new = digest
        return content

    def decoded(self, row: int) -> None:
        """Call when what `read` gave for image `row` could be decoded: from now on the run depends on it."""
        if self._new:
            self._digests[row], self._checked[row] = self._new, True

    def watch(self, dataset: Dataset) -> None:
        """From now on every image file of `dataset` is read through this object."""
        for images, first in ((dataset.train, 0), (dataset.test, self.manifest.train)):
            images.watch = _Part(self, first)  # type: ignore[attr-defined]

    def news(self) -> tuple[list[int], list[int]]:
        """(rows, digests) of the images read since the last call."""
        rows = np.flatnonzero(self.known() != self._saved)
        self._saved = self.known().copy()
        return rows.tolist(), self._saved[rows].tolist()

    def learn(self, rows: Sequence[int], digests: Sequence[int]) -> None:
        """Takes over what another rank has read."""
        for row, digest in zip(rows, digests, strict=True):
            self._digests[row] = self._saved[row] = digest

    def complete(self) -> str:
        """16 hex digits over the content of every file; files that no process has read, or whose digest was lost with a
        killed one, are read now. Raises Changed where one has another content than before."""
        for row in np.flatnonzero(self.known() == 0).tolist():
            self.read(row, self.manifest.place(row))
            self.decoded(row)
        return hashlib.sha256(self.known().tobytes()).hexdigest()[:16]


class _Part:
    """The files of one split, for `ImageFiles.watch`."""

    def __init__(self, contents: Contents, first: int):
        self.contents, self.first = contents, first

    def read(self, index: int, path: str) -> bytes | None:
        return self.contents.read(self.first + index, path)

    def decoded(self, index: int) -> None:
        self.contents.decoded(self.first + index)


def read_contents(path: Path) -> np.ndarray | None:
    """The digests that `write_contents` wrote, int64 [N]; None if the file is missing or damaged."""
    try:
        return np.frombuffer(storage.read_sealed(path), dtype=np.int64)
    except (OSError, ValueError):
        return None


def write_contents(path: Path, digests: np.ndarray) -> None:
    storage.write_sealed(path, digests.astype(np.int64).tobytes(), durable=False)
