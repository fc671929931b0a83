"""The folder of a run: moved aside when a run starts afresh, and named as the newest."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from utils.config import strict_json
from utils.process import parallel
from utils.run.log import RunLog

if TYPE_CHECKING:
    from pathlib import Path

import os
from pathlib import Path


def tell_processes(folder: Path, log: RunLog, batch: int | None) -> None:
    """What several processes do with the run's batches, and that a run goes on with another number of them."""
    now, before = parallel.world(), 1
    if (path := folder / "environment.json").is_file():
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            before = int(strict_json.read_json(path)[0].get("processes", 1))
        if before != now:
            log.warn(
                f"the run was begun with {before} process{'es' * (before > 1)} and goes on with {now}: parts of batches are "
                "others, so numbers may differ by rounding, and random draws in training by more"
            )
    if now > 1:
        log.info(f"{now} processes: each computes a part of every batch, a training step takes {batch} images in all")


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
