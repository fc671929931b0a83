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

from utils.engines.jobs import POLL, Board, Job, end, notices, sentence, table
from utils.process.machine import cores


def threads(jobs: int) -> int:
    """Threads for each of `jobs` processes that share the cores of this process; at least 1."""
    return max(1, cores() // jobs)


def run(jobs: Sequence[Job], at_once: int, accuracy_of: Callable[[Path], float | None]) -> None:
    """Runs the waiting jobs in order, `at_once` at a time; sets each job's state, reason and accuracy.

    `accuracy_of(run folder)` is the last accuracy of a finished run, None if it is not finished. Ctrl-C and SIGTERM are
    passed on to the processes, which write a checkpoint and end; then KeyboardInterrupt is raised. A second one kills them."""
    # more OpenMP threads than cores slow a run down; a user who sets the variable keeps their value
    environment = {"OMP_NUM_THREADS": str(threads(at_once)), **os.environ}
    board, start = Board(sys.stdout), time.monotonic()
    waiting = deque(job for job in jobs if job.state == "waiting")
    running: list[tuple[Job, subprocess.Popen[bytes]]] = []
    try:
        with notices() as seen:
            passed_on = 0  # notices that the processes have received
            while True:
                while waiting and len(running) < at_once and not seen:
                    running.append((job := waiting.popleft(), _start(job, environment)))
                for job, process in [pair for pair in running if pair[1].poll() is not None]:
                    running.remove((job, process))
                    end(job, process.returncode, accuracy_of)
                    board.line(sentence(job, jobs))
                if len(seen) > passed_on:
                    for _, process in running:
                        process.kill() if passed_on else process.terminate()
                    passed_on = len(seen)
                if board.live:
                    board.show(table(jobs, time.monotonic() - start, shutil.get_terminal_size().columns))
                if not running and (seen or not waiting):
                    break
                time.sleep(POLL)
    finally:  # after any error here, such as a closed console, no process continues unwatched
        for _, process in running:
            process.terminate()
            process.wait()
    if seen:
        raise KeyboardInterrupt


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
