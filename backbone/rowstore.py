"""Tensors of one shape, kept by the row of a data set they belong to: in memory, or in files that are read through a mapping.

Files: what is put together is one block, `N.data` (raw values) and `N.rows.npy` (int64 rows of the data set). Both are written
beside their place, brought to the disk and renamed, the rows last, so a block is whole or not there whenever the process
dies. Deleting them is always safe: what is missing is put again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor


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
        self._blocks: list[Tensor] = []
        self._block = np.full(count, -1, dtype=np.int32)  # of each row, -1: not there
        self._place = np.zeros(count, dtype=np.int64)  # within its block
        if folder is not None:
            for table in sorted(folder.glob("*.rows.npy")):
                self._open(table)
            for left in (*folder.glob("*.part"), *folder.glob("*.data")):  # of a process that was killed
                if left.suffix == ".part" or not left.with_suffix(".rows.npy").exists():
                    left.unlink(missing_ok=True)

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def has(self, rows: np.ndarray) -> np.ndarray:
        """Which of these rows are kept, bool [n]."""
        return self._block[rows] >= 0

    def get(self, rows: np.ndarray) -> Tensor:
        """The values of rows that are kept, [n, *shape], as a copy."""
        blocks, places = self._block[rows], torch.from_numpy(self._place[rows]).to(self.device)
        assert (blocks >= 0).all(), "rows that are not kept were asked for"
        used = np.unique(blocks)
        if len(used) == 1:
            return self._blocks[used[0]][places]
        found = torch.empty(len(rows), *self.shape, dtype=self.dtype, device=self.device)
        for block in used:
            own = torch.from_numpy(blocks == block).to(self.device)
            found[own] = self._blocks[block][places[own]]
        return found

    def put(self, rows: np.ndarray, values: Iterable[Tensor]) -> None:
        """Keeps `values`, parts [n, *shape] of what belongs to `rows` in their order. With files: OSError if the disk is full
        or read-only; nothing is then kept."""
        if not len(rows):
            return
        if self.folder is None:
            with torch.inference_mode(False):  # else the block could never take part in training
                block = torch.empty(len(rows), *self.shape, dtype=self.dtype, device=self.device)
            start = 0
            for part in values:
                block[start : start + len(part)] = part
                start += len(part)
            assert start == len(rows), (start, len(rows))
            self._add(block, rows)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(path.name.partition(".")[0]) for path in self.folder.glob("*.data")), default=-1)
        data, table = self.folder / f"{number:05}.data", self.folder / f"{number:05}.rows.npy"

        def write_data(file: BinaryIO) -> None:
            for part in values:
                file.write(part.detach().cpu().contiguous().view(torch.uint8).numpy().data)

        _write(data, write_data)
        _write(table, lambda file: np.save(file, rows.astype(np.int64), allow_pickle=False))
        self._open(table)

    def _add(self, block: Tensor, rows: np.ndarray) -> None:
        self._block[rows], self._place[rows] = len(self._blocks), np.arange(len(rows))
        self._blocks.append(block)

    def _open(self, table: Path) -> None:
        """Takes a block's files if they fit together; others are left alone and never read."""
        data = table.with_name(table.name.replace(".rows.npy", ".data"))
        try:
            rows = np.load(table, allow_pickle=False)
            fits = rows.ndim == 1 and rows.dtype == np.int64 and len(rows) and rows.min() >= 0
            if not fits or rows.max() >= len(self._block) or data.stat().st_size != len(rows) * self.row_bytes:
                return
        except (OSError, ValueError, EOFError):
            return
        with torch.inference_mode(False):
            # not shared: whatever is done to what was read, the file stays as it is
            flat = torch.from_file(str(data), shared=False, size=len(rows) * math.prod(self.shape), dtype=self.dtype)
            self._add(flat.view(len(rows), *self.shape), rows)


def _write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """A file that is whole or not there: written beside its place, brought to the disk, renamed."""
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # the new name reaches the disk too; Windows has no such call
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
