"""A sweep as SLURM array jobs through submitit: submits the waiting runs and shows a live table; Ctrl-C leaves the jobs.

`jobs.json` in the sweep's folder records the job of each run, so the same command watches again and never submits a run
that is still queued or running. A job whose time is up, or that is preempted, stops its run, which writes a checkpoint, and
the job is queued again. With `slurm_cluster` "local" submitit starts the jobs as processes of this machine, for tests.
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
from utils.text import counted, one_line

POLL = 10.0  # seconds between two questions to the scheduler, one for all jobs
LOCAL_POLL = 0.2
RETRY = 60.0  # seconds until jobs that the scheduler refused are offered again
WARNING = 120  # seconds before the end of its time at which SLURM warns a job
REQUEUES = 1000  # times a run may use up its time; each time it continues from its checkpoint
LOOKS_FOR_EXIT_CODE = 3  # looks without a run in the queue and without its exit code, until it counts as lost
LINGER = 120.0  # seconds SLURM has to end or requeue a job whose run it has stopped
ARRAY = 1000  # most jobs of an array, where SLURM does not state its limit


class Task(node.NodeRun):
    """What submitit runs on a node; `checkpoint` is called on SLURM's signal (time is up, preempted)."""

    # SLURM's signal goes to every process of the job, and would kill the run before it is asked to save itself
    before = ("sh", "-c", 'trap "" USR2; exec "$@"', "sh")

    def __call__(self) -> int:
        self.again = self.again or int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
        self.start()
        code = self.wait()
        if code in (node.INTERRUPTED, -15) and "SLURM_JOB_ID" in os.environ:
            # SLURM itself stopped the run (preempted with a grace time, requeued, cancelled) and decides what becomes of
            # the job; it would not requeue a job that has ended, so the job waits
            time.sleep(LINGER)
        self.write_exit_code(code)
        return code

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        self.stop()
        self.again = True
        return DelayedSubmission(self)


