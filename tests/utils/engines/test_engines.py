"""Sweeps on a cluster: submitit's local executor, a real SLURM of one node, a local Ray; runs are small programs."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import main
from benchmarks import many_runs
from commands import load
from commands import options as command
from tests.helpers import slurm
from utils import engines
from utils.engines import jobs as pool
from utils.engines import slurm as engine_slurm
from utils.engines.settings import Cluster

ROOT = Path(__file__).resolve().parents[3]
BASE = {
    "model_name": "simplecil", "dataset": "digits", "init_cls": 5, "increment": 5, "seed": [1, 2],
    "backbone_weights": "random", "image_size": 16, "batch_size": 64,
}  # fmt: skip
needs_submitit = pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None, reason="submitit is not installed: requirements-slurm.txt"
)
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed: requirements-ray.txt"
)

# Counts to a number, a step every 50 ms, as a run learns its tasks: SIGTERM ends it with 75 and it goes on from where it was.
PROGRAM = """
import os, pathlib, signal, sys, time
folder, steps, resume = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[4]
def stop(*_):
    time.sleep(0.2)
    print("saved", flush=True)
    os._exit(75)
signal.signal(signal.SIGTERM, stop)
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "starts", "a") as starts:
    starts.write(f"{resume} {os.getpid()} {os.getppid()}\\n")
if steps < 0:
    sys.exit("error: it went wrong")
count = folder / "count"
while (done := len(count.read_text()) if count.exists() else 0) < steps:
    count.write_text("x" * (done + 1))
    time.sleep(0.05)
