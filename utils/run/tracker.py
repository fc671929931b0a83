"""Mirrors the rows of metrics.jsonl to TensorBoard, with the key `tracker`; the file remains the complete record.

The step of a value is the number of its row, so every point can be traced to the file. A resumed run, whose last rows are cut
off and written again, can tell TensorBoard which points are invalid.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

MOST = 64  # longest list that is mirrored; longer ones, such as gates by class, are not curves
# fields that say where a row belongs are part of the tag; those that say when are given by the step
_WHERE = ("phase", "layer", "adapter", "level", "expert")
_WHEN = ("kind", "time", "task", "epoch", "epochs")


class Mirror(Protocol):
    """What a RunLog passes its rows to."""

    def row(self, number: int, row: Mapping[str, Any]) -> None: ...
    def cut(self, count: int) -> None: ...
    def close(self) -> None: ...


def missing(tracker: str | None) -> str | None:
    """A line on the package that `tracker` needs and that is not installed, else None."""
    if tracker == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        return (
            'tracker: "tensorboard" needs the package tensorboard, which is not installed: pip install tensorboard, or leave '
            "the key out; metrics.jsonl has every number in any case"
        )
    return None


def of(tracker: str | None, folder: Path, rows: int) -> Mirror | None:
    """The mirror of a run folder whose metrics.jsonl has `rows` rows; None without a tracker."""
    return TensorBoard(folder, rows) if tracker == "tensorboard" else None


class TensorBoard:
    """Event files in RUN/tensorboard, one per process; `tensorboard --logdir logs` shows all runs."""

    def __init__(self, folder: Path, rows: int):
        self.folder = folder / "tensorboard"
        self._open(rows)

    def _open(self, rows: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = rows if self.folder.exists() else None
        self._writer: Any = SummaryWriter(str(self.folder), purge_step=purge_step, flush_secs=10)

    def row(self, number: int, row: Mapping[str, Any]) -> None:
        """Mirrors row `number` (from 0)."""
        for tag, value in scalars(row):
            self._writer.add_scalar(tag, value, number)

    def cut(self, count: int) -> None:
        """Marks the values of all rows after the first `count` as invalid, since the file was cut back to those."""
        self._writer.close()
        self._open(count)

    def close(self) -> None:
        self._writer.close()


def scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(tag, value) of every number of a row, those of lists numbered from 1: `epoch/func/loss`, `task/accuracy/3`."""
    where = "/".join(
        str(row[key]) if key == "phase" else f"{key}_{row[key]}" for key in _WHERE if row.get(key) is not None
    )
    head = f"{row['kind']}/{where}" if where else str(row["kind"])
    for key, value in row.items():
        if key in _WHERE or key in _WHEN:
            continue
        yield from _numbers(f"{head}/{key}", value)


def _numbers(tag: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, int | float):
        yield tag, float(value)
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(f"{tag}/{name}", inner)
    elif isinstance(value, list) and len(value) <= MOST:
        for position, inner in enumerate(value, start=1):
            yield from _numbers(f"{tag}/{position}", inner)
