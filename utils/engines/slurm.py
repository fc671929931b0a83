"""A sweep as SLURM array jobs through submitit: submits what waits, shows the live table, and may be left at any time.

`jobs.json` in the sweep's folder says which job has which run, so the same command looks again and never submits a run that
is still queued or running. A job whose time is up, or that is preempted, stops its run, which saves itself, and is queued
again. `slurm_cluster` "local" has submitit start the jobs as processes of this machine: for tests.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.config.strict_json import read_json
from utils.engines import jobs as pool
from utils.engines import node
from utils.files import storage
from utils.files.lock import Lock

POLL = 10.0  # seconds between two questions to the scheduler, one for all jobs
LOCAL_POLL = 0.2
RETRY = 60.0  # seconds until jobs that the scheduler did not take are offered again
WARNING = 120  # seconds before its end that SLURM tells a job
REQUEUES = 1000  # a run may use up its time that often: each time it goes on from where it was
LINGER = 120.0  # seconds that SLURM has to end, or queue again, a job whose run it has stopped
ARRAY = 1000  # most jobs of an array, where SLURM does not say


class Task(node.NodeRun):
    """What submitit runs on a node; `checkpoint` is called on SLURM's signal (time is up, preempted)."""

    # SLURM's signal goes to every process of the job, and would kill the run before it is asked to save itself
    before = ("sh", "-c", 'trap "" USR2; exec "$@"', "sh")

    def __call__(self) -> int:
        self.again = self.again or int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
        self.start()
        code = self.wait()
        if code in (node.INTERRUPTED, -15) and "SLURM_JOB_ID" in os.environ:
            # stopped by SLURM itself (preempted with a grace time, requeued, cancelled): it decides what becomes of the job,
            # and a job that has ended is not queued again
            time.sleep(LINGER)
        self.tell(code)
        return code

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        self.stop()
        self.again = True
        return DelayedSubmission(self)


def run(jobs: Sequence[pool.Job], at_once: int, accuracy_of: Callable[[Path], float | None]) -> None:
    """Submits what is waiting and in no queue yet, then watches until all has ended; each job's state and reason are set.

    Ctrl-C ends the watching alone. `at_once` bounds the processes of `slurm_cluster` "local"."""
    folder = jobs[0].console.parent.parent / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    here = jobs[0].needs["slurm_cluster"] == "local"
    lock = Lock(folder)  # until all is submitted: two of these commands must not submit the same runs
    try:
        _watch(jobs, SubmittedJobs(folder, "local" if here else "slurm"), lock, at_once, accuracy_of)
    finally:
        lock.release()


def _watch(
    jobs: Sequence[pool.Job], book: SubmittedJobs, lock: Lock, at_once: int, accuracy_of: Callable[[Path], float | None]
) -> None:
    board, start, here = pool.Board(sys.stdout), time.monotonic(), book.cluster == "local"
    states = book.states()
    watched = {job.console.stem: job for job in jobs if job.state == "waiting"}
    for name in [name for name in watched if name not in states]:
        book.ids.pop(name, None)
    if states and (old := [name for name in watched if name in states]):
        board.line(f"{len(old)} of the runs are in the queue already, or running: they are watched, not started again")
    waiting = [job for name, job in watched.items() if name not in states]
    most, whole = (1, 0) if here else _limits()
    batches = list(_batches(waiting, most))
    retry, absent = 0.0, dict.fromkeys(watched, 0)
    with pool.notices() as notices:
        while watched and not notices:
            if batches and time.monotonic() >= retry:
                room = at_once - len(states) if here else len(batches)
                try:
                    for _ in range(min(room, len(batches))):
                        if whole and (there := _queued()) + len(batches[0]) > whole:  # sbatch would wait for minutes
                            raise Full(f"MaxJobCount is {whole} and {there} jobs are there")
                        book.submit(batches[0])
                        submitted = batches.pop(0)
                        if not here:
                            board.line(f"submitted {len(submitted)} runs as job {book.last}")
                except Refused as error:
                    if not book.ids and not isinstance(error, Full):
                        raise
                    if retry == 0:
                        board.line(
                            f"the scheduler takes no more now, {error}: the rest is offered again every {RETRY:g} s"
                        )
                    retry = time.monotonic() + RETRY
            if not batches:
                lock.release()
            states = book.states(notices)
            queued = {job.console.stem for batch in batches for job in batch}
            present = set(os.listdir(jobs[0].console.parent)) if jobs[0].console.parent.is_dir() else set()
            for name, job in list(watched.items()):
                if name in queued:
                    continue
                if states.get(name) == "RUNNING" and job.state == "waiting":
                    job.state, job.started = "running", time.monotonic()
                elif states.get(name, "RUNNING") != "RUNNING" and job.state == "running":
                    job.state = "waiting"  # queued again
                code = node.read_exit_code(job.console) if node.exit_file(job.console).name in present else None
                absent[name] = 0 if name in states else absent[name] + 1
                if code is None and absent[name] < 3:  # a file may be seen here later than the job's end
                    continue
                del watched[name]
                job.started = job.started or time.monotonic()
                gone = "the scheduler ended it: cancelled, out of time or memory, or its node failed"
                pool.end(job, 1 if code is None else code, accuracy_of, gone if code is None else "")
                board.line(pool.sentence(job, jobs))
                book.forget(name, job.state == "done")
            if board.live:
                board.show(pool.table(jobs, time.monotonic() - start, shutil.get_terminal_size().columns))
            until = time.monotonic() + (LOCAL_POLL if here else POLL)
            while watched and not notices and time.monotonic() < until:
                time.sleep(min(pool.POLL, LOCAL_POLL))
    book.write()
    if notices:
        left = sorted({book.ids[name].partition("_")[0] for name in watched if name in book.ids})
        stop = f"kill {' '.join(left)}" if here else f"scancel {' '.join(left)}"
        if left:
            board.line(
                f"the submitted jobs go on without this window; the same command looks again; to end them: {stop}"
            )
        if batches:
            board.line(f"{sum(map(len, batches))} runs are not submitted yet: the same command does it")
        raise KeyboardInterrupt


