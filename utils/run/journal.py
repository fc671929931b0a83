"""What a task has trained so far, on disk, so that a run goes on inside a task.

A task is a deterministic program whose dear part is its training phases (calls of `models.learner.fit.fit`). So it is not
stopped and frozen, it is replayed: the same code runs again from the task's start, and each phase takes what it had reached
from here instead of training again: finished ones their result, the last one the step to go on from. Methods need no code
of their own for this. What is cheap (scans, merges) is computed again. Until the last phase is reached the log is mute: what
the replay would write is there already.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.files.storage import Damaged, read_state, remove_state, write_state
from utils.process import parallel
from utils.run.log import RunLog

KEPT = 2  # newest entries of a phase that stay
DURABLE = (
    30.0  # seconds after which an entry is also brought to the disk: a killed process loses nothing, a power cut this
)


class Differs(RuntimeError):
    """A replay took another way than the run before it, which happens where a device does not compute the same twice."""


@dataclass(frozen=True)
class Entry:
    """State of phase number `phase` of the task, the `count`-th that was saved of it."""

    number: int
    count: int
    facts: dict[str, Any]
    tensors: dict[str, Tensor]


class Journal:
    """The phases of one task in `folder`; without one nothing is kept, as in tests and studies.

    `last` says in words what was saved last, None if nothing was."""

    def __init__(self, folder: Path | None = None, log: RunLog | None = None, weight_hash: str = ""):
        self.folder, self.log, self.weight_hash = folder, log, weight_hash
        self.last: str | None = None
        self._entries: list[Entry] = []
        self._phase = 0  # phases begun by this process
        self._count = 0  # entries saved of the present one
        self._before, self._start, self._durable = 0.0, time.perf_counter(), time.monotonic()

    def open(self, rows: int) -> None:
        """Reads what an earlier process left, cuts metrics.jsonl back to it, or to the `rows` of the tasks before, and mutes
        the log until it is reached. Raises ValueError if the task was begun with other backbone weights."""
        assert self.folder is not None and self.log is not None
        while (entry := self._newest_of_first(len(self._entries))) is not None:
            if entry.facts["weight_hash"] != self.weight_hash:
                raise ValueError(
                    f"{self.folder}: the backbone's weights changed since this run began; --resume never starts afresh"
                )
            self._entries.append(entry)
            if not entry.facts["finished"]:
                break
        self.log.truncate_rows(self._entries[-1].facts["rows"] if self._entries else min(rows, self.log.rows))
        self.log.muted = bool(self._entries)

    @property
    def begun(self) -> bool:
        """Whether an earlier process left phases of the task."""
        return bool(self._entries)

    def _newest_of_first(self, number: int) -> Entry | None:
        """The entry that rank 0 finds: it alone reads and writes files."""
        if parallel.world() == 1:
            return self._newest(number)

        def read() -> tuple[Any, dict[str, Tensor]]:
            entry = self._newest(number)
            return (None, {}) if entry is None else ([entry.count, entry.facts], entry.tensors)

        found, tensors = parallel.broadcast_from_first(read)
        return None if found is None else Entry(number, found[0], found[1], tensors)

    def _newest(self, number: int) -> Entry | None:
        assert self.folder is not None and self.log is not None
        for path in sorted(self.folder.glob(f"phase_{number:04d}.*.json"), reverse=True):
            try:
                facts, tensors = read_state(path)
                if facts["rows"] <= self.log.rows:
                    return Entry(number, int(path.name.split(".")[1]), facts, tensors)
                self.log.warn(f"checkpoint {path} counts rows that metrics.jsonl has lost; trying the one before it")
            except Damaged as error:
                self.log.warn(f"{error}; trying the one before it")
        return None

    @property
    def seconds(self) -> float:
        """Time spent on the task, that of earlier processes up to their last entry included."""
        return self._before + time.perf_counter() - self._start

    def recall(self, phase: str) -> Any:
        """Begins the next phase: its saved state, None if it is new. Raises Differs if another phase was here before."""
        number, self._phase, self._count = self._phase, self._phase + 1, 0
        if number >= len(self._entries):
            return None
        entry = self._entries[number]
        if entry.facts["phase"] != phase:
            raise Differs(f"phase {number + 1} of the task is '{phase}' now and was '{entry.facts['phase']}' before")
        self._count = entry.count + 1
        if number == len(self._entries) - 1:
            self._before, self._start, self.last = entry.facts["seconds"], time.perf_counter(), entry.facts["last"]
            if self.log is not None:
                self.log.muted = False
                self.log.info(f"resumed inside the task: {entry.facts['last']} is done")
        return unpack(entry.facts["state"], entry.tensors)

    def save(self, phase: str, state: Callable[[], Any], *, finished: bool, where: str) -> None:
        """Keeps what `state` gives for the present phase, in place of all but the last before. `where`: the moment in words."""
        if self.folder is None or self.log is None:
            return
        given = state()  # the ranks tell each other their random generators in it
        if not parallel.is_first():
            self.last = where
            return
        packed, tensors = pack(given)
        facts = {"phase": phase, "finished": finished, "rows": self.log.rows, "seconds": self.seconds, "last": where}
        facts["weight_hash"] = self.weight_hash
        number = self._phase - 1
        durable = time.monotonic() - self._durable > DURABLE
        if durable:
            self.log.sync()
            self._durable = time.monotonic()
        head = self.folder / f"phase_{number:04d}.{self._count:06d}.json"
        write_state(head, facts | {"state": packed}, tensors, durable=durable)
        for old in sorted(self.folder.glob(f"phase_{number:04d}.*.json"))[:-KEPT]:
            remove_state(old)
        self._count += 1
        self.last = where

    def finish(self) -> None:
        """The task is learned. Raises Differs if an earlier process had come to a phase that this one never did."""
        if self._phase < len(self._entries):
            raise Differs(f"{self._phase} phases in place of at least {len(self._entries)}")


def discard(checkpoints: Path) -> None:
    """Forgets the phases of all tasks in progress."""
    for folder in checkpoints.glob("task_*/"):
        shutil.rmtree(folder)


# Nested values as JSON and few tensors ---------------------------------------------------------------------------------


def pack(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """Nested dicts, lists, numbers, texts and tensors as JSON data and one flat tensor a dtype, which is faster to write than
    thousands of small ones. A tensor becomes {"tensor": [dtype, shape]}."""
    flat: dict[str, list[Tensor]] = {}

    def walk(item: Any) -> Any:
        if isinstance(item, Tensor):
            kind = str(item.dtype).removeprefix("torch.")
            flat.setdefault(kind, []).append(item.detach().cpu().reshape(-1))
            return {"tensor": [kind, list(item.shape)]}
        if isinstance(item, dict):
            return {str(k): walk(v) for k, v in item.items()}
        return [walk(v) for v in item] if isinstance(item, (list, tuple)) else item

    packed = walk(value)
    return packed, {kind: torch.cat(parts) for kind, parts in flat.items()}


def unpack(packed: Any, tensors: dict[str, Tensor]) -> Any:
    """Inverse of `pack`; tensors come back on the CPU, tuples as lists, keys as texts."""
    used = dict.fromkeys(tensors, 0)

    def walk(item: Any) -> Any:
        if isinstance(item, dict):
            if item.keys() == {"tensor"}:
                kind, shape = item["tensor"]
                start, size = used[kind], math.prod(shape)
                used[kind] += size
                return tensors[kind][start : start + size].reshape(shape).clone()
            return {k: walk(v) for k, v in item.items()}
        return [walk(v) for v in item] if isinstance(item, list) else item

    return walk(packed)
