"""What every engine needs: a job and its end, interruptions, and the live table of a sweep."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from utils.text import CONTROL, clock, number, one_line, printable

POLL = 0.1  # seconds between two looks at the processes
REFRESH = 1.0  # seconds between two looks at the clock in the live table
MOST_RUNS = 30  # jobs of which the live table shows each
_NOTICES = ("SIGINT", "SIGTERM", "SIGHUP")


@dataclass
class Job:
    """One run: `cell` labels its row, `folder` is its run folder, its output goes to the file `console`."""

    cell: str
    seed: int
    command: Sequence[str]
    folder: Path
    console: Path
    state: str = "waiting"  # then running, and at last done or failed
    accuracy: float | None = None
    reason: str = ""
    started: float = 0.0
    threads: int | None = None  # None: the cores are shared out
    needs: Mapping[str, Any] = field(
        default_factory=dict, repr=False
    )  # keys for a cluster, see utils/engines/__init__.py


@contextlib.contextmanager
def notices() -> Iterator[list[int]]:
    """Collects interruptions in a list instead of raising them, so that none comes between two steps.

    Signals that this process ignores are still ignored."""
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


def end(job: Job, code: int, accuracy_of: Callable[[Path], float | None], why: str = "") -> None:
    """Sets accuracy, state and reason of a job that ended with exit code `code`.

    `why` is the reason an engine knows where the run itself could not print one."""
    job.accuracy = accuracy_of(job.folder) if code == 0 or why else None
    job.state = "failed" if code and job.accuracy is None else "done"
    if job.state == "failed":
        printed = job.console.read_text(encoding="utf-8", errors="replace") if job.console.is_file() else ""
        lines = CONTROL.sub("", printed).splitlines()
        errors = [line for line in lines if line.startswith("error: ")] or [line for line in lines if line.strip()]
        what = why or ("interrupted, resumable" if code == 75 else f"exit {code}")
        job.reason = one_line(f"{what}: {errors[-1] if errors else 'it printed nothing'} (full output: {job.console})")


@dataclass
class Following:
    """How far the running jobs are, read from the metrics.jsonl of their folders as it grows."""

    read: dict[Path, tuple[int, dict[str, Any]]] = field(
        default_factory=dict
    )  # bytes read, and the last row of each kind
    looked: float = -math.inf

    def look(self, jobs: Sequence[Job]) -> None:
        """Reads what is new, at most once in `REFRESH` seconds."""
        if time.monotonic() - self.looked < REFRESH:
            return
        self.looked = time.monotonic()
        for job in jobs:
            if job.state == "running":
                self._read(job.folder)

    def _read(self, folder: Path) -> None:
        start, rows = self.read.get(folder, (0, {}))
        try:
            with open(folder / "metrics.jsonl", "rb") as file:
                if file.seek(0, os.SEEK_END) < start:  # cut back by a run that was resumed
                    start, rows = 0, {}
                file.seek(start)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:
            return
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                row = json.loads(line)
                rows[row["kind"]] = row
        self.read[folder] = (start + len(whole) + len(newline), rows)

    def share(self, job: Job) -> float:
        """How much of a job is done, from 0 to 1, as far as it is known."""
        if job.state in ("done", "failed"):
            return 1.0
        row = self.read.get(job.folder, (0, {}))[1].get("task")
        return (row["task"] + 1) / row["tasks"] if row and job.state == "running" and row.get("tasks") else 0.0

    def words(self, job: Job) -> str:
        """The state of a job: waiting; the task it learns and the accuracy so far; its result."""
        if job.state != "running":
            return f"finished, last {number(job.accuracy)}" if job.state == "done" else job.state
        rows = self.read.get(job.folder, (0, {}))[1]
        task, epoch = rows.get("task"), rows.get("epoch")
        learned = task["task"] + 1 if task else 0
        tasks = task.get("tasks") if task else None
        text = f"task {min(learned + 1, tasks or learned + 1)}" + (f" of {tasks}" if tasks else "")
        if epoch and epoch.get("task") == learned:
            text += f", {epoch['phase']} epoch {epoch['epoch']} of {epoch['epochs']}"
        so_far = task.get("accuracy_seen") if task else None
        return one_line(text + (f", {number(100 * so_far)} so far" if so_far is not None else ""))


def seconds_left(jobs: Sequence[Job], following: Following, seconds: float, before: int) -> float | None:
    """Seconds until all jobs have ended, from how much of them was done in `seconds`; `before` were finished at the start.
    None before anything is done."""
    passed = sum(map(following.share, jobs)) - before
    return seconds / passed * max(len(jobs) - before - passed, 0.0) if passed > 0 else None


def sentence(job: Job, jobs: Sequence[Job]) -> str:
    ended = sum(j.state in ("done", "failed") for j in jobs)
    took = clock(time.monotonic() - job.started)
    result = f"last accuracy {number(job.accuracy)}" if job.state == "done" else job.reason
    return f"[{ended}/{len(jobs)}] {job.cell}, seed {job.seed}: {job.state} after {took}, {result}"


def table(jobs: Sequence[Job], seconds: float, columns: int, following: Following | None = None) -> list[str]:
    """Lines of the live table: with `following` and at most `MOST_RUNS` jobs a row for each run, else for each cell with the
    states of its runs and the mean last accuracy so far.

    Labels too long for the terminal are cut at the beginning, since cells of a grid differ at the end."""
    if following is not None and len(jobs) <= MOST_RUNS:
        names = [f"{job.cell}, seed {job.seed}" for job in jobs]
        width = min(max(map(len, names)), max(columns - 40, 8))
        lines = [
            f"{name if len(name) <= width else f'..{name[2 - width :]}':<{width}}  {following.words(job)}"
            for name, job in zip(names, jobs, strict=True)
        ]
        return [*lines, f"{_ended(jobs)}, {clock(seconds)}"]
    cells: dict[str, list[Job]] = {}
    for job in jobs:
        cells.setdefault(job.cell, []).append(job)
    width = min(max(map(len, cells)), max(columns - 34, 8))
    lines = [f"{'cell':<{width}} {'done':>7} {'running':>8} {'failed':>7} {'last':>7}"]
    for cell, jobs_of_cell in cells.items():
        states = [job.state for job in jobs_of_cell]
        known = [job.accuracy for job in jobs_of_cell if job.accuracy is not None]
        last = number(sum(known) / len(known) if known else None)
        done = f"{states.count('done')}/{len(jobs_of_cell)}"
        name = cell if len(cell) <= width else f"..{cell[2 - width :]}"
        lines.append(f"{name:<{width}} {done:>7} {states.count('running'):>8} {states.count('failed'):>7} {last:>7}")
    return [*lines, f"{_ended(jobs)}, {clock(seconds)}"]


def _ended(jobs: Sequence[Job]) -> str:
    return f"{sum(job.state in ('done', 'failed') for job in jobs)} of {len(jobs)} runs ended"


class Board:
    """Rewrites a block of lines in place on a terminal; elsewhere it prints only a sentence for each ended run."""

    def __init__(self, stream: TextIO):
        self.stream, self.live = stream, stream.isatty() and os.environ.get("TERM") != "dumb"
        self._shown: list[str] = []
        self._time = 0.0

    def line(self, text: str) -> None:
        """Prints a line that stays, above the block."""
        self._write(f"{self._up()}{printable(text)}\n")
        self._shown = []  # the block is drawn anew below

    def show(self, lines: Sequence[str]) -> None:
        """Draws the block, cut to the terminal: too long a table shows its first rows and its last line."""
        if not self.live:
            return
        size = shutil.get_terminal_size()
        room = max(size.lines - 2, 3)
        if len(lines) > room:
            lines = [*lines[: room - 2], f"... {len(lines) - room + 1} more rows", lines[-1]]
        lines = [one_line(line)[: size.columns - 1] for line in lines]
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
