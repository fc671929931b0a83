"""Saves and restores a run at the end of a task: structure, weights and results so far, written so that a crash loses nothing.

A checkpoint is two files in `checkpoints/`: `task_NNNNN.safetensors` (weights and buffers) and `task_NNNNN.json` (everything
else, with the SHA-256 of the first). The JSON is written last, each through a temporary file, fsync and rename, so a
checkpoint is either whole or not there. Nothing is ever unpickled. No random state is needed: every task seeds its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from utils.report import write_bytes
from utils.runlog import RunLog
from utils.strict_json import plain

FORMAT = 1
KEPT = 2  # newest checkpoints that stay: if the last is damaged the one before it is used


class Restorable(Protocol):
    """The part of a learner that a checkpoint needs."""

    def structure(self) -> dict[str, Any]: ...
    def restore(self, structure: dict[str, Any]) -> None: ...
    def own_state(self) -> dict[str, Tensor]: ...
    def load_own_state(self, state: dict[str, Tensor]) -> None: ...
    def eval(self) -> Any: ...
    def requires_grad_(self, requires_grad: bool = True) -> Any: ...


@dataclass(frozen=True)
class Checkpoint:
    """State after `task` (from 0) is learned and evaluated. `facts` is plain JSON data, `tensors` the learner's own state."""

    task: int
    facts: dict[str, Any]
    tensors: dict[str, Tensor]


def save(folder: Path, task: int, learner: Restorable, record: dict[str, Any], log: RunLog, weight_hash: str) -> None:
    """Writes the state after `task` into the run's `checkpoints/`. OSError if the disk is full or read-only."""
    log.sync()
    facts = {"structure": learner.structure(), "record": record, "rows": log.rows, "weight_hash": weight_hash}
    write(folder / "checkpoints", Checkpoint(task, facts, learner.own_state()))


def resume(folder: Path, learner: Restorable, log: RunLog, weight_hash: str) -> dict[str, Any] | None:
    """Brings `learner` and the metrics rows to the newest whole checkpoint and returns its record, None if there is none.

    Raises ValueError if the run began with other backbone weights or the learner's code no longer fits."""
    saved, complaints = newest(folder / "checkpoints")
    for complaint in complaints:
        log.warn(complaint)
    if saved is None:
        if complaints:
            log.warn("no whole checkpoint is left: this run starts from its first task")
        log.truncate_rows(0)
        return None
    if saved.facts["weight_hash"] != weight_hash:
        raise ValueError(f"{folder}: the backbone's weights changed since this run began; --resume never starts afresh")
    learner.restore(saved.facts["structure"])
    learner.load_own_state(saved.tensors)
    learner.eval()  # both as the end of a task left them: torch picks other kernels, hence other roundings, for parameters
    learner.requires_grad_(False)  # that require gradients, even where none are taken
    if log.rows < saved.facts["rows"]:
        log.warn(f"{folder / 'metrics.jsonl'} has lost {saved.facts['rows'] - log.rows} rows of finished tasks")
    log.truncate_rows(min(log.rows, saved.facts["rows"]))
    log.info(f"resumed: tasks 1 to {saved.task + 1} are done, from the checkpoint in {folder / 'checkpoints'}")
    return saved.facts["record"]


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes the checkpoint's two files, then removes those older than the newest two."""
    folder.mkdir(parents=True, exist_ok=True)
    data = save_tensors({k: v.detach().cpu().contiguous().clone() for k, v in checkpoint.tensors.items()})
    name = f"task_{checkpoint.task:05d}"
    write_bytes(folder / f"{name}.safetensors", data)
    facts = plain(checkpoint.facts, "checkpoint")
    head = {"format": FORMAT, "task": checkpoint.task, "sha256": hashlib.sha256(data).hexdigest(), "facts": facts}
    body = json.dumps(head, allow_nan=False)
    digest = hashlib.sha256(body.encode()).hexdigest()
    write_bytes(folder / f"{name}.json", json.dumps({"sha256": digest, "body": body}).encode())
    for old in sorted(folder.glob("task_*.json"))[:-KEPT]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, or None; and a line for each newer one that is damaged."""
    complaints: list[str] = []
    for path in sorted(folder.glob("task_*.json"), reverse=True):
        try:
            return read(path), complaints
        except ValueError as error:
            complaints.append(f"{error}; trying the one before it")
    return None, complaints


def read(path: Path) -> Checkpoint:
    """The checkpoint behind `task_NNNNN.json`. Raises ValueError with path and cause if any bit of it is not as written."""
    tensors_path = path.with_suffix(".safetensors")
    try:
        outer = json.loads(path.read_bytes())
        body = outer["body"]
        if hashlib.sha256(body.encode()).hexdigest() != outer["sha256"]:
            raise ValueError("its checksum does not match")
        head = json.loads(body)
        if head["format"] != FORMAT:
            raise ValueError(f"it has format {head['format']}, this program reads format {FORMAT}")
        data = tensors_path.read_bytes()
        if hashlib.sha256(data).hexdigest() != head["sha256"]:
            raise ValueError(f"the checksum of {tensors_path.name} does not match")
        return Checkpoint(int(head["task"]), head["facts"], load_tensors(data))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        gone = isinstance(error, FileNotFoundError)
        cause = f"{tensors_path.name} is missing" if gone else str(error) or type(error).__name__
        raise ValueError(f"checkpoint {path} cannot be used: {cause}") from None


def move_aside(folder: Path) -> Path | None:
    """Renames a run folder to the first free `NAME.old_1`, `NAME.old_2`, ...; nothing is deleted. Returns the new name.

    Raises ValueError if another process is writing to it."""
    if not folder.exists():
        return None
    RunLog(folder, console=False).close()
    number = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}.old_{n}").exists())
    return folder.rename(folder.with_name(f"{folder.name}.old_{number}"))


def point_latest(link: Path, target: Path) -> None:
    """Makes `OUT/latest` point to the newest run folder; where links are not allowed there is none."""
    temporary = link.with_name(f".latest.{os.getpid()}")
    with contextlib.suppress(OSError):
        temporary.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)
        os.replace(temporary, link)
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
