"""What a task has trained so far, on disk, so that a run resumes inside a task.

A task is deterministic; its training phases (calls of `models.learner.fit.fit`) are the expensive part. To resume, the task
is replayed: the same code runs again from the start of the task, but each phase takes its state from here instead of training
again, a finished phase its result and the last one the step to continue from. Methods need no code for this. Cheap work
(scans, merges) is computed again. The log is muted until the last phase is reached, because it has those rows already.
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
from utils.process.machine import cpu_seconds
from utils.run.log import RunLog
from utils.run.provenance import Identity

KEPT = 2  # number of entries of a phase that are not removed
# Seconds between entries that are forced to the disk. A killed process loses nothing; a power cut may lose this much.
DURABLE = 30.0
LOOK = 2.0  # seconds between two looks whether the run folder is still there
NOBODY = Identity("")


class Differs(RuntimeError):
    """A replay had other phases than the run before it: the device does not compute the same result twice."""


@dataclass(frozen=True)
class Entry:
    """The state of phase `number` of the task (from 0), the `count`-th that was saved of it."""

    number: int
    count: int
    facts: dict[str, Any]
    tensors: dict[str, Tensor]


class Journal:
    """The phases of one task, saved in `folder`; without a folder nothing is saved, as in tests and studies.

    `identity` names the run in every entry; `before` is called before one is written, on every rank.
    `last` describes the newest saved state in words, None if there is none."""

    def __init__(
        self,
        folder: Path | None = None,
        log: RunLog | None = None,
        identity: Identity = NOBODY,
        before: Callable[[], None] | None = None,
    ):
        self.folder, self.log, self.identity, self.before = folder, log, identity, before
        self.last: str | None = None
        self._entries: list[Entry] = []
        self._phase = 0  # phases that this process has begun
        self._count = 0  # entries saved of the current phase
        self._looked = time.monotonic()
        self._before, self._start, self._durable = 0.0, time.perf_counter(), time.monotonic()
        self._cpu_before, self._cpu_start = 0.0, cpu_seconds()

    def open(self, rows: int) -> None:
        """Reads the phases that an earlier process saved, cuts metrics.jsonl back to them, or to the `rows` of the tasks
        before, and mutes the log until the replay has passed them. Raises ValueError if an entry is of another run."""
        assert self.folder is not None and self.log is not None
        while (entry := self._newest_of_first(len(self._entries))) is not None:
            self.identity.refuse_others(entry.facts, self.folder)
            self._entries.append(entry)
            if not entry.facts["finished"]:
                break
        self.log.truncate_rows(self._entries[-1].facts["rows"] if self._entries else min(rows, self.log.rows))
        self.log.muted = bool(self._entries)

    @property
    def begun(self) -> bool:
        """Whether an earlier process saved phases of the task."""
        return bool(self._entries)

    def _newest_of_first(self, number: int) -> Entry | None:
        """`_newest` on every rank; rank 0 alone reads files."""
        if parallel.world() == 1:
            return self._newest(number)

        def read() -> tuple[Any, dict[str, Tensor]]:
            entry = self._newest(number)
            return (None, {}) if entry is None else ([entry.count, entry.facts], entry.tensors)

        entry, tensors = parallel.broadcast_from_first(read)
        return None if entry is None else Entry(number, entry[0], entry[1], tensors)

    def _newest(self, number: int) -> Entry | None:
        """The newest undamaged entry of phase `number` whose rows metrics.jsonl still has."""
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

    def check_folder(self) -> None:
        """Raises FolderGone if the run folder was deleted or moved. A step may call it: it looks once in `LOOK` seconds."""
        if self.folder is not None and self.log is not None and time.monotonic() - self._looked > LOOK:
            self._looked = time.monotonic()
            self.log.check_folder()

    @property
    def seconds(self) -> float:
        """Seconds spent on the task, with those of earlier processes up to their last entry."""
        return self._before + time.perf_counter() - self._start

    @property
    def cpu_seconds(self) -> float:
        """The same of the work of all CPU cores."""
        return self._cpu_before + cpu_seconds() - self._cpu_start

    def recall(self, phase: str) -> Any:
        """Begins the next phase and returns its saved state, None if it has none. Raises Differs if the phase saved here has
        another name."""
        number, self._phase, self._count = self._phase, self._phase + 1, 0
        if number >= len(self._entries):
            return None
        entry = self._entries[number]
        if entry.facts["phase"] != phase:
            raise Differs(f"phase {number + 1} of the task is '{phase}' now and was '{entry.facts['phase']}' before")
        self._count = entry.count + 1
        if number == len(self._entries) - 1:
            self._before, self._start, self.last = entry.facts["seconds"], time.perf_counter(), entry.facts["last"]
            self._cpu_before, self._cpu_start = entry.facts.get("cpu_seconds", 0.0), cpu_seconds()
            if self.log is not None:
                self.log.muted = False
                self.log.info(f"resumed inside the task: {entry.facts['last']} is done")
        return unpack(entry.facts["state"], entry.tensors)

    def save(self, phase: str, state: Callable[[], Any], *, finished: bool, where: str) -> None:
        """Saves the result of `state()` for the current phase and removes all but the newest KEPT. `where`: when, in words.

        Every rank must call this, because ranks exchange the states of their random generators in `state`."""
        if self.folder is None or self.log is None:
            return
        self.log.check_folder()
        if self.before is not None:
            self.before()
        values = state()
        if not parallel.is_first():
            self.last = where
            return
        packed, tensors = pack(values)
        facts = {"phase": phase, "finished": finished, "rows": self.log.rows, "seconds": self.seconds, "last": where}
        facts["cpu_seconds"] = self.cpu_seconds
        facts |= self.identity.facts()
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
        """Call when the task is learned. Raises Differs if an earlier process saved a phase that this one never began."""
        if self._phase < len(self._entries):
            raise Differs(f"the task had {self._phase} phases now and at least {len(self._entries)} before")


def discard(checkpoints: Path) -> None:
    """Removes the phases of all tasks in progress."""
    for folder in checkpoints.glob("task_*/"):
        shutil.rmtree(folder)


# Nested values as JSON and few tensors ---------------------------------------------------------------------------------


def pack(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """Nested dicts, lists, numbers, texts and tensors as JSON data and one flat tensor per dtype, which is faster to write than
    thousands of small ones. In the JSON a tensor is {"tensor": [dtype, shape]}."""
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
    return packed, {kind: torch.cat(tensors) for kind, tensors in flat.items()}


def unpack(packed: Any, tensors: dict[str, Tensor]) -> Any:
    """Inverse of `pack`; tensors are on the CPU, tuples become lists and keys texts."""
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
