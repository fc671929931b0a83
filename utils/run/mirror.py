"""What a run shows outside its folder: its rows as numbers with names, and the words to find it by (utils/run/tracker.py)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
    def finish(self, figures: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class About:
    """What a tracker shows of a run beside its rows: its folder, settings as in config.json, and words to find it by."""

    folder: Path
    settings: Mapping[str, Any]
    tags: Mapping[str, str]

    @property
    def experiment(self) -> str:
        """The name of the experiment file."""
        return self.folder.parents[1].name

    @property
    def name(self) -> str:
        """Such as sema_digits/c6337826b9b0/seed_1993."""
        return "/".join(self.folder.parts[-3:])


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