class Refused(ValueError):
    """The scheduler does not take a job."""


class Full(Refused):
    """It has as many as it can hold."""


class SubmittedJobs:
    """Which job has which run: name of the run's console -> job id, kept in `folder`/jobs.json, or in a file of its own where
    submitit stands for the cluster: a try-out must not make queued runs forgotten."""

    def __init__(self, folder: Path, cluster: str):
        self.folder, self.cluster, self.last = folder, cluster, ""
        self.path = folder / ("jobs.json" if cluster == "slurm" else f"jobs_{cluster}.json")
        self.ids: dict[str, str] = {}
        self._known: dict[str, str] = {}
        if self.path.is_file():
            try:
                values, faults = read_json(self.path)
                if faults:
                    raise ValueError(faults[0])
                self.ids = {str(k): str(v) for k, v in values["runs"].items()}
            except (ValueError, KeyError, AttributeError):
                raise ValueError(
                    f"{self.path} says which runs are queued, and is damaged; when squeue shows none of them, remove it"
                ) from None

    def write(self) -> None:
        storage.write_json(self.path, {"cluster": self.cluster, "runs": self.ids})

    def submit(self, batch: Sequence[pool.Job]) -> None:
        """One array job of the runs; they have ids then, in the file too."""
        import submitit
        from submitit.core.utils import FailedJobError

        keys = batch[0].needs
        executor = _executor(submitit, self.folder / "jobs", keys)
        tasks = []
        for job in batch:
            node.exit_file(job.console).unlink(missing_ok=True)
            job.console.parent.mkdir(parents=True, exist_ok=True)
            tasks.append(Task(list(job.command), job.console, keys["slurm_cpus"]))
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(node.ROOT), *([before] if before else [])])
        try:
            if self.cluster == "local":
                submitted = [executor.submit(task) for task in tasks]
            else:
                with executor.batch():
                    submitted = [executor.submit(task) for task in tasks]
        except FailedJobError as error:
            lines = [line for line in str(error).splitlines() if line.startswith("sbatch: error")]
            raise Refused(f"sbatch refuses: {' '.join(lines) or str(error)[:500]}") from None
        finally:
            del os.environ["PYTHONPATH"]
            if before is not None:
                os.environ["PYTHONPATH"] = before
        self.ids |= {job.console.stem: str(done.job_id) for job, done in zip(batch, submitted, strict=True)}
        self.last = str(submitted[0].job_id).partition("_")[0]
        self.write()

    def states(self, notices: Sequence[int] = ()) -> dict[str, str]:
        """SLURM's word for the state of each run that is queued or running; the others are not in it.

        Where it does not answer it is asked again, until there are `notices`: then what it said last."""
        if not self.ids:
            return {}
        if self.cluster == "local":
            return {name: "RUNNING" for name, number in self.ids.items() if _lives(number)}
        while True:
            # -r: a line for each job of an array; every job of the user: the ids of a big sweep are too long for a command
            asked = subprocess.run(["squeue", "--me", "-h", "-r", "-o", "%i %F_%K %T"], capture_output=True, text=True)
            if asked.returncode == 0:
                break
            if notices:
                return self._known
            print(f"warning: squeue does not answer ({asked.stderr.strip()[:200]}); asked again", file=sys.stderr)
            until = time.monotonic() + POLL
            while not notices and time.monotonic() < until:
                time.sleep(LOCAL_POLL)
        found: dict[str, str] = {}
        for line in asked.stdout.splitlines():
            number, array, state = line.rsplit(" ", 2)
            found[number] = found[array] = state
        self._known = {name: found[number] for name, number in self.ids.items() if number in found}
        return self._known

    def forget(self, name: str, done: bool) -> None:
        """The run has ended; of one that is done no file of submitit's is left."""
        number = self.ids.pop(name, None)
        node.exit_file(self.folder.parent / "console" / f"{name}.txt").unlink(missing_ok=True)
        if number and done:
            for kind in ("submitted.pkl", "0_result.pkl", "0_log.out", "0_log.err", "submission.sh"):
                (self.folder / "jobs" / f"{number}_{kind}").unlink(missing_ok=True)


