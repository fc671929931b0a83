"""The folder of a run: opened with its log, described, moved aside when a run starts afresh, and finished."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.config import strict_json
from utils.files import storage
from utils.process import parallel, sources
from utils.process.machine import environment
from utils.run import journal, tracker
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
    log: RunLog, cfg: Any, settings: dict[str, Any], facts: Any, device: torch.device, sources_changed: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Writes config.json (`settings`) and environment.json (machine, versions, backbone weights), and returns both.

    Where files of the program are in no commit, `source/` has them; with `sources_changed` the folder that an earlier process
    wrote is moved aside first."""
    machine = {**environment(device), "backbone": vars(facts)}
    if parallel.world() > 1:
        machine["processes"] = parallel.world()
    if parallel.is_first():
        describe_processes(log, getattr(cfg, "batch_size", None))
        if source := save_sources(log, machine["git"], sources_changed):
            machine["source"] = source
        storage.write_json(log.folder / "config.json", settings)
        storage.write_json(log.folder / "environment.json", machine)
    return settings, machine


def save_sources(log: RunLog, git: dict[str, Any] | None, changed: bool) -> dict[str, str]:
    """Writes what is in no commit to the folder `source`, see utils/process/sources.py, and returns the paths."""
    folder = log.folder / "source"
    if changed and folder.is_dir():
        folder.rename(_free(folder))
    if not git or not git["dirty"]:
        return {}
    try:
        return sources.save(folder, git["untracked"])
    except subprocess.SubprocessError:
        log.warn("git could not say which files of the program are in no commit: they are not saved in the run folder")
        return {}


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


def finish(log: RunLog, results: dict[str, Any]) -> None:
    """Removes the caches of the frozen prefix and writes results.json, which marks the run as finished; tells the tracker."""
    for cache in log.folder.glob("cache*"):
        shutil.rmtree(cache, ignore_errors=True)
    storage.write_json(log.folder / "results.json", storage.with_digest(results))
    if log.mirror is not None:
        log.mirror.finish(tracker.figures(results))


def move_aside(folder: Path) -> Path | None:
    """Renames a run folder to the first free `NAME.old_1`, `NAME.old_2`, ...; nothing is deleted. Returns the new name.

    Raises ValueError if another process is writing to it."""
    if not folder.exists():
        return None
    RunLog(folder, console=False).close()
    return folder.rename(_free(folder))


def _free(folder: Path) -> Path:
    """The first free name of `NAME.old_1`, `NAME.old_2`, ... beside the folder."""
    numbered = (folder.with_name(f"{folder.name}.old_{n}") for n in range(1, 10**6))
    return next(path for path in numbered if not path.exists())


def point_latest(link: Path, target: Path) -> None:
    """Makes the link `OUT/latest` point to the newest run folder; on a system without links there is none."""
    temporary = link.with_name(f".latest.{os.getpid()}")
    with contextlib.suppress(OSError):
        temporary.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)
        os.replace(temporary, link)
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