def run(jobs: Sequence[pool.Job], at_once: int, accuracy_of: Callable[[Path], float | None]) -> None:
    """Submits the waiting runs that are in no queue yet and watches until all have ended; sets each job's state and reason.

    Ctrl-C ends only the watching; the submitted jobs continue. `at_once` bounds the processes of `slurm_cluster` "local"."""
    folder = jobs[0].console.parent.parent / "slurm"
    if not str(folder.absolute()).isprintable():  # its path stands in the job's script
        raise ValueError(
            f"--engine slurm: a path of printable characters is needed for the runs, not {folder.absolute()}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    cluster = jobs[0].needs["slurm_cluster"]
    lock = Lock(folder)  # until all is submitted: two of these commands must not submit the same runs
    try:
        _Watch(jobs, SubmittedJobs(folder, cluster), lock, at_once, accuracy_of).until_all_ended()
    finally:
        lock.release()


class _Watch:
    """One look after another at the runs of a sweep, from their submission to their end.

    `unfinished` holds the runs that were not finished when the watch began and have not ended since, by the name of their
    console; `batches` are the array jobs that are not submitted yet; `states` is the scheduler's last answer."""

    def __init__(
        self,
        jobs: Sequence[pool.Job],
        submitted: SubmittedJobs,
        lock: Lock,
        at_once: int,
        accuracy_of: Callable[[Path], float | None],
    ):
        self.jobs, self.submitted, self.lock, self.at_once, self.accuracy_of = (
            jobs,
            submitted,
            lock,
            at_once,
            accuracy_of,
        )
        self.here = submitted.cluster == "local"
        self.board, self.start = pool.Board(sys.stdout), time.monotonic()
        self.states = submitted.states()
        self.unfinished = {job.console.stem: job for job in jobs if job.state == "waiting"}
        new = {name: job for name, job in self.unfinished.items() if name not in self.states}
        for name in new:
            submitted.ids.pop(name, None)
        if queued := len(self.unfinished) - len(new):
            self.board.line(f"{queued} of the runs are in the queue already, or running: they are not submitted again")
        array_size, self.max_jobs = (1, 0) if self.here else _limits()
        self.batches = list(_batches(list(new.values()), array_size))
        self.next_offer = 0.0  # monotonic time; above 0 once the scheduler has refused a batch
        # for each run, how many looks in a row the scheduler has not listed it
        self.looks_without = dict.fromkeys(self.unfinished, 0)

    def until_all_ended(self) -> None:
        """Submits and looks until every run has ended; KeyboardInterrupt if the user leaves earlier."""
        with pool.notices() as notices:
            while self.unfinished and not notices:
                self._submit_some()
                if not self.batches:
                    self.lock.release()
                self._look(notices)
                if self.board.live:
                    columns = shutil.get_terminal_size().columns
                    self.board.show(pool.table(self.jobs, time.monotonic() - self.start, columns))
                until = time.monotonic() + (LOCAL_POLL if self.here else POLL)
                while self.unfinished and not notices and time.monotonic() < until:
                    time.sleep(min(pool.POLL, LOCAL_POLL))
        self.submitted.write()
        if notices:
            self._farewell()
            raise KeyboardInterrupt

    def _submit_some(self) -> None:
        """Submits the batches there is room for; what the scheduler does not take is offered again after `RETRY` seconds.

        Raises Refused where the scheduler refuses the first batch of all: waiting would not help."""
        if not self.batches or time.monotonic() < self.next_offer:
            return
        room = self.at_once - len(self.states) if self.here else len(self.batches)
        try:
            for _ in range(min(room, len(self.batches))):
                self._submit(self.batches[0])
                del self.batches[0]
        except Refused as error:
            if not self.submitted.ids and not isinstance(error, Full):
                raise
            if self.next_offer == 0:
                self.board.line(
                    f"the scheduler takes no more now, {error}: the rest is offered again every {RETRY:g} s"
                )
            self.next_offer = time.monotonic() + RETRY

    def _submit(self, batch: Sequence[pool.Job]) -> None:
        # sbatch would wait for minutes in a full cluster
        if self.max_jobs and (present := _queued()) + len(batch) > self.max_jobs:
            raise Full(f"MaxJobCount is {self.max_jobs} and {present} jobs are there")
        self.submitted.submit(batch)
        if not self.here:
            self.board.line(f"submitted {counted(len(batch), 'run')} as job {self.submitted.last}")

    def _look(self, notices: Sequence[int]) -> None:
        """Asks the scheduler for the states, and reports each run that has ended."""
        self.states = self.submitted.states(notices)
        not_submitted = {job.console.stem for batch in self.batches for job in batch}
        consoles = self.jobs[0].console.parent
        files = set(os.listdir(consoles)) if consoles.is_dir() else set()  # one listing, not one question for each run
        for name in [name for name in self.unfinished if name not in not_submitted]:
            job, state = self.unfinished[name], self.states.get(name)
            if state == "RUNNING" and job.state == "waiting":
                job.state, job.started = "running", time.monotonic()
            elif state not in (None, "RUNNING") and job.state == "running":
                job.state = "waiting"  # queued again
            self.looks_without[name] = 0 if state is not None else self.looks_without[name] + 1
            code = node.read_exit_code(job.console) if node.exit_file(job.console).name in files else None
            # a shared file system may show the exit code a while after the job has left the queue
            if code is not None or self.looks_without[name] >= LOOKS_FOR_EXIT_CODE:
                self._end(name, code)

    def _end(self, name: str, code: int | None) -> None:
        """The run has ended with `code`, or its job left the queue without one."""
        job = self.unfinished.pop(name)
        job.started = job.started or time.monotonic()
        if code is None:
            reason = "the scheduler ended it: cancelled, out of time or memory, or its node failed"
            pool.end(job, 1, self.accuracy_of, reason)
        else:
            pool.end(job, code, self.accuracy_of)
        self.board.line(pool.sentence(job, self.jobs))
        self.submitted.forget(name, job.state == "done")

    def _farewell(self) -> None:
        """Tells a user who leaves what goes on, how to end it, and what is not submitted yet."""
        ids = self.submitted.ids
        numbers = sorted({ids[name].partition("_")[0] for name in self.unfinished if name in ids})
        if numbers:
            self.board.line(
                "the submitted jobs continue without this window; run the same command to watch them again; "
                f"to end them: {'kill' if self.here else 'scancel'} {' '.join(numbers)}"
            )
        if self.batches:
            self.board.line(
                f"not submitted yet: {counted(sum(map(len, self.batches)), 'run')}; the same command submits the rest"
            )


class Refused(ValueError):
    """The scheduler refuses a job."""


class Full(Refused):
    """The scheduler has as many jobs as it can hold."""


class SubmittedJobs:
    """The job id of each submitted run, by the name of the run's console; stored in `folder`/jobs.json.

    Where submitit starts processes instead (cluster "local") the file is jobs_local.json: a try-out must not overwrite the
    ids of queued runs. Raises ValueError if the file is damaged."""

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
                    f"{self.path}, which lists the queued runs, is damaged; once squeue shows none of them, remove it"
                ) from None

    def write(self) -> None:
        storage.write_json(self.path, {"cluster": self.cluster, "runs": self.ids})

    def submit(self, batch: Sequence[pool.Job]) -> None:
        """Submits the runs as one array job and stores their ids. Raises Refused with sbatch's message."""
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
        """SLURM's state (PENDING, RUNNING, ...) of each run that is queued or running; ended runs are absent.

        If squeue fails it is asked again until there are `notices`; then the result is its last answer."""
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
            print(
                f"warning: squeue does not answer ({one_line(asked.stderr.strip()[:200])}); asked again",
                file=sys.stderr,
            )
            until = time.monotonic() + POLL
            while not notices and time.monotonic() < until:
                time.sleep(LOCAL_POLL)
        state_of: dict[str, str] = {}
        for line in asked.stdout.splitlines():
            number, array, state = line.rsplit(" ", 2)
            state_of[number] = state_of[array] = state
        self._known = {name: state_of[number] for name, number in self.ids.items() if number in state_of}
        return self._known

    def forget(self, name: str, done: bool) -> None:
        """Drops a run that has ended, and its exit file; submitit's files remain only if the run failed."""
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
    options = {
        "partition": keys["slurm_partition"],
        "account": keys["slurm_account"],
        "qos": keys["slurm_qos"],
        "gpus_per_node": keys["slurm_gpus"] or None,
        "mem": f"{keys['slurm_mem_gb']}GB" if keys["slurm_mem_gb"] else None,
        "array_parallelism": keys["slurm_array_parallelism"],
        "additional_parameters": {"requeue": True, **keys["slurm_extra"]},
    }
    executor.update_parameters(
        job_name=re.sub(r"[^\w.-]", "_", folder.parent.parent.name),  # a line break would end its comment in the script
        time=keys["slurm_time"],
        nodes=1,
        ntasks_per_node=1,
        cpus_per_task=keys["slurm_cpus"],
        signal_delay_s=WARNING,
        stderr_to_stdout=True,
        setup=list(keys["slurm_setup"]),
        **{k: v for k, v in options.items() if v is not None},
    )
    return executor


