"""A folder for one process alone, by the library filelock: the system's lock, or a lease where the file system has no locks.

The system's lock ends with its process. A lease is a file that its holder touches every `BEAT` seconds; it is free once its
process on this machine is gone, or after `STALE` seconds without a touch. A holder that was only suspended, and whose folder
another process has taken meanwhile, ends as soon as it notices. Ages are the file server's, so machines' clocks may differ.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from utils.text import printable

if TYPE_CHECKING:
    from filelock import FileLock, LeaseCompromise, SoftFileLease

BEAT = 20.0  # seconds between two touches of a lease
STALE = 180.0  # seconds without a touch after which a lease is free


class Taken(ValueError):
    """Another process holds the folder."""


class Lock:
    """Holds `folder` for this process until `release`; `notes` are sentences to show to the user.

    `wait` is the longest time to wait for another holder in seconds, -1 for as long as it takes. Raises Taken, which names
    the holder, and OSError where nothing can be written in the folder."""

    def __init__(self, folder: Path, wait: float = 0.0):
        import filelock  # imports asyncio, and most commands lock nothing

        self.folder, self.notes, self._released, self._text = folder, list[str](), False, ""
        self._lease_file, self._who = folder / ".lock.lease", folder / ".lock.who"
        self._lock: FileLock | SoftFileLease
        with open(folder / ".lock", "ab"):  # what prevents writing is an error of its own, and no lack of locks
            pass
        try:
            self._lock = filelock.FileLock(folder / ".lock", timeout=wait, thread_local=False, fallback_to_soft=False)
            self._lock.acquire()
        except filelock.Timeout:
            raise _taken(folder, self._holder("unknown")) from None
        except OSError as error:
            self._lock = self._lease(wait)
            self.notes.append(
                f"the file system of {folder} has no locks ({error.strerror or error}): the folder is guarded by "
                f"{self._lease_file.name}, touched every {BEAT:g} s; if this machine goes down it is free {STALE:g} s later"
            )
            if before := self._holder(""):
                self.notes.append(
                    f"the run that held the folder ended without releasing it; it is taken over: {before}"
                )
        started = datetime.now().isoformat(sep=" ", timespec="seconds")
        self._text = f"process {os.getpid()} on {platform.node()} since {started}: {shlex.join(sys.argv)}"
        self._text = printable(self._text).replace("\n", " ").strip()
        try:
            self._who.write_text(f"{self._text}\n", encoding="utf-8", errors="backslashreplace")
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Releases the folder; harmless when repeated, and in a forked process, which holds nothing."""
        self._released = True
        if self._lock.is_locked and self._holder("") == self._text:
            with contextlib.suppress(OSError):
                self._who.unlink(missing_ok=True)
        self._lock.release()

    def _lease(self, wait: float) -> SoftFileLease:
        """The lease of the folder. A lease that looks old is watched for `STALE` seconds: its machine may still touch it."""
        import filelock

        if wait >= 0:
            age = self._age() or 0.0
            wait = max(wait, STALE + BEAT if age >= STALE else 1.0)  # a dead process's lease is free at the second try
            if age >= STALE:
                print(
                    f"{self._lease_file} was touched {age:.0f} s ago: {self.folder} is taken over if that stays so for "
                    f"{STALE:g} s"
                )
        lease = filelock.SoftFileLease(
            self._lease_file,
            timeout=wait,
            poll_interval=0.2,
            thread_local=False,
            lease_duration=STALE,
            heartbeat_interval=BEAT,
            on_compromise=self._lost,
        )
        try:
            lease.acquire()
        except filelock.Timeout:
            holder = self._holder(f"unknown, see {self._lease_file.name}")
            raise _taken(self.folder, f"{holder}; its last sign of life is {self._age() or 0:.0f} s old") from None
        return lease

    def _lost(self, lost: LeaseCompromise) -> None:
        """The lease is no longer held by this process; where its file was only removed, it is created again."""
        if lost.reason == "marker-missing":
            with contextlib.suppress(Taken, OSError):
                self._lock = self._lease(0.0)
                if self._released:
                    self._lock.release()
                return
        if not self._released:
            _leave(self.folder)

    def _age(self) -> float | None:
        """Seconds since the lease was touched, by the clock of the machine that has the files; None without a lease."""
        probe = self.folder / f".lock.now.{os.getpid()}.{os.urandom(4).hex()}"
        try:
            probe.touch()
            return max(probe.stat().st_mtime - self._lease_file.stat().st_mtime, 0.0)
        except OSError:
            return None
        finally:
            probe.unlink(missing_ok=True)

    def _holder(self, unknown: str) -> str:
        """Who wrote that it holds the folder, or `unknown`."""
        try:
            return self._who.read_text(encoding="utf-8", errors="replace").strip() or unknown
        except OSError:
            return unknown


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Creates `folder` and holds it as soon as no other process does."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder, wait=-1)
    try:
        yield
    finally:
        lock.release()


def holder_of(folder: Path) -> str | None:
    """Who writes in `folder`, in words; None if no process does. It holds the lock itself for a moment."""
    if not (folder / ".lock").exists():
        return None
    import filelock

    lock = filelock.FileLock(folder / ".lock", timeout=0, thread_local=False, fallback_to_soft=False)
    who = folder / ".lock.who"
    try:
        lock.acquire()
        lock.release()
        return None
    except filelock.Timeout:
        pass
    except OSError:  # no locks on this file system: a lease that was touched not long ago
        try:
            if time.time() - (folder / ".lock.lease").stat().st_mtime > STALE:
                return None
        except OSError:
            return None
    try:
        return who.read_text(encoding="utf-8", errors="replace").strip() or "an unknown process"
    except OSError:
        return "an unknown process"


def _taken(folder: Path, holder: str) -> Taken:
    return Taken(f"{folder} is being written by another run ({holder}): wait for it, or choose another --out")


def _leave(folder: Path) -> None:
    """Ends this process at once: nothing it would still write may reach the folder, which is another's."""
    print(f"\n{folder} was taken over by another run while this one showed no sign of life: it ends", file=sys.stderr)
    sys.stderr.flush()
    os._exit(75)