(folder / "results").write_text("50")
"""


def accuracy_of(folder):
    return float((folder / "results").read_text()) if (folder / "results").is_file() else None


def jobs_of(place, *steps, resume="auto", **needs):
    """A job for each number of steps (-1: fails), as a sweep makes them."""
    program = place / "program.py"
    program.write_text(PROGRAM)
    jobs = []
    for number, count in enumerate(steps, start=1):
        folder = place / "runs" / str(number)
        command = [sys.executable, str(program), str(folder), str(count), "--resume", resume]
        job = pool.Job(
            "cell", number, command, folder, place / "sweep" / "console" / f"{number}.txt", needs=keys() | needs
        )
        if (accuracy := accuracy_of(folder)) is not None:
            job.state, job.accuracy = "done", accuracy
        jobs.append(job)
    return jobs


def keys(**values):
    """The keys for clusters, resolved."""
    return Cluster(slurm_cpus=1, **values).model_dump(mode="json") | {"device": "auto"}


def starts(job):
    path = job.folder / "starts"
    return [line.split() for line in path.read_text().splitlines()] if path.is_file() else []


def count(job):
    return len((job.folder / "count").read_text()) if (job.folder / "count").is_file() else 0


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def soon(condition, seconds=30.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def when(condition, act):
    """Calls `act` in the background once `condition` holds; join the result."""

    def wait():
        soon(condition, 60)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


# ---------------------------------------------------------------- what is missing


@pytest.mark.parametrize(("engine", "package"), [("slurm", "submitit"), ("ray", "ray")])
def test_a_missing_package_is_said_before_any_work(engine, package, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    path = tmp_path / "small.json"
    path.write_text(json.dumps(BASE))
    arguments = ["--config", str(path), "--out", str(tmp_path / "out"), "--engine", engine]
    assert main.main(arguments) == 2
    message = f"--engine {engine} needs the package {package}: pip install -r requirements-{engine}.txt"
    assert capsys.readouterr().err == f"error: {message}\n" and not (tmp_path / "out").exists()
    assert main.main([*arguments, "--check"]) == 2  # what --check passes, runs
    assert message in capsys.readouterr().err
    assert f"{package}>=" in (ROOT / f"requirements-{engine}.txt").read_text()


@needs_submitit
def test_without_slurm_the_login_node_is_named(tmp_path, monkeypatch, capsys):
    path = tmp_path / "small.json"
    path.write_text(json.dumps(BASE))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main.main(["--config", str(path), "--out", str(tmp_path / "out"), "--engine", "slurm"]) == 2
    assert "no sbatch and srun here" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_one_may_not_expect_of_a_cluster_is_said(tmp_path, monkeypatch, capsys):
    keys = engines.keys_of({"slurm_cluster": "slurm", "slurm_gpus": 0, "device": "auto", "init_lr": 1})
    jobs, gpus = engines.remarks("slurm", keys, 4)
    assert "--jobs 4 has no effect with --engine slurm" in jobs and "slurm_gpus is 0" in gpus
    assert (
        engines.remarks("slurm", keys | {"slurm_gpus": 1}) == engines.remarks("slurm", keys | {"device": "cpu"}) == []
    )
    assert engines.remarks("slurm", keys | {"slurm_cluster": "local"}, 4) == engines.remarks("local", keys, 4) == []
    (bound,) = engines.remarks("ray", keys, 2)
    assert "ray_cpus and ray_gpus bound what Ray runs at a time" in bound
    path = tmp_path / "small.json"
    path.write_text(json.dumps({k: v for k, v in BASE.items() if k != "device"}))
    monkeypatch.setattr(engines, "missing", lambda *_: None)  # as where there is a cluster
    assert main.main(["--config", str(path), "--engine", "slurm", "--check"]) == 0
    assert "note: slurm_gpus is 0" in capsys.readouterr().out


def test_what_a_run_asks_of_a_cluster_is_no_part_of_its_name(tmp_path):
    path, hashes = tmp_path / "small.json", set()
    for more in (
        {},
        {"slurm_gpus": 1, "slurm_extra": {"constraint": "a100"}, "slurm_setup": ["true"]},
        {"ray_gpus": 0.5},
    ):
        path.write_text(json.dumps(BASE | more))
        hashes.add(load.load(command.parser("").parse_args(["--config", str(path)])).cells[0].resolved.hash)
    assert len(hashes) == 1


def test_batches_are_of_equal_needs_and_no_longer_than_an_array(tmp_path):
    few, many = jobs_of(tmp_path, *[1] * 3), jobs_of(tmp_path, *[1] * 7, slurm_gpus=1)
    mixed = [job for pair in zip(few, many[:3], strict=True) for job in pair] + many[3:]
    assert list(engine_slurm._batches(mixed, 5)) == [few, many[:5], many[5:]]


def test_a_damaged_list_of_jobs_is_no_empty_one(tmp_path):
    (tmp_path / "jobs.json").write_text('{"cluster": "slurm", "ru')
    with pytest.raises(ValueError, match=r"jobs.json, which lists the queued runs, is damaged; .* remove it"):
        engine_slurm.SubmittedJobs(tmp_path, "slurm")


def test_the_folders_of_many_runs_are_finished_runs(tmp_path, capsys):
    assert many_runs.run(2, 3, tmp_path) == 0
    printed = capsys.readouterr().out
    assert "6 run folders written" in printed and "all 6 runs of 2 cells are finished" in printed


# ---------------------------------------------------------------- submitit's local executor


@needs_submitit
def test_submitit_runs_all_and_a_failure_stops_none(tmp_path, capfd):
    jobs = jobs_of(tmp_path, 3, -1, 3, slurm_cluster="local")
    engine_slurm.run(jobs, 2, accuracy_of)
    assert [(job.state, job.accuracy) for job in jobs] == [("done", 50.0), ("failed", None), ("done", 50.0)]
    assert "exit 1: error: it went wrong" in jobs[1].reason
    assert [line[:3] for line in sorted(capfd.readouterr().out.splitlines()) if "cell" in line] == ["[1/", "[2/", "[3/"]
    left = {path.name.partition("_")[2] for path in (tmp_path / "sweep" / "slurm" / "jobs").iterdir()}
    assert left <= {"submitted.pkl", "0_result.pkl", "0_log.out"}  # of the one that failed
    assert not list((tmp_path / "sweep").rglob("*.exit"))
    # the same again runs the failed one alone
    again = jobs_of(tmp_path, 3, 2, 3, slurm_cluster="local")
    engine_slurm.run(again, 2, accuracy_of)
    assert [len(starts(job)) for job in again] == [1, 2, 1] and again[1].state == "done"


@needs_submitit
def test_a_preempted_job_saves_its_run_and_goes_on(tmp_path):
    (job,) = jobs_of(tmp_path, 40, resume="never", slurm_cluster="local")
    # the parent of a run is submitit's process on the node, which SLURM would tell
    notice = when(lambda: count(job) > 5, lambda: os.kill(int(starts(job)[0][2]), signal.SIGUSR2))
    engine_slurm.run([job], 1, accuracy_of)
    notice.join()
    assert (job.state, count(job)) == ("done", 40)
    assert [mode for mode, *_ in starts(job)] == ["never", "auto"]  # it does not start afresh each time
    assert job.console.read_text() == "saved\n"


@needs_submitit
def test_ctrl_c_leaves_the_jobs_and_the_same_command_looks_again(tmp_path, capfd):
    jobs = jobs_of(tmp_path, 200, 200, 2, slurm_cluster="local")
    notice = when(lambda: count(jobs[0]) > 5 and count(jobs[1]) > 5, interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine_slurm.run(jobs, 2, accuracy_of)
    notice.join()
    printed = capfd.readouterr().out
    assert "continue without this window; run the same command to watch them again; to end them: kill " in printed
    assert "not submitted yet: 1 run;" in printed and not starts(jobs[2])
    again = jobs_of(tmp_path, 200, 200, 2, slurm_cluster="local")
    engine_slurm.run(again, 2, accuracy_of)
    assert "2 of the runs are in the queue already" in capfd.readouterr().out
    assert [(job.state, len(starts(job))) for job in again] == [("done", 1)] * 3


def test_a_scheduler_that_does_not_answer_can_be_left(tmp_path, monkeypatch, capsys):
    book = engine_slurm.SubmittedJobs(tmp_path, "slurm")
    book.ids = {"1_seed_1": "7_0", "2_seed_1": "7_1"}
    answers = [subprocess.CompletedProcess([], 0, stdout="8 7_0 RUNNING\n9 6_1 PENDING\n", stderr="")]
    silent = subprocess.CompletedProcess([], 1, stdout="", stderr="no route")
    monkeypatch.setattr(engine_slurm.subprocess, "run", lambda *_, **__: answers.pop() if answers else silent)
    assert book.states() == {"1_seed_1": "RUNNING"}
    notices = []
    notice = threading.Timer(0.3, notices.append, [2])
    notice.start()
    assert book.states(notices) == {"1_seed_1": "RUNNING"}  # it came to an end
    notice.join()
    assert "squeue does not answer (no route); asked again" in capsys.readouterr().err


def test_a_try_out_forgets_no_queued_run(tmp_path):
    queued = engine_slurm.SubmittedJobs(tmp_path, "slurm")
    queued.ids["1_seed_1"] = "7_0"
    queued.write()
    engine_slurm.SubmittedJobs(tmp_path, "local").write()
    assert engine_slurm.SubmittedJobs(tmp_path, "slurm").ids == {"1_seed_1": "7_0"}


@needs_submitit
def test_a_job_that_vanishes_is_a_failure(tmp_path, monkeypatch):
    (job,) = jobs_of(tmp_path, 400, slurm_cluster="local")

    def kill():
        _, run, node = starts(job)[0]
        os.kill(int(node), signal.SIGKILL)
        os.kill(int(run), signal.SIGKILL)

    notice = when(lambda: count(job) > 3, kill)
    engine_slurm.run([job], 1, accuracy_of)
    notice.join()
    assert job.state == "failed" and job.reason.startswith("the scheduler ended it: cancelled")


@pytest.fixture
def acted_slurm(tmp_path, monkeypatch):
    """A cluster with room for two jobs, acted: each look moves a job from PENDING to RUNNING, then to its end with code 0."""
    queue, submit_calls = {}, []

    def submit(self, batch):
        submit_calls.append([job.seed for job in batch])
        self.last = str(len(submit_calls))
        for index, job in enumerate(batch):
            self.ids[job.console.stem] = f"{self.last}_{index}"
            queue[job.console] = "PENDING"
            job.console.parent.mkdir(parents=True, exist_ok=True)

    def states(self, notices=()):
        answer = {console.stem: state for console, state in queue.items()}
        for console, state in list(queue.items()):
            if state == "PENDING":
                queue[console] = "RUNNING"
            else:
                del queue[console]
                console.with_suffix(".exit").write_text("0")
        return answer

    monkeypatch.setattr(engine_slurm.SubmittedJobs, "submit", submit)
    monkeypatch.setattr(engine_slurm.SubmittedJobs, "states", states)
    monkeypatch.setattr(engine_slurm, "_limits", lambda: (2, 2))
    monkeypatch.setattr(engine_slurm, "_queued", lambda: len(queue))
    monkeypatch.setattr(engine_slurm, "POLL", 0.01)
    monkeypatch.setattr(engine_slurm, "RETRY", 0.02)
    return submit_calls


def test_a_full_cluster_gets_the_rest_later_in_order(acted_slurm, tmp_path, capsys):
    jobs = jobs_of(tmp_path, 1, 1, 1, 1, 1)
    engine_slurm.run(jobs, 1, lambda folder: 50.0)
    assert acted_slurm == [[1, 2], [3, 4], [5]] and [job.state for job in jobs] == ["done"] * 5
    printed = capsys.readouterr().out
    assert [f"submitted {n} as job {i}" in printed for n, i in (("2 runs", 1), ("2 runs", 2), ("1 run", 3))] == [
        True
    ] * 3
    assert printed.count("the scheduler takes no more now, MaxJobCount is 2 and 2 jobs are there") == 1
    assert json.loads((tmp_path / "sweep" / "slurm" / "jobs.json").read_text())["runs"] == {}


def test_who_leaves_a_full_cluster_reads_what_continues_and_what_is_not_submitted(
    acted_slurm, tmp_path, capsys, monkeypatch
):
    def full(self, notices=()):
        """The user leaves at the first look after the submission."""
        if self.ids:
            notices.append(signal.SIGINT)
        return dict.fromkeys(self.ids, "RUNNING")

    monkeypatch.setattr(engine_slurm.SubmittedJobs, "states", full)
    with pytest.raises(KeyboardInterrupt):
        engine_slurm.run(jobs_of(tmp_path, 1, 1, 1), 1, accuracy_of)
    printed = capsys.readouterr().out
    assert "to end them: scancel 1\n" in printed and "not submitted yet: 1 run;" in printed
    assert set(json.loads((tmp_path / "sweep" / "slurm" / "jobs.json").read_text())["runs"]) == {"1", "2"}


def test_a_refusal_of_the_first_batch_ends_the_sweep(acted_slurm, tmp_path, monkeypatch):
    def refuse(self, batch):
        raise engine_slurm.Refused("sbatch refuses: no such partition")

    monkeypatch.setattr(engine_slurm.SubmittedJobs, "submit", refuse)
    with pytest.raises(ValueError, match="no such partition"):
        engine_slurm.run(jobs_of(tmp_path, 1), 1, accuracy_of)


# ---------------------------------------------------------------- SLURM


@pytest.fixture(scope="module")
def one_node(tmp_path_factory):
    if lack := slurm.lacking():
        pytest.skip(lack)
    folder = tmp_path_factory.mktemp("slurm")
    try:
        with slurm.cluster(folder) as conf, pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(conf))
            patch.setattr(engine_slurm, "POLL", 0.5)
            yield folder
    except RuntimeError as error:
        pytest.skip(str(error))


def ask(*words):
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


@needs_submitit
def test_slurm_takes_arrays_and_failures_are_collected(one_node, tmp_path, capfd):
    jobs = jobs_of(tmp_path, 2, -1, 2, 2, 2, 2)
    engine_slurm.run(jobs, 1, accuracy_of)
    assert [job.state for job in jobs] == ["done", "failed", *["done"] * 4]
    assert "exit 1: error: it went wrong" in jobs[1].reason
    printed = capfd.readouterr().out
    assert "submitted 4 runs as job" in printed and "submitted 2 runs as job" in printed  # MaxArraySize is 5


@pytest.mark.slow
@needs_submitit
def test_slurm_jobs_outlive_their_watcher_and_can_be_cancelled(one_node, tmp_path, capfd):
    jobs = jobs_of(tmp_path, 100, 100, 1)
    notice = when(lambda: count(jobs[0]) > 5 and count(jobs[1]) > 5, interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine_slurm.run(jobs, 1, accuracy_of)
    notice.join()
    number = capfd.readouterr().out.rpartition("scancel ")[2].split()[0]
    again = jobs_of(tmp_path, 100, 100, 1)
    notice = when(lambda: count(jobs[0]) > 20, lambda: ask("scancel", f"{number}_1"))
    engine_slurm.run(again, 1, accuracy_of)
    notice.join()
    assert "3 of the runs are in the queue already" in capfd.readouterr().out
    assert [len(starts(job)) for job in again] == [1, 1, 1]
    assert [job.state for job in again] == ["done", "failed", "done"]
    assert again[1].reason.startswith("the scheduler ended it: cancelled")
    third = jobs_of(tmp_path, 100, 100, 1)
    engine_slurm.run(third, 1, accuracy_of)  # the run that was cancelled goes on from where it was
    assert [len(starts(job)) for job in third] == [1, 2, 1] and third[1].state == "done"


@pytest.mark.slow
@needs_submitit
@pytest.mark.parametrize("what", ["time is nearly up", "requeued by hand", "preempted"])
def test_slurm_takes_the_job_away_and_the_run_goes_on(what, one_node, tmp_path):
    (job,) = jobs_of(tmp_path, 80, resume="never")

    def act():
        (number,) = json.loads((tmp_path / "sweep" / "slurm" / "jobs.json").read_text())["runs"].values()
        if what == "time is nearly up":
            ask("scancel", "--signal=USR2", number)  # what --signal does before the end
        elif what == "requeued by hand":
            ask("scontrol", "requeue", number)
        else:
            ask("sbatch", "-p", "urgent", "-c", "2", "-o", "/dev/null", "--wrap", "sleep 1")

    notice = when(lambda: count(job) > 10, act)
    engine_slurm.run([job], 1, accuracy_of)
    notice.join()
    assert (job.state, count(job)) == ("done", 80), job.reason
    assert [mode for mode, *_ in starts(job)] == ["never", "auto"]
    assert job.console.read_text() == "saved\n"


@needs_submitit
def test_a_full_slurm_is_offered_the_rest_later(one_node, tmp_path, capfd, monkeypatch):
    assert engine_slurm._limits() == (4, 10_000)
    monkeypatch.setattr(engine_slurm, "_limits", lambda: (2, 3))
    monkeypatch.setattr(engine_slurm, "RETRY", 0.5)
    jobs = jobs_of(tmp_path, 20, 20, 1, 1)
    engine_slurm.run(jobs, 1, accuracy_of)
    assert [job.state for job in jobs] == ["done"] * 4
    assert capfd.readouterr().out.count("the scheduler takes no more now, MaxJobCount is 3 and 2 jobs are there") == 1


@needs_submitit
def test_what_slurm_refuses_is_said_in_its_words(one_node, tmp_path):
    with pytest.raises(ValueError, match=r"sbatch refuses: .*invalid partition"):
        engine_slurm.run(jobs_of(tmp_path, 1, slurm_partition="nowhere"), 1, accuracy_of)


# ---------------------------------------------------------------- Ray


@pytest.fixture(scope="module")
def two_cores():
    """Ray is started once: that takes seconds."""
    from utils.engines import ray as engine_ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("RAY_ADDRESS", raising=False)
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):  # set by the engine; taken back after the tests
            patch.setenv(name, "")
            patch.delenv(name)
        ray = engine_ray._package(None)
        engine_ray._join(ray, None)
        yield engine_ray
        ray.shutdown()


@needs_ray
def test_ray_runs_all_and_a_failure_stops_none(two_cores, tmp_path, capfd):
    jobs = jobs_of(tmp_path, 3, -1, 3, ray_cpus=0.5)
    two_cores.run(jobs, 1, accuracy_of)
    assert [job.state for job in jobs] == ["done", "failed", "done"] and "error: it went wrong" in jobs[1].reason
    assert capfd.readouterr().out.count("cell, seed") == 3
    assert not list((tmp_path / "sweep").rglob("*.exit"))


@needs_ray
def test_a_ray_started_here_refuses_who_has_no_token(two_cores):
    """It listens on every network interface."""
    import ray

    address = ray.get_runtime_context().gcs_address
    code = f"import ray; ray.init(address={address!r}, logging_level='ERROR'); print('inside')"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    for more in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        done = subprocess.run([sys.executable, "-c", code], env=environment | more, capture_output=True, text=True)
        assert done.returncode and "inside" not in done.stdout


@needs_ray
def test_ctrl_c_stops_what_ray_runs_and_it_goes_on_later(two_cores, tmp_path):
    jobs = jobs_of(tmp_path, 100, 100, 1, 1, ray_cpus=1)
    notice = when(lambda: sum(count(job) > 5 for job in jobs[:2]) == 2, interrupt)
    with pytest.raises(KeyboardInterrupt):
        two_cores.run(jobs, 1, accuracy_of)
    notice.join()
    assert not any(alive(start[1]) for job in jobs for start in starts(job))
    assert all(job.reason.startswith("interrupted, resumable: saved") for job in jobs[:2])
    assert all(5 < count(job) < 100 for job in jobs[:2]) and not starts(jobs[2])
    again = jobs_of(tmp_path, 100, 100, 1, 1, ray_cpus=1)
    two_cores.run(again, 1, accuracy_of)
    assert [job.state for job in again] == ["done"] * 4 and [len(starts(job)) for job in again] == [2, 2, 1, 1]


@needs_ray
def test_a_cluster_that_is_not_there(tmp_path, monkeypatch):
    import ray

    from utils.engines import ray as engine_ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: (_ for _ in ()).throw(ConnectionError("Could not find any Ray")))
    with pytest.raises(
        ValueError, match=r"ray_address: Ray at 10.0.0.1:6379 cannot be reached: Could not find any Ray"
    ):
        engine_ray.run(jobs_of(tmp_path, 1, ray_address="10.0.0.1:6379"), 1, accuracy_of)
