"""The folder of a run: opened with its log, described, moved aside when a run starts afresh, and finished."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.config import strict_json
from utils.files import storage
from utils.process import parallel
from utils.process.machine import environment
from utils.run import journal
from utils.run.log import RunLog, SilentLog

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def open_log(folder: Path, latest: Path, afresh: bool, notes: Sequence[str], shown: set[str]) -> Iterator[RunLog]:
    """The log of the run in `folder`, which is then locked for this process; `notes` are its first warnings.

    The console does not repeat notes that are in `shown`; new ones are added there. With `afresh` an earlier folder is moved
    aside first. `latest` becomes a link to the folder. Ranks above 0 get a log that writes nothing."""
    if not parallel.is_first():
        yield SilentLog(folder)
        return
    if afresh and (old := move_aside(folder)):
        print(f"{folder.name.replace('_', ' ')} starts afresh, the folder of the earlier run stays: {old}")
    with RunLog(folder) as log:
        point_latest(latest, folder)
        for note in notes:
            log.warn(note, console=note not in shown)
            shown.add(note)
        yield log


def describe(
    log: RunLog, cfg: Any, settings: dict[str, Any], facts: Any, device: torch.device
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Writes config.json (`settings`) and environment.json (machine, versions, backbone weights), and returns both."""
    machine = {**environment(device), "backbone": vars(facts)}
    if parallel.world() > 1:
        machine["processes"] = parallel.world()
    if parallel.is_first():
        describe_processes(log, getattr(cfg, "batch_size", None))
        storage.write_json(log.folder / "config.json", settings)
        storage.write_json(log.folder / "environment.json", machine)
    return settings, machine


def describe_processes(log: RunLog, batch: int | None) -> None:
    """Logs how several processes share a batch of `batch` images, and warns if the run began with another number of them."""
    now, before = parallel.world(), 1
    if (path := log.folder / "environment.json").is_file():
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            before = int(strict_json.read_json(path)[0].get("processes", 1))
        if before != now:
            log.warn(
                f"the run began with {before} process{'es' * (before > 1)} and continues with {now}: batches are split "
                "differently, so numbers may differ by rounding, and random draws in training by more"
            )
    if now > 1:
        log.info(f"{now} processes: each computes a shard of every batch, a training step takes {batch} images in all")


def discard_task_in_progress(log: RunLog, difference: journal.Differs) -> None:
    """Discards the training of the task in progress, because this device does not repeat it bit for bit."""
    log.muted = False
    log.warn(f"the task in progress cannot be resumed ({difference}): it is learned from its start")
    if parallel.is_first():
        journal.discard(log.folder / "checkpoints")


def finish(folder: Path, results: dict[str, Any]) -> None:
    """Removes the caches of the frozen prefix and writes results.json, which marks the run as finished."""
    for cache in folder.glob("cache*"):
        shutil.rmtree(cache, ignore_errors=True)
    storage.write_json(folder / "results.json", results)


def move_aside(folder: Path) -> Path | None:
    """Renames a run folder to the first free `NAME.old_1`, `NAME.old_2`, ...; nothing is deleted. Returns the new name.

    Raises ValueError if another process is writing to it."""
    if not folder.exists():
        return None
    RunLog(folder, console=False).close()
    number = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}.old_{n}").exists())
    return folder.rename(folder.with_name(f"{folder.name}.old_{number}"))


def point_latest(link: Path, target: Path) -> None:
    """Makes the link `OUT/latest` point to the newest run folder; on a system without links there is none."""
    temporary = link.with_name(f".latest.{os.getpid()}")
    with contextlib.suppress(OSError):
        temporary.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)
        os.replace(temporary, link)
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
