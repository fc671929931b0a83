"""Saves and restores a run at the end of a task: structure, weights and results so far, written so that a crash loses nothing.

A checkpoint is two files: `task_NNN.safetensors` (weights and buffers) and `task_NNN.json` (everything else, with the
SHA-256 of the first). The JSON is written last, each through a temporary file, fsync and rename, so a checkpoint is either
whole or not there. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

FORMAT = 1
KEPT = 2  # newest checkpoints that stay: if the last is damaged the one before it is used


@dataclass(frozen=True)
class Checkpoint:
    """State after `task` (from 0) is learned and evaluated. `facts` is plain JSON data, `tensors` the learner's own state."""

    task: int
    facts: dict[str, Any]
    tensors: dict[str, Tensor]


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes the checkpoint, then removes those older than the newest two. OSError if the disk is full or read-only."""
    folder.mkdir(parents=True, exist_ok=True)
    data = save_tensors({k: v.detach().cpu().contiguous() for k, v in checkpoint.tensors.items()})
    name = f"task_{checkpoint.task:03d}"
    write_atomically(folder / f"{name}.safetensors", data)
    head = {"format": FORMAT, "task": checkpoint.task, "sha256": hashlib.sha256(data).hexdigest(), "facts": checkpoint.facts}
    body = json.dumps(head, allow_nan=False)
    digest = hashlib.sha256(body.encode()).hexdigest()
    write_atomically(folder / f"{name}.json", json.dumps({"sha256": digest, "body": body}).encode())
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
            complaints.append(str(error))
    return None, complaints


def read(path: Path) -> Checkpoint:
    """The checkpoint behind `task_NNN.json`. Raises ValueError with path and cause if any bit of it is not as written."""
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        cause = f"{tensors_path.name} is missing" if isinstance(error, FileNotFoundError) else str(error) or type(error).__name__
        raise ValueError(f"checkpoint {path} cannot be used: {cause}") from None


def move_aside(folder: Path) -> None:
    """Renames a run folder to the first free `NAME.old_1`, `NAME.old_2`, ...; nothing is deleted."""
    if folder.exists():
        number = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}.old_{n}").exists())
        folder.rename(folder.with_name(f"{folder.name}.old_{number}"))


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces `path` by `data` in one step that survives a power cut: temporary file, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
