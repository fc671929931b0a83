"""Runs of a sweep as processes of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from utils.engines.jobs import POLL, Board, Following, Job, end, notices, seconds_left, sentence, table
from utils.files.lock import holder_of
from utils.process.machine import cores
from utils.text import clock, one_line

LOOK = 1.0  # seconds between two looks at the folders that others hold


def threads(jobs: int) -> int:
    """Threads for each of `jobs` processes that share the cores of this process; at least 1."""
    return max(1, cores() // jobs)


def run(jobs: Sequence[Job], at_once: int, accuracy_of: Callable[[Path], float | None]) -> None:
    """Runs the waiting jobs in order, `at_once` at a time; sets each job's state, reason and accuracy.

    `accuracy_of(run folder)` is the last accuracy of a finished run, None if it is not finished. Ctrl-C and SIGTERM are
    passed on to the processes, which write a checkpoint and end; then KeyboardInterrupt is raised. A second one kills them.

    A run whose folder another process holds, such as one whose sweep was killed, is waited for: it counts as running, and
    what it leaves unfinished is started then."""
    # more OpenMP threads than cores slow a run down; a user who sets the variable keeps their value
    environment = {"OMP_NUM_THREADS": str(threads(at_once)), **os.environ}
    few = {"OMP_NUM_THREADS": "1", **os.environ}
    board, start, following = Board(sys.stdout), time.monotonic(), Following()
    before = sum(job.state != "waiting" for job in jobs)

    def left() -> str:
        following.look(jobs)
        seconds = seconds_left(jobs, following, time.monotonic() - start, before)
        return "" if seconds is None or seconds < 1 else f", about {clock(seconds)} left"

    waiting = deque(job for job in jobs if job.state == "waiting")
    running: list[tuple[Job, subprocess.Popen[bytes]]] = []
    held: list[Job] = []  # by processes that this one did not start
    try:
        with notices() as seen:
            passed_on = 0  # notices that the processes have received
            looked = time.monotonic()
            while True:
                while waiting and len(running) + len(held) < at_once and not seen:
                    job = waiting.popleft()
                    if (holder := holder_of(job.folder)) is not None:
                        held.append(job)
                        board.line(_waiting_for(job, holder))
                    else:
                        running.append((job, _start(job, few if job.threads == 1 else environment)))
                if held and time.monotonic() - looked > LOOK:
                    looked = time.monotonic()
                    for job in [job for job in held if holder_of(job.folder) is None]:
                        held.remove(job)
                        if accuracy_of(job.folder) is None:  # it ended unfinished: the same command goes on
                            job.state = "waiting"
                            waiting.appendleft(job)
                        else:
                            end(job, 0, accuracy_of)
                            board.line(sentence(job, jobs))
                for job, process in [pair for pair in running if pair[1].poll() is not None]:
                    running.remove((job, process))
                    # it may have started before the process of a killed sweep had locked the folder
                    if process.returncode and (holder := holder_of(job.folder)) is not None:
                        held.append(job)
                        board.line(_waiting_for(job, holder))
                        continue
                    end(job, process.returncode, accuracy_of)
                    board.line(sentence(job, jobs) + left())
                if len(seen) > passed_on:
                    for _, process in running:
                        process.kill() if passed_on else process.terminate()
                    passed_on = len(seen)
                if board.live:
                    lines = table(jobs, time.monotonic() - start, shutil.get_terminal_size().columns, following)
                    board.show([*lines[:-1], lines[-1] + left()])
                if not running and (seen or not (waiting or held)):
                    break
                time.sleep(POLL)
    finally:  # after any error here, such as a closed console, no process continues unwatched
        for _, process in running:
            process.terminate()
            process.wait()
    for job in held:
        print(f"{job.cell}, seed {job.seed}: still runs, in {job.folder}")
    if seen:
        raise KeyboardInterrupt


def _waiting_for(job: Job, holder: str) -> str:
    """Marks a job as running in another process; returns the line that says so."""
    job.started, job.state = time.monotonic(), "running"
    return f"{job.cell}, seed {job.seed}: runs already, this command waits for it ({one_line(holder)})"


def _start(job: Job, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    job.console.parent.mkdir(parents=True, exist_ok=True)
    job.started, job.state = time.monotonic(), "running"
    with job.console.open("wb") as console:
        # in a new session Ctrl-C reaches the process once, from us, and not a second time from the terminal
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