def _batches(jobs: Sequence[pool.Job], most: int) -> Iterator[list[pool.Job]]:
    """Array jobs: runs with equal needs, at most `most` in each."""
    kinds: dict[str, list[pool.Job]] = {}
    for job in jobs:
        kinds.setdefault(json.dumps(job.needs, sort_keys=True), []).append(job)
    for same in kinds.values():
        for first in itertools.count(0, most):
            if first >= len(same):
                break
            yield same[first : first + most]


def _limits() -> tuple[int, int]:
    """SLURM's limits: jobs of one array, and jobs of the whole cluster (0: unknown)."""
    shown = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True).stdout
    values = dict(re.findall(r"^(MaxArraySize|MaxJobCount)\s*=\s*(\d+)", shown, re.MULTILINE))
    array = int(values["MaxArraySize"]) - 1 if "MaxArraySize" in values else ARRAY
    whole = int(values.get("MaxJobCount", 0))
    return max(1, min(array, whole or array)), whole


def _queued() -> int:
    """The number of jobs of all users in the queue."""
    return len(subprocess.run(["squeue", "-h", "-r", "-o", "%i"], capture_output=True, text=True).stdout.split())


def _lives(number: str) -> bool:
    """Whether process `number` is submitit's and still runs (an ended process has an empty command line).

    On systems without /proc: whether there is any process with this number."""
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
