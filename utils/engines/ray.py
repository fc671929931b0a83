"""A sweep as tasks of Ray: on a cluster that runs already (`ray_address` or RAY_ADDRESS), else on one started here for it.

The latter takes tasks only with a token that this process draws.

A task starts the run as a process where Ray has room for it. Ctrl-C cancels the tasks, which stop their runs; the runs write
a checkpoint, and the same command continues from there.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from utils.engines import jobs as pool
from utils.engines import node
from utils.text import CONTROL, first_line

POLL = 0.5  # seconds between two looks
PATIENCE = node.STOP + 30  # seconds that cancelled tasks have to stop their runs


def run(jobs: Sequence[pool.Job], at_once: int, accuracy_of: Callable[[Path], float | None]) -> None:
    """Hands the waiting jobs to Ray and watches them; sets each job's state, reason and accuracy.

    `at_once` has no effect: Ray starts as many as it has room for. Raises ValueError if the cluster cannot be reached."""
    ray = _package(jobs[0].needs["ray_address"])
    board, start = pool.Board(sys.stdout), time.monotonic()
    joined_here = not ray.is_initialized()
    board.line(_join(ray, jobs[0].needs["ray_address"]))
    try:
        task = ray.remote(_run_on_worker)
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        refs: dict[Any, pool.Job] = {}
        for job in [job for job in jobs if job.state == "waiting"]:
            job.console.unlink(missing_ok=True)  # its return shows that the run has begun
            node.exit_file(job.console).unlink(missing_ok=True)
            gpus = job.needs["ray_gpus"]
            gpus = float(has_gpus and job.needs["device"] != "cpu") if gpus is None else gpus
            # no retries: the run of a lost worker may still be running; the same command resumes it later
            how = {"num_cpus": job.needs["ray_cpus"], "num_gpus": gpus, "max_retries": 0}
            ready = task.options(**how, name=f"{job.cell}, seed {job.seed}")
            refs[ready.remote(node.NodeRun(list(job.command), job.console, max(1, int(job.needs["ray_cpus"]))))] = job
        _watch(ray, refs, jobs, board, start, accuracy_of)
    finally:
        if joined_here:
            ray.shutdown()


def _package(address: str | None) -> Any:
    """Ray's package. Where it will start a cluster here, it is told before its import to ask for a token: it listens on every
    network interface and runs whatever it is sent."""
    if not (address or os.environ.get("RAY_ADDRESS")):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    return ray


def _join(ray: Any, address: str | None) -> str:
    """Joins or starts a cluster; returns a line with its address, CPU cores and GPUs."""
    address = address or os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray sends no usage reports
    quiet = {"log_to_driver": False, "include_dashboard": False} if not address else {"log_to_driver": False}
    if not ray.is_initialized():
        # workers on other nodes import the modules of this program from here
        place = {"env_vars": {"PYTHONPATH": os.pathsep.join([str(node.ROOT), *_paths()])}}
        try:
            ray.init(address=address or "local", runtime_env=place, logging_level="ERROR", **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            cause = first_line(str(error) or type(error).__name__)
            raise ValueError(
                f"ray_address: Ray at {address or 'this machine'} cannot be reached: {cause} "
                "(if it asks for a token, set RAY_AUTH_MODE=token)"
            ) from None
    has = ray.cluster_resources()
    return f"Ray at {address or 'this machine'}: {has.get('CPU', 0):g} CPU cores, {has.get('GPU', 0):g} GPUs"


def _paths() -> list[str]:
    return [path] if (path := os.environ.get("PYTHONPATH")) else []


def _run_on_worker(run: node.NodeRun) -> int:
    """Runs the command on a worker of Ray; cancelling the task raises KeyboardInterrupt here."""
    # workers of a Ray that a shell started in the background ignore SIGINT, so cancelling would not reach them
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run.start()
        code = run.wait()
    except KeyboardInterrupt:
        run.stop()
        code = node.INTERRUPTED
    run.write_exit_code(code)
    return code


def _watch(
    ray: Any,
    refs: dict[Any, pool.Job],
    jobs: Sequence[pool.Job],
    board: pool.Board,
    start: float,
    accuracy_of: Callable[[Path], float | None],
) -> None:
    console, passed_on, until = jobs[0].console.parent, 0, float("inf")
    with pool.notices() as notices:
        while refs and time.monotonic() < until:
            ended, _ = ray.wait(list(refs), num_returns=len(refs), timeout=POLL, fetch_local=False)
            present = set(os.listdir(console)) if console.is_dir() else set()
            for ref in ended:
                job = refs[ref]
                code, why = _outcome(ray, ref)
                if notices and why:  # cancelled: the task may still be stopping its run
                    if job.console.name not in present:
                        del refs[ref]  # it had not begun
                        continue
                    if node.exit_file(job.console).name not in present and time.monotonic() < until - 1:
                        continue
                    code, why = node.INTERRUPTED, ""
                del refs[ref]
                job.started = job.started or time.monotonic()
                pool.end(job, code, accuracy_of, why)
                board.line(pool.sentence(job, jobs))
                node.exit_file(job.console).unlink(missing_ok=True)
            for job in refs.values():
                if job.state == "waiting" and job.console.name in present:
                    job.state, job.started = "running", time.monotonic()
            if len(notices) > passed_on:
                for ref in refs:
                    ray.cancel(ref, force=passed_on > 0)
                passed_on, until = len(notices), min(until, time.monotonic() + PATIENCE)
            if board.live:
                board.show(pool.table(jobs, time.monotonic() - start, shutil.get_terminal_size().columns))
            if ended:
                time.sleep(pool.POLL)  # ray.wait returns at once for cancelled tasks
    if notices:
        raise KeyboardInterrupt


def _outcome(ray: Any, ref: Any) -> tuple[int, str]:
    """Exit code of an ended task, and Ray's error message where the task itself has no code."""
    try:
        return int(ray.get(ref)), ""
    except Exception as error:  # the failure of one node, of any kind, must not stop the other runs
        return 1, f"Ray: {type(error).__name__}: {first_line(CONTROL.sub('', str(error)))}"
