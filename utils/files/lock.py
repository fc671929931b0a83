"""A folder for one process alone: by the system's lock on a file, or, where the file system has none, by a file with a pulse.

The second way is for network file systems without locks. It needs nothing but that creating a file fails when it is there:
the file says who holds the folder, and is touched every `BEAT` seconds. One that was not touched for `STALE` seconds, or whose
process on this machine is gone, is taken over; if that process was only suspended, it ends when it sees this. Times are the
file server's alone, so clocks may differ.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from utils.files.storage import add_path_to_errors

try:
    import fcntl
except ImportError:  # Windows has no locks of this kind
    fcntl = None  # type: ignore[assignment]

BEAT = 20.0
STALE = 180.0


class Lock:
    """Holds `folder` for this process. The system's lock dies with the process.

    Raises ValueError with the holder if there is another one. `notes` is to be shown to the user."""

    def __init__(self, folder: Path):
        self.notes: list[str] = []
        self._pulse: Pulse | None = None
        path = folder / ".lock"
        self._file = open(path, "a+", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115  closed by release()
        started = datetime.now().isoformat(sep=" ", timespec="seconds")
        who = f"process {os.getpid()} on {platform.node()} since {started}: {shlex.join(sys.argv)}"
        try:
            if fcntl is None:
                raise OSError("this system has no file locks")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise _taken(folder, holder) from error
        except OSError as error:
            try:
                self._pulse = Pulse(folder, who)
            except (ValueError, OSError):
                self._file.close()
                raise
            if fcntl is not None:
                self.notes.append(
                    f"the file system of {folder} has no locks ({error.strerror or error}): the folder is guarded by "
                    f"{self._pulse.path.name}, touched every {BEAT:g} s; if this machine goes down it is free {STALE:g} s later"
                )
            self.notes += self._pulse.notes
        _HELD.add(self)
        try:
            with add_path_to_errors(path):
                self._file.truncate(0)
                self._file.write(f"{who}\n")
                self._file.flush()
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Gives the folder free; harmless when repeated."""
        if self._pulse is not None:
            self._pulse.stop()
        self.forget()

    def forget(self) -> None:
        """Nothing more is done here; another process that holds the folder goes on holding it."""
        _HELD.discard(self)
        with contextlib.suppress(OSError):  # a full disk refuses what is left to write; the file is closed all the same
            self._file.close()


class Taken(ValueError):
    """Another process holds the folder."""


def _taken(folder: Path, holder: str) -> Taken:
    return Taken(f"{folder} is being written by another run ({holder}): wait for it, or give another --out")


@contextlib.contextmanager
def alone(folder: Path, look: float = 0.5) -> Iterator[None]:
    """Makes `folder` and holds it as soon as nobody else does, with a look every `look` seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            held = Lock(folder)
            break
        except Taken:
            time.sleep(look)
    try:
        yield
    finally:
        held.release()


_HELD: set[Lock] = set()


def _forget_locks() -> None:
    """In a forked worker: a copy of the lock would outlive a killed parent."""
    for lock in list(_HELD):
        lock.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


class Pulse:
    """The file `.lock.pulse`, made and touched by this process as long as it holds the folder."""

    def __init__(self, folder: Path, who: str):
        self.folder, self.path, self.notes = folder, folder / ".lock.pulse", list[str]()
        # host and process for machines, a name that no other holder has, the sentence for people
        self.text = f"{platform.node()}\n{os.getpid()}\n{os.urandom(8).hex()}\n{who}\n"
        while not self._create():
            self._take_over()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lock")
        self._thread.start()

    def _create(self) -> bool:
        """Whether the file was not there; it is whole from the first moment."""
        own = self.folder / f".lock.{os.getpid()}.{os.urandom(4).hex()}"
        try:
            own.write_text(self.text, encoding="utf-8", errors="backslashreplace")
            try:
                os.link(own, self.path)
                return True
            except FileExistsError:
                return False
            except OSError:  # no links here
                with (
                    contextlib.suppress(FileExistsError),
                    open(self.path, "x", encoding="utf-8", errors="replace") as file,
                ):
                    file.write(self.text)
                    return True
                return False
        finally:
            own.unlink(missing_ok=True)

    def _take_over(self) -> None:
        """Removes the file if its holder is gone; ValueError if not."""
        aside = self.folder / f".lock.old.{os.getpid()}.{os.urandom(4).hex()}"
        try:
            text, age = self.path.read_text(encoding="utf-8", errors="replace"), self._age()
        except FileNotFoundError:
            return  # given free just now
        host, number, *_, who = [*text.splitlines(), "", "", "unknown"][:4] if text else ("", "", "unknown")
        gone = host == platform.node() and number.isdigit() and _dead(int(number))
        if not gone and age < STALE:
            raise _taken(self.folder, f"{who}; its last sign of life is {max(age, 0):.0f} s old")
        try:
            os.rename(self.path, aside)  # of several that do this, one succeeds
            if (
                aside.read_text(encoding="utf-8", errors="replace") != text
            ):  # and that one may come late: it is a new holder's
                self._put_back(aside)
                raise _taken(self.folder, "which was quicker")
        except FileNotFoundError:
            return
        aside.unlink(missing_ok=True)
        why = "its process is gone" if gone else f"no sign of life for {age:.0f} s"
        self.notes.append(
            f"the folder was held by a run that has ended without a word ({why}), and is taken over: {who}"
        )

    def _put_back(self, aside: Path) -> None:
        """A new holder's file, unless there is a newer one by now: the holder of `aside` then finds that it lost."""
        try:
            os.link(aside, self.path)
        except FileExistsError:
            pass
        except OSError:  # no links here
            os.rename(aside, self.path)
            return
        aside.unlink(missing_ok=True)

    def _age(self) -> float:
        """Seconds since the file was touched, by the clock of the machine that has the files."""
        probe = self.folder / f".lock.now.{os.getpid()}.{os.urandom(4).hex()}"
        probe.touch()
        try:
            return probe.stat().st_mtime - self.path.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _mine(self) -> bool:
        try:
            return self.path.read_text(encoding="utf-8", errors="replace") == self.text
        except OSError:
            return False

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError):
                if self._mine():
                    os.utime(self.path)
                elif self._lost() and not self._ended.is_set():
                    _leave(self.folder)
                    return

    def _lost(self) -> bool:
        """Whether another process holds the folder; a file that is only gone is made again."""
        try:
            return self.path.read_text(encoding="utf-8", errors="replace") != self.text
        except FileNotFoundError:
            return not self._create()

    def stop(self) -> None:
        if not self._ended.is_set():
            self._ended.set()
            self._thread.join()
            if self._mine():
                self.path.unlink(missing_ok=True)


def _leave(folder: Path) -> None:
    """Ends this process at once: nothing it would still write may reach the folder, which is another's."""
    print(f"\n{folder} was taken over by another run while this one showed no sign of life: it ends", file=sys.stderr)
    sys.stderr.flush()
    os._exit(75)


def _dead(number: int) -> bool:
    """Whether this machine has no such process; where that cannot be asked harmlessly, no."""
    if os.name != "posix":
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False
