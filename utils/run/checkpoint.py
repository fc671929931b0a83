"""Checkpoints of a run: the state after each task, verified when read; the one before the newest is not removed.

In `checkpoints/`, `task_T.json` is the state at the end of task T, `task_T.learned.json` (with the same tensors) the state
before its evaluation, and the folder `task_T` has the phases of a task in progress, see utils/run/journal.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from utils.files.storage import Damaged, clear_temporary, read_state, write_state
from utils.process import parallel
from utils.run.journal import Journal
from utils.run.log import RunLog
from utils.run.provenance import Identity

KEPT = 2  # number of tasks whose checkpoints are not removed: if the newest is damaged, the one before it is used


class Restorable(Protocol):
    """The methods of a learner that a checkpoint needs."""

    def structure(self) -> dict[str, Any]: ...
    def restore(self, structure: dict[str, Any]) -> None: ...
    def own_state(self) -> dict[str, Tensor]: ...
    def load_own_state(self, state: dict[str, Tensor]) -> None: ...
    def eval(self) -> Any: ...
    def requires_grad_(self, requires_grad: bool = True) -> Any: ...


@dataclass(frozen=True)
class Checkpoint:
    """The state after `task` (from 0) is learned. `facts` is JSON data, `tensors` the learner's state.

    `facts["measured"]` has the measurements of learning if the task is still to be evaluated, else None."""

    task: int
    facts: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Resumed:
    """The state from which a run continues: `record` of the evaluated tasks, `measured` of a task that is learned but not
    evaluated, and the number of `rows` of metrics.jsonl that belong to both."""

    record: dict[str, Any]
    measured: dict[str, Any] | None
    rows: int


def save(
    folder: Path,
    task: int,
    learner: Restorable,
    record: dict[str, Any],
    log: RunLog,
    identity: Identity,
    measured: dict[str, Any] | None = None,
) -> None:
    """Writes the state after `task` to `checkpoints/` in the run folder. The task is evaluated, or, with `measured`, learned
    and still to be evaluated.

    Raises OSError if the disk is full or read-only."""
    if not parallel.is_first():
        return
    log.sync()
    facts = {"structure": learner.structure(), "record": record, "rows": log.rows, **identity.facts()}
    write(folder / "checkpoints", Checkpoint(task, facts | {"measured": measured}, learner.own_state()))


def journal_of(
    folder: Path, task: int, log: RunLog, identity: Identity, before: Callable[[], None] | None = None
) -> Journal:
    """The journal of task `task` (from 0) of the run in `folder`; `before` is called before each of its entries."""
    return Journal(folder / "checkpoints" / f"task_{task:05d}", log, identity, before)


def resume(folder: Path, learner: Restorable, log: RunLog, identity: Identity) -> Resumed | None:
    """Loads the newest undamaged checkpoint into `learner`; None if there is none. The task after it may have a journal.

    Raises ValueError if the checkpoint is of another run (seed, settings, data, weights), if another version of this program
    wrote it, or if it does not fit the learner's code."""
    saved, complaints = _newest_of_first(folder)
    for complaint in complaints:
        log.warn(complaint)
    if saved is None:
        if complaints:
            log.warn("every checkpoint is damaged: this run starts from its first task")
            log.copy_rows_aside()
        return None
    identity.refuse_others(saved.facts, folder / "checkpoints")
    learner.restore(saved.facts["structure"])
    learner.load_own_state(saved.tensors)
    # both as at the end of a task: for parameters that require gradients torch picks other kernels, which round differently
    learner.eval()
    learner.requires_grad_(False)
    if log.rows < saved.facts["rows"]:
        log.warn(f"{folder / 'metrics.jsonl'} has lost {saved.facts['rows'] - log.rows} rows of finished tasks")
    measured = saved.facts["measured"]
    what = "are done" if measured is None else "are learned, the last is still to be evaluated"
    log.info(f"resumed: tasks 1 to {saved.task + 1} {what}, from the checkpoint in {folder / 'checkpoints'}")
    return Resumed(saved.facts["record"], measured, saved.facts["rows"])


def _newest_of_first(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """`newest` on every rank; rank 0 alone reads files."""

    def read() -> tuple[Any, dict[str, Tensor]]:
        clear_temporary(folder)
        saved, complaints = newest(folder / "checkpoints")
        if saved is None:
            return [complaints, None, None], {}
        return [complaints, saved.task, saved.facts], saved.tensors

    (complaints, task, facts), tensors = parallel.broadcast_from_first(read)
    return None if task is None else Checkpoint(task, facts, tensors), complaints


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes the checkpoint; if its task is evaluated, removes all but the newest KEPT and the journal of the task."""
    name = f"task_{checkpoint.task:05d}"
    learned = checkpoint.facts.get("measured") is not None
    head = folder / (f"{name}.learned.json" if learned else f"{name}.json")
    write_state(head, checkpoint.facts, checkpoint.tensors, share=folder / f"{name}.safetensors")
    if learned:
        return
    shutil.rmtree(folder / name, ignore_errors=True)
    for old in _heads(folder)[KEPT:]:
        old.unlink(missing_ok=True)
        old.with_name(f"{old.stem}.learned.json").unlink(missing_ok=True)
        old.with_suffix(".safetensors").unlink(missing_ok=True)


def _heads(folder: Path) -> list[Path]:
    """The JSON files of evaluated tasks, newest first."""
    return sorted((p for p in folder.glob("task_*.json") if not p.stem.endswith(".learned")), reverse=True)


def newest(folder: Path, learned: bool = True) -> tuple[Checkpoint | None, list[str]]:
    """(the newest undamaged checkpoint or None, a line for each newer one that is damaged). With `learned` false, only of tasks
    that are evaluated. Raises OtherFormat for one that another version of this program wrote."""
    complaints: list[str] = []
    heads = [*_heads(folder), *(folder.glob("task_*.learned.json") if learned else ())]
    for path in sorted(heads, key=lambda p: (p.name.partition(".")[0], ".learned" not in p.name), reverse=True):
        try:
            return read(path), complaints
        except Damaged as error:
            complaints.append(f"{error}; trying the one before it")
    return None, complaints


def read(path: Path) -> Checkpoint:
    """The checkpoint of the file `task_NNNNN.json`. Raises Damaged with path and cause if any bit differs from what was
    written."""
    facts, tensors = read_state(path)
    return Checkpoint(int(path.name.partition(".")[0].removeprefix("task_")), facts, tensors)
