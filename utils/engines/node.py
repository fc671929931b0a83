"""A run on another machine: the command it executes, and the file that carries its exit code back."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

from utils.files import storage

ROOT = Path(__file__).resolve().parents[2]


INTERRUPTED = 75


STOP = 60.0  # seconds a stopped run has for its checkpoint; then it is killed and goes on from an older one


LOOK = 0.1  # seconds between two looks at the process


def exit_file(console: Path) -> Path:
    """Holds the exit code of the run whose output is in `console`; there once the run has ended for good."""
    return console.with_suffix(".exit")


class NodeRun:
    """One run on a node: its command as a process, which `stop` ends so that it can go on later. Pickled on its way."""

    before: tuple[str, ...] = ()  # words before the command

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
        if self.again and "--resume" in command:  # --resume never is for the first time alone
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

        Not through Popen, whose lock would hang if a signal's handler came here while the code below it is in there."""
        process = self._process
        if process is None:
            return None
        if process.returncode is None:
            try:
                pid, status = os.waitpid(process.pid, os.WNOHANG)
                if pid:
                    process.returncode = os.waitstatus_to_exitcode(status)
            except ChildProcessError:  # a handler came just between these two lines
                process.returncode = INTERRUPTED
        return process.returncode

    def wait(self) -> int:
        while (code := self.code()) is None:
            time.sleep(LOOK)
        return code

    def stop(self) -> None:
        """Asks the process to save itself and end, and waits for that; `STOP` seconds at most, then it is killed."""
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

    def tell(self, code: int) -> None:
        """Says that the run has ended with `code`."""
        storage.write_bytes(exit_file(self.console), str(code).encode(), durable=False)


def read_exit_code(console: Path) -> int | None:
    """The exit code that a node left for the run with this console."""
    try:
        return int(exit_file(console).read_text())
    except (OSError, ValueError):
        return None
