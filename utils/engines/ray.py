"""A sweep as tasks of Ray: on a cluster that runs already (`ray_address` or RAY_ADDRESS), else on one started here for it.

A task starts the run as a process where Ray has room for it. Ctrl-C cancels the tasks, which stop their runs: they save
themselves, and the same command goes on from there.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from utils.engines import jobs as pool
from utils.engines import node

POLL = 0.5  # seconds between two looks
PATIENCE = node.STOP + 30  # seconds that cancelled tasks have to stop their runs


def run(jobs: Sequence[pool.Job], at_once: int, accuracy_of: Callable[[Path], float | None]) -> None:
    """Hands all that is waiting to Ray and watches; each job's state, reason and accuracy are set.

    `at_once` is nothing here: Ray knows what it has room for."""
    import ray

    board, start = pool.Board(sys.stdout), time.monotonic()
    first, own = jobs[0].needs, not ray.is_initialized()
    board.line(_join(ray, first["ray_address"]))
    try:
        errand = ray.remote(_errand)
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        refs: dict[Any, pool.Job] = {}
        for job in [job for job in jobs if job.state == "waiting"]:
            job.console.unlink(missing_ok=True)  # it is there again once the run has begun
            node.exit_file(job.console).unlink(missing_ok=True)
            gpus = job.needs["ray_gpus"]
            gpus = float(has_gpus and job.needs["device"] != "cpu") if gpus is None else gpus
            # no retries: what a lost worker began may still be running, and the same command looks for itself
            how = {"num_cpus": job.needs["ray_cpus"], "num_gpus": gpus, "max_retries": 0}
            ready = errand.options(**how, name=f"{job.cell}, seed {job.seed}")
            refs[ready.remote(node.NodeRun(list(job.command), job.console, max(1, int(job.needs["ray_cpus"]))))] = job
        _watch(ray, refs, jobs, board, start, accuracy_of)
    finally:
        if own:
            ray.shutdown()


def _join(ray: Any, address: str | None) -> str:
    """Joins or starts a cluster; what it has, in words."""
    address = address or os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no word to anybody
    quiet = {"log_to_driver": False, "include_dashboard": False} if not address else {"log_to_driver": False}
    if not ray.is_initialized():
        # where the modules of this program are, for workers on other nodes
        place = {"env_vars": {"PYTHONPATH": os.pathsep.join([str(node.ROOT), *_paths()])}}
        try:
            ray.init(address=address or "local", runtime_env=place, logging_level="ERROR", **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            lines = str(error).splitlines() or [type(error).__name__]
            raise ValueError(
                f"ray_address: Ray at {address or 'this machine'} cannot be reached: {lines[0]} "
                "(one that asks for a token: RAY_AUTH_MODE=token)"
            ) from None
    has = ray.cluster_resources()
    return f"Ray at {address or 'this machine'}: {has.get('CPU', 0):g} CPU cores, {has.get('GPU', 0):g} GPUs"


def _paths() -> list[str]:
    return [path] if (path := os.environ.get("PYTHONPATH")) else []


def _errand(errand: node.NodeRun) -> int:
    """What a worker does; being cancelled is a KeyboardInterrupt here."""
    # a Ray that was started in the background of a shell ignores SIGINT, and its workers would not hear of being cancelled
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        errand.start()
        code = errand.wait()
    except KeyboardInterrupt:
        errand.stop()
        code = node.INTERRUPTED
    errand.tell(code)
    return code


def _watch(
    ray: Any,
    refs: dict[Any, pool.Job],
    jobs: Sequence[pool.Job],
    board: pool.Board,
    start: float,
    accuracy_of: Callable[[Path], float | None],
) -> None:
    console, told, until = jobs[0].console.parent, 0, float("inf")
    with pool.notices() as notices:
        while refs and time.monotonic() < until:
            ended, _ = ray.wait(list(refs), num_returns=len(refs), timeout=POLL, fetch_local=False)
            present = set(os.listdir(console)) if console.is_dir() else set()
            for ref in ended:
                job = refs[ref]
                code, why = _outcome(ray, ref)
                if notices and why:  # cancelled: the task may be at stopping its run still
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
            if len(notices) > told:
                for ref in refs:
                    ray.cancel(ref, force=told > 0)
                told, until = len(notices), min(until, time.monotonic() + PATIENCE)
            if board.live:
                board.show(pool.table(jobs, time.monotonic() - start, shutil.get_terminal_size().columns))
            if ended:
                time.sleep(pool.POLL)  # cancelled ones are at their end at once, so the wait above does not wait
    if notices:
        raise KeyboardInterrupt


def _outcome(ray: Any, ref: Any) -> tuple[int, str]:
    """Exit code of an ended task, and what Ray says where the task itself has none."""
    try:
        return int(ray.get(ref)), ""
    except Exception as error:  # whatever a node died of, the other runs go on
        lines = [line for line in str(error).splitlines() if line.strip()]
        return 1, f"Ray: {type(error).__name__}: {lines[0] if lines else 'no reason given'}"
