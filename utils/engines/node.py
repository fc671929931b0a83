"""A run on another machine: the command it executes, and the file that carries its exit code back."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

from utils.files import storage

ROOT = Path(__file__).resolve().parents[2]
INTERRUPTED = 75  # exit code of a run that was stopped and can be resumed
STOP = 60.0  # seconds a stopped run has for its checkpoint; then it is killed and later continues from an older one
LOOK = 0.1  # seconds between two looks at the process


def exit_file(console: Path) -> Path:
    """The file with the exit code of the run whose output is in `console`; it appears when the run has ended for good."""
    return console.with_suffix(".exit")


class NodeRun:
    """One run on a node: its command as a process, which `stop` ends so that it can be resumed. Is pickled to get there."""

    before: tuple[str, ...] = ()  # words of the command line before the command

    def __init__(self, command: list[str], console: Path, threads: int | None = None):
        self.command, self.console, self.place = command, console.absolute(), str(Path.cwd())
        self.threads, self.again = threads, False
        self._process: subprocess.Popen[bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": None}

    def start(self) -> None:
        exit_file(self.console).unlink(missing_ok=True)
        self.console.parent.mkdir(parents=True, exist_ok=True)
        command = [*self.before, *self.command]
        if self.again and "--resume" in command:  # --resume never holds for the first start only
            command[command.index("--resume") + 1] = "auto"
        threads = {"OMP_NUM_THREADS": str(self.threads)} if self.threads else {}
        with self.console.open("ab" if self.again else "wb") as console:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env={**threads, **os.environ},
                cwd=self.place,
                start_new_session=True,
            )

    def code(self) -> int | None:
        """The exit code, None while the process runs.

        Does not ask Popen: its lock would hang if a signal's handler called this while the interrupted code holds it."""
        process = self._process
        if process is None:
            return None
        if process.returncode is None:
            try:
                pid, status = os.waitpid(process.pid, os.WNOHANG)
                if pid:
                    process.returncode = os.waitstatus_to_exitcode(status)
            except ChildProcessError:  # a signal's handler collected the process between these two lines
                process.returncode = INTERRUPTED
        return process.returncode

    def wait(self) -> int:
        while (code := self.code()) is None:
            time.sleep(LOOK)
        return code

    def stop(self) -> None:
        """Asks the process to write a checkpoint and end; kills it if it still runs after `STOP` seconds."""
        process = self._process
        if process is None or self.code() is not None:
            return
        os.kill(process.pid, 15)
        until = time.monotonic() + STOP
        while self.code() is None and time.monotonic() < until:
            time.sleep(LOOK)
        if self.code() is None:
            os.kill(process.pid, 9)
            self.wait()

    def write_exit_code(self, code: int) -> None:
        """Writes the exit code for the machine that watches the sweep."""
        storage.write_bytes(exit_file(self.console), str(code).encode(), durable=False)


def read_exit_code(console: Path) -> int | None:
    """The exit code of the run with this console; None while there is none."""
    try:
        return int(exit_file(console).read_text())
    except (OSError, ValueError):
        return None
