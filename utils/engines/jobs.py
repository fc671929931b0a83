"""What every engine needs: a job and its end, interruptions, and the live table of a sweep."""

from __future__ import annotations

import contextlib
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


def sentence(job: Job, jobs: Sequence[Job]) -> str:
    ended = sum(j.state in ("done", "failed") for j in jobs)
    took = clock(time.monotonic() - job.started)
    result = f"last accuracy {number(job.accuracy)}" if job.state == "done" else job.reason
    return f"[{ended}/{len(jobs)}] {job.cell}, seed {job.seed}: {job.state} after {took}, {result}"


def table(jobs: Sequence[Job], seconds: float, columns: int) -> list[str]:
    """Lines of the live table: a row for each cell with the states of its runs and the mean last accuracy so far.

    Labels too long for the terminal are cut at the beginning, since cells of a grid differ at the end."""
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
    ended = sum(job.state in ("done", "failed") for job in jobs)
    return [*lines, f"{ended} of {len(jobs)} runs ended, {clock(seconds)}"]


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
