"""Runs as processes of their own, some at a time, with one live table; a failure stops none of the others."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from utils.report import number
from utils.runlog import CONTROL, clock

POLL = 0.1  # seconds between two looks at the processes
REFRESH = 1.0  # seconds between two looks at the clock in the live table
_NOTICES = ("SIGINT", "SIGTERM", "SIGHUP")


@dataclass
class Job:
    """One run: `cell` labels its row, `folder` is its run folder, `console` gets what it prints."""

    cell: str
    seed: int
    command: Sequence[str]
    folder: Path
    console: Path
    state: str = "waiting"  # then running, and at last done or failed
    accuracy: float | None = None
    reason: str = ""
    started: float = 0.0
    needs: Mapping[str, Any] = field(default_factory=dict, repr=False)  # keys for a cluster, see utils/engines.py


def threads(jobs: int) -> int:
    """Threads of each of `jobs` processes on the cores that this process may use, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // jobs)


def run(jobs: Sequence[Job], at_once: int, accuracy_of: Callable[[Path], float | None]) -> None:
    """Runs what is waiting, `at_once` at a time, in order; each job's state, reason and accuracy are set.

    `accuracy_of(run folder)` is the last accuracy of a finished run, None if it is not finished. Ctrl-C and SIGTERM are
    handed to the processes, which end resumable; then KeyboardInterrupt is raised. A second notice kills them."""
    # OpenMP threads beyond the cores cost more than they bring; who sets the variable knows better
    environment = {"OMP_NUM_THREADS": str(threads(at_once)), **os.environ}
    board, start = Board(sys.stdout), time.monotonic()
    waiting = deque(job for job in jobs if job.state == "waiting")
    running: list[tuple[Job, subprocess.Popen[bytes]]] = []
    try:
        with notices() as seen:
            told = 0
            while True:
                while waiting and len(running) < at_once and not seen:
                    running.append((job := waiting.popleft(), _start(job, environment)))
                for job, process in [pair for pair in running if pair[1].poll() is not None]:
                    running.remove((job, process))
                    end(job, process.returncode, accuracy_of)
                    board.line(sentence(job, jobs))
                if len(seen) > told:
                    for _, process in running:
                        process.kill() if told else process.terminate()
                    told = len(seen)
                if board.live:
                    board.show(table(jobs, time.monotonic() - start, shutil.get_terminal_size().columns))
                if not running and (seen or not waiting):
                    break
                time.sleep(POLL)
    finally:  # whatever went wrong here, such as a console that is gone, nothing goes on unwatched
        for _, process in running:
            process.terminate()
            process.wait()
    if seen:
        raise KeyboardInterrupt


@contextlib.contextmanager
def notices() -> Iterator[list[int]]:
    """Collects interruptions instead of raising them, so that none falls between two steps; what is ignored stays so."""
    seen: list[int] = []
    numbers = [getattr(signal, name) for name in _NOTICES if hasattr(signal, name)]
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
    for n in before:
        signal.signal(n, lambda notice, _: seen.append(notice))
    try:
        yield seen
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def _start(job: Job, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    job.console.parent.mkdir(parents=True, exist_ok=True)
    job.started, job.state = time.monotonic(), "running"
    with job.console.open("wb") as console:
        # a session of its own: Ctrl-C reaches the process once, from us, and not a second time from the terminal
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def end(job: Job, code: int, accuracy_of: Callable[[Path], float | None], why: str = "") -> None:
    """The job has ended with `code`; `why` is what is known of it where the run itself could say nothing."""
    job.accuracy = accuracy_of(job.folder) if code == 0 or why else None
    job.state = "failed" if code and job.accuracy is None else "done"
    if job.state == "failed":
        printed = job.console.read_text(encoding="utf-8", errors="replace") if job.console.is_file() else ""
        lines = CONTROL.sub("", printed).splitlines()
        errors = [line for line in lines if line.startswith("error: ")] or [line for line in lines if line.strip()]
        what = why or ("interrupted, resumable" if code == 75 else f"exit {code}")
        job.reason = f"{what}: {errors[-1] if errors else 'it said nothing'} (all it printed: {job.console})"


def sentence(job: Job, jobs: Sequence[Job]) -> str:
    ended = sum(j.state in ("done", "failed") for j in jobs)
    took = clock(time.monotonic() - job.started)
    result = f"last accuracy {number(job.accuracy)}" if job.state == "done" else job.reason
    return f"[{ended}/{len(jobs)}] {job.cell}, seed {job.seed}: {job.state} after {took}, {result}"


def table(jobs: Sequence[Job], seconds: float, columns: int) -> list[str]:
    """Lines of the live table: a row for each cell with the states of its runs and the mean last accuracy so far.

    Labels too long for the terminal lose their beginning: cells of a grid differ at the end."""
    cells: dict[str, list[Job]] = {}
    for job in jobs:
        cells.setdefault(job.cell, []).append(job)
    width = min(max(map(len, cells)), max(columns - 34, 8))
    lines = [f"{'cell':<{width}} {'done':>7} {'running':>8} {'failed':>7} {'last':>7}"]
    for cell, own in cells.items():
        states = [job.state for job in own]
        known = [job.accuracy for job in own if job.accuracy is not None]
        last = number(sum(known) / len(known) if known else None)
        done = f"{states.count('done')}/{len(own)}"
        name = cell if len(cell) <= width else f"..{cell[2 - width :]}"
        lines.append(f"{name:<{width}} {done:>7} {states.count('running'):>8} {states.count('failed'):>7} {last:>7}")
    ended = sum(job.state in ("done", "failed") for job in jobs)
    return [*lines, f"{ended} of {len(jobs)} runs ended, {clock(seconds)}"]


class Board:
    """A block of lines rewritten in place on a terminal; elsewhere only the sentences on each ended run are printed."""

    def __init__(self, stream: TextIO):
        self.stream, self.live = stream, stream.isatty() and os.environ.get("TERM") != "dumb"
        self._shown: list[str] = []
        self._time = 0.0

    def line(self, text: str) -> None:
        """A line that stays, above the block."""
        self._write(f"{self._up()}{text}\n")
        self._shown = []  # the block is drawn anew below

    def show(self, lines: Sequence[str]) -> None:
        """The block, cut to the terminal: too long a table shows its head and its last line."""
        if not self.live:
            return
        size = shutil.get_terminal_size()
        room = max(size.lines - 2, 3)
        if len(lines) > room:
            lines = [*lines[: room - 2], f"... {len(lines) - room + 1} more rows", lines[-1]]
        lines = [line[: size.columns - 1] for line in lines]
        fresh = self._shown[:-1] == lines[:-1] and time.monotonic() - self._time < REFRESH
        if not fresh or len(lines) != len(self._shown):
            self._write(self._up() + "".join(f"{line}\n" for line in lines))
            self._shown, self._time = list(lines), time.monotonic()

    def _up(self) -> str:
        return f"\x1b[{len(self._shown)}F\x1b[J" if self._shown else ""

    def _write(self, text: str) -> None:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self.stream.write(text.encode(encoding, "replace").decode(encoding))
        self.stream.flush()
