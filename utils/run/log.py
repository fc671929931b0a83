"""The log of a run: run.log, metrics.jsonl and progress bars."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
import traceback
from datetime import datetime
from pathlib import Path
from typing import Any

from utils.files.lock import Lock
from utils.files.storage import add_path_to_errors, plain
from utils.run.mirror import Mirror
from utils.run.progress import Bar, write_line
from utils.text import CONTROL, printable


class FolderGone(FileNotFoundError):
    """The run folder was deleted or moved while the run was going on."""


class RunLog:
    """`run.log` (time-stamped text, no control codes) and `metrics.jsonl` (a JSON object a line) of one run folder.

    Opening an existing folder appends; the incomplete last row of a killed run is dropped. A RunLog locks the folder: a second
    one raises ValueError, so two runs never share a log.
    `rows` is the number of complete lines in metrics.jsonl. While `muted`, nothing is written or shown: a task is being
    replayed (utils/run/journal.py). Python's `logging` is not used, so there is no global state.
    """

    later_runs: int  # runs that the command makes after this one, for the time left
    _tasks: Bar | None  # the bar of the tasks

    def __init__(self, folder: Path, console: bool = True):
        self.folder, self.console, self.muted = Path(folder), console, False
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(self.folder)
        try:
            # a file name that is not UTF-8 is shown escaped instead of ending the run
            self._text = open(self.folder / "run.log", "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            # created if missing; opened for reading too, since rows are counted and can be cut back
            self._table = open(self.folder / "metrics.jsonl", "a+b")  # noqa: SIM115
        except OSError:
            self._lock.release()
            raise
        self.rows, self._offset, self._start = 0, 0.0, time.monotonic()
        self.mirror: Mirror | None = None
        self.later_runs, self._tasks = 0, None
        try:
            self._refuse_damage()
            self.truncate_rows(None)
            for note in self._lock.notes:
                self.warn(note)
        except (ValueError, OSError):
            self.close()
            raise

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.muted = False
        if error is None:
            self.close()
            return
        with contextlib.suppress(OSError):  # a disk that is full must not hide why the run ends
            # the console shows one line, the log has the traceback
            self._write("STOP ", "".join(traceback.format_exception(error)).rstrip())
        with contextlib.suppress(OSError):
            self.close()

    def close(self) -> None:
        """Closes both files and unlocks the folder. May be called again."""
        try:
            if self.mirror is not None:
                self.mirror.close()
            self._text.close()
        finally:  # closing writes the rest of a buffer, which fails on a full disk: the folder is unlocked all the same
            try:
                self._table.close()
            finally:
                self._lock.release()

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken; a resumed run continues from the time of its last row."""
        return self._offset + time.monotonic() - self._start

    def info(self, text: str) -> None:
        """Writes `text` to run.log and, if the log has a console, to standard output."""
        self._write("INFO ", text)
        if self.console and not self.muted:
            write_line(text, sys.stdout)

    def warn(self, text: str, console: bool = True) -> None:
        """Writes `text` to run.log and, if the log has a console and `console` is true, to standard error."""
        self._write("WARN ", text)
        if self.console and console and not self.muted:
            write_line(f"warning: {text}", sys.stderr)

    def check_folder(self) -> None:
        """Raises FolderGone if the folder is no longer the one that this run opened: what is written would be lost."""
        try:
            there = os.path.samestat(os.stat(self.folder / "metrics.jsonl"), os.fstat(self._table.fileno()))
        except FileNotFoundError:
            there = False
        if not there:
            raise FolderGone(
                f"{self.folder}: the run folder was deleted or moved while the run was going on, so the run stops: move it "
                "back and run the same command to go on, or run it to start anew"
            )

    def _write(self, level: str, text: str) -> None:
        if self.muted:
            return
        self.check_folder()
        stamp = f"{datetime.now().isoformat(sep=' ', timespec='seconds')} {level} "
        first, *rest = printable(CONTROL.sub("", text)).split("\n")
        with add_path_to_errors(self.folder / "run.log"):
            self._text.write("\n".join([stamp + first, *(" " * len(stamp) + line for line in rest)]) + "\n")
            self._text.flush()

    def row(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Appends one line to metrics.jsonl: `kind`, `time` (seconds that the run has taken) and `fields`; returns it.

        Numpy and torch numbers are converted. NaN or infinity raises ValueError with kind and field, and nothing is written.
        The line is flushed, so it survives a killed process.
        """
        if "time" in fields:
            raise ValueError(f"metrics row '{kind}': the field 'time' is set by the log itself")
        try:
            values = plain(fields, "")
        except (TypeError, ValueError) as error:
            raise type(error)(f"metrics row '{kind}': {error}") from error
        line = {"kind": kind, "time": round(self.seconds, 3), **values}
        if self.muted:
            return line
        self.check_folder()
        with add_path_to_errors(self.folder / "metrics.jsonl"):
            self._table.write(json.dumps(line, allow_nan=False, ensure_ascii=False).encode() + b"\n")
            self._table.flush()
        self.rows += 1
        if self.mirror is not None:
            self.mirror.row(self.rows - 1, line)
        return line

    def sync(self) -> None:
        """Forces metrics.jsonl to the disk, so that it survives a power cut; called before a checkpoint counts the rows."""
        self._table.flush()
        os.fsync(self._table.fileno())

    def truncate_rows(self, count: int | None) -> None:
        """Cuts metrics.jsonl back to its first `count` rows (None: to its complete rows); ValueError if it has fewer."""
        self._table.flush()
        self._table.seek(0)
        lines = [line for line in self._table.read().splitlines(keepends=True) if line.endswith(b"\n")]
        if count is not None and not 0 <= count <= len(lines):
            path = self.folder / "metrics.jsonl"
            raise ValueError(
                f"{path} has {len(lines)} rows, fewer than the {count} of the checkpoint: was it changed by hand?"
            )
        lines = lines[:count]
        self._table.truncate(sum(map(len, lines)))
        self._table.seek(0, os.SEEK_END)
        if self.mirror is not None and len(lines) != self.rows:
            self.mirror.cut(len(lines))
        self.rows, self._start = len(lines), time.monotonic()
        self._offset = float(json.loads(lines[-1]).get("time", 0.0)) if lines else 0.0

    def _refuse_damage(self) -> None:
        """ValueError for the first row that is not valid JSON: at the start of a run, not when its report is written."""
        path = self.folder / "metrics.jsonl"
        for count, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                json.loads(line)["kind"]
            except (ValueError, TypeError, KeyError, RecursionError):
                hint = "repair it, or start afresh with --resume never, which moves the old folder aside"
                raise ValueError(f"{path}: row {count} is damaged; {hint}") from None

    def copy_rows_aside(self) -> None:
        """Copies metrics.jsonl to the first free name metrics.old_1.jsonl, ...: no checkpoint belongs to these rows."""
        number = next(n for n in range(1, 10**6) if not (self.folder / f"metrics.old_{n}.jsonl").exists())
        if self.rows:
            shutil.copyfile(self.folder / "metrics.jsonl", self.folder / f"metrics.old_{number}.jsonl")

    def bar(self, total: int, text: str, level: int = 0, every: float = 5.0, done: int = 0) -> Bar:
        """A progress bar over `total` steps: level 0 for tasks of a run, 1 for epochs of a task, and so on.

        `done` steps were finished before the run was resumed; they do not count in the estimate of the time left.
        On a terminal it is a tqdm bar; elsewhere lines on standard error: the first step, the last, and in between at most
        one in `every` seconds, inside an epoch too. Nothing goes to the log files.
        """
        around = self._tasks if level else None
        bar = Bar(total, text, level, every, self.console, done, around, 0 if level else total * self.later_runs)
        if not level:
            self._tasks = bar
        return bar


class SilentLog(RunLog):
    """The log of every rank but 0, which alone writes and prints (utils/process/parallel.py)."""

    def __init__(self, folder: Path):
        self.folder, self.console, self.muted, self.mirror = Path(folder), False, False, None
        self.later_runs, self._tasks = 0, None
        self.rows, self._offset, self._start = 0, 0.0, time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        pass

    def check_folder(self) -> None:
        pass

    def _write(self, level: str, text: str) -> None:
        pass

    def row(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"kind": kind, "time": round(self.seconds, 3), **plain(fields, "")}

    def sync(self) -> None:
        pass

    def truncate_rows(self, count: int | None) -> None:
        pass

    def copy_rows_aside(self) -> None:
        pass