def _executor(submitit: Any, folder: Path, keys: Mapping[str, Any]) -> Any:
    if keys["slurm_cluster"] == "local":
        executor = submitit.LocalExecutor(folder, max_num_timeout=REQUEUES)
        executor.update_parameters(timeout_min=keys["slurm_time"], stderr_to_stdout=True, signal_delay_s=WARNING)
        return executor
    executor = submitit.SlurmExecutor(folder, max_num_timeout=REQUEUES)
    given = {
        "partition": keys["slurm_partition"],
        "account": keys["slurm_account"],
        "qos": keys["slurm_qos"],
        "gpus_per_node": keys["slurm_gpus"] or None,
        "mem": f"{keys['slurm_mem_gb']}GB" if keys["slurm_mem_gb"] else None,
        "array_parallelism": keys["slurm_array_parallelism"],
        "additional_parameters": {"requeue": True, **keys["slurm_extra"]},
    }
    executor.update_parameters(
        job_name=folder.parent.parent.name,
        time=keys["slurm_time"],
        nodes=1,
        ntasks_per_node=1,
        cpus_per_task=keys["slurm_cpus"],
        signal_delay_s=WARNING,
        stderr_to_stdout=True,
        setup=list(keys["slurm_setup"]),
        **{k: v for k, v in given.items() if v is not None},
    )
    return executor


def _batches(jobs: Sequence[pool.Job], most: int) -> Iterator[list[pool.Job]]:
    """Array jobs of equal needs, each as long as SLURM takes."""
    kinds: dict[str, list[pool.Job]] = {}
    for job in jobs:
        kinds.setdefault(json.dumps(job.needs, sort_keys=True), []).append(job)
    for same in kinds.values():
        for first in itertools.count(0, most):
            if first >= len(same):
                break
            yield same[first : first + most]


def _limits() -> tuple[int, int]:
    """Jobs that one array may have here, and jobs that the whole cluster may know of (0: not said)."""
    shown = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True).stdout
    values = dict(re.findall(r"^(MaxArraySize|MaxJobCount)\s*=\s*(\d+)", shown, re.MULTILINE))
    array = int(values["MaxArraySize"]) - 1 if "MaxArraySize" in values else ARRAY
    whole = int(values.get("MaxJobCount", 0))
    return max(1, min(array, whole or array)), whole


def _queued() -> int:
    """Jobs of everybody."""
    return len(subprocess.run(["squeue", "-h", "-r", "-o", "%i"], capture_output=True, text=True).stdout.split())


def _lives(number: str) -> bool:
    """Whether the process with this number is one of submitit's and runs; an ended one that nobody asked about has no line.
    Where the system does not show command lines, whether there is any such process."""
    if Path("/proc/self/cmdline").exists():
        try:
            return b"submitit" in Path(f"/proc/{number}/cmdline").read_bytes()
        except OSError:
            return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
