"""Tensors of one shape, addressed by the rows of a data set: in memory, or in files that are read through a mapping.

Files: each call of `put` writes one block, `N.data` (raw values) and `N.rows.npy` (int64 rows of the data set, and behind
them the SHA-256 of both), the rows last and each file in one step, so a block is whole or absent whenever the process dies.
A block with another digest is removed when it is opened. Deleting files is always safe: their values are missing then, and
the caller puts them again.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from utils.files.storage import clear_temporary, write_file

NAME = re.compile(r"\d{5,}\.(data|rows\.npy)")  # of a block's files


def _digest(data: Path, rows: np.ndarray) -> bytes:
    """SHA-256 over the values in the file `data` and the rows [n]."""
    digest = hashlib.sha256()
    with open(data, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    digest.update(rows.tobytes())
    return digest.digest()


class RowStore:
    """`shape` values of `dtype` for some of the rows 0 .. `count` - 1, in the memory of `device`; with a `folder` in files
    there, which it reads first."""

    def __init__(
        self,
        count: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        folder: Path | None = None,
        device: torch.device | str = "cpu",
    ):
        self.shape, self.dtype, self.folder = shape, dtype, folder
        self.device = torch.device("cpu" if folder else device)
        self.complaints: list[str] = []  # files that are not used, and why
        self._blocks: list[Tensor] = []
        self._block = np.full(count, -1, dtype=np.int32)  # the block of each row, -1: the row is not stored
        self._place = np.zeros(count, dtype=np.int64)  # of each row within its block
        if folder is not None:
            for table in sorted(folder.glob("*.rows.npy")):
                self._open(table)
            clear_temporary(folder)  # a killed process left it
            for data in folder.glob("*.data"):
                if NAME.fullmatch(data.name) and not data.with_suffix(".rows.npy").exists():
                    data.unlink(missing_ok=True)
            strange = sorted(p.name for p in folder.glob("*") if not NAME.fullmatch(p.name))
            if strange:
                self.complaints.append(
                    f"{folder} holds files of other programs, which are not used: {', '.join(strange[:3])}"
                )

    @property
    def row_bytes(self) -> int:
        """Size in bytes of one row's values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def has(self, rows: np.ndarray) -> np.ndarray:
        """Which of these rows are stored, bool [n]."""
        return self._block[rows] >= 0

    def get(self, rows: np.ndarray) -> Tensor:
        """The values of stored rows, [n, *shape], as a copy."""
        blocks, places = self._block[rows], torch.from_numpy(self._place[rows]).to(self.device)
        assert (blocks >= 0).all(), "rows that are not stored were asked for"
        used = np.unique(blocks)
        if len(used) == 1:
            return self._blocks[used[0]][places]
        values = torch.empty(len(rows), *self.shape, dtype=self.dtype, device=self.device)
        for block in used:
            inside = torch.from_numpy(blocks == block).to(self.device)
            values[inside] = self._blocks[block][places[inside]]
        return values

    def put(self, rows: np.ndarray, values: Iterable[Tensor]) -> None:
        """Stores `values`, which yields the rows' values in their order, some rows [n, *shape] at a time.

        With files: OSError if the disk is full or read-only; nothing is stored then."""
        if not len(rows):
            return
        if self.folder is None:
            with torch.inference_mode(False):  # else the block could never take part in training
                block = torch.empty(len(rows), *self.shape, dtype=self.dtype, device=self.device)
            start = 0
            for some in values:
                block[start : start + len(some)] = some
                start += len(some)
            assert start == len(rows), (start, len(rows))
            self._add(block, rows)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(path.name.partition(".")[0]) for path in self.folder.glob("*.data")), default=-1)
        data, table = self.folder / f"{number:05}.data", self.folder / f"{number:05}.rows.npy"

        digest = hashlib.sha256()

        def write_values(file: BinaryIO) -> None:
            for some in values:
                content = some.detach().cpu().contiguous().view(torch.uint8).numpy().data
                digest.update(content)
                file.write(content)

        def write_rows(file: BinaryIO) -> None:
            digest.update(rows.astype(np.int64).tobytes())
            np.save(file, rows.astype(np.int64), allow_pickle=False)
            file.write(digest.digest())

        write_file(data, write_values)
        write_file(table, write_rows)
        self._open(table)

    def _add(self, block: Tensor, rows: np.ndarray) -> None:
        self._block[rows], self._place[rows] = len(self._blocks), np.arange(len(rows))
        self._blocks.append(block)

    def _open(self, table: Path) -> None:
        """Adds a block whose files fit together and are as they were written; another one is removed, with a complaint."""
        data = table.with_name(table.name.replace(".rows.npy", ".data"))
        try:
            with open(table, "rb") as file:
                rows, digest = np.load(file, allow_pickle=False), file.read()
            fits = rows.ndim == 1 and rows.dtype == np.int64 and len(rows) and rows.min() >= 0
            fits = fits and rows.max() < len(self._block) and data.stat().st_size == len(rows) * self.row_bytes
            if not fits or digest != _digest(data, rows):
                raise ValueError("is not as it was written")
        except (OSError, ValueError, EOFError) as error:
            if not NAME.fullmatch(table.name):
                return
            reason = error.strerror if isinstance(error, OSError) else "is not as it was written"
            self.complaints.append(f"a block of the cache is removed and computed again: {data} {reason or error}")
            table.unlink(missing_ok=True)
            data.unlink(missing_ok=True)
            return
        with torch.inference_mode(False):
            # not shared: a change to the tensor does not reach the file
            flat = torch.from_file(str(data), shared=False, size=len(rows) * math.prod(self.shape), dtype=self.dtype)
            self._add(flat.view(len(rows), *self.shape), rows)
