"""A run in two processes does what it does in one; it stops, resumes and fails as a whole."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import main
from tests.helpers import ranks
from tests.helpers.methods import METHODS
from tests.helpers.runs import assert_same_run, rows_of, timeless, tiny_experiment
from utils.config.strict_json import read_json
from utils.files import storage
from utils.process import parallel
from utils.run.log import RunLog

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def torchrun(*command, **how):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*LAUNCH, *map(str, command)], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **how,
    )  # fmt: skip


def job(name, place, expected=0):
    process = torchrun(ROOT / "tests" / "helpers" / "ranks.py", name, place)
    text = process.communicate(timeout=600)[0]
    assert process.returncode == expected, text[-6000:]
    return text


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def both(place):
    """The folder of every method's tiny runs in two processes."""
    job("every_method", place / "two")
    return place / "two"


@pytest.fixture(scope="module")
def states(place):
    job("full_batches", place / "states")
    return place / "states"


def run_of(out):
    (folder,) = out.glob("*/*/seed_3")
    return folder


def weights_of(folder):
    return storage.read_state(folder / "checkpoints" / "task_00001.json")[1]


def of_kind(folder, *kinds):
    return [row for row in timeless(rows_of(folder)) if row["kind"] in kinds]


@pytest.mark.slow
@pytest.mark.parametrize("name", ranks.CASES)
def test_two_processes_learn_as_one(name, both, tmp_path, monkeypatch):
    method, settings = ranks.CASES[name]
    assert ranks.run("one", method, tmp_path, monkeypatch, **settings) == 0
    one, two = run_of(tmp_path / "one"), run_of(both / name)
    ours, theirs = (read_json(folder / "results.json")[0] for folder in (one, two))
    assert ours["adapters_per_layer"] == theirs["adapters_per_layer"]
    chosen = [[s.get("winner", s.get("skill")) for s in found["selection_history"]] for found in (ours, theirs)]
    assert chosen[0] == chosen[1]
    kinds = ("expand", "spawn", "rank", "merge", "freeze", "mature")
    assert [(r["kind"], r.get("layer")) for r in of_kind(one, *kinds)] == [
        (r["kind"], r.get("layer")) for r in of_kind(two, *kinds)
    ]
    assert [r["images"] for r in of_kind(one, "epoch")] == [
        r["images"] for r in of_kind(two, "epoch")
    ]  # each sample once
    assert [r["kind"] for r in rows_of(one)] == [r["kind"] for r in rows_of(two)]
    for a, b in zip(ours["accuracy_matrix"], theirs["accuracy_matrix"], strict=True):
        assert a == pytest.approx(b, abs=10)  # of 20 images
    for a, b in zip(of_kind(one, "epoch"), of_kind(two, "epoch"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_full_batches_give_the_same_parameters(method, states, tmp_path):
    with RunLog(tmp_path / "log", console=False) as log:
        for task, ours in enumerate(ranks.states_of(method, log)):
            theirs = storage.read_state(states / f"{method}.{task}.json")[1]
            assert ours.keys() == theirs.keys()
            for name, tensor in ours.items():
                torch.testing.assert_close(
                    theirs[name], tensor, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
                )


@pytest.mark.slow
def test_they_stop_together_and_go_on_bit_for_bit(place):
    job("stopped", place / "stopped")
    assert json.loads((place / "stopped" / "stops.json").read_text()) > 3
    whole, cut = (run_of(place / "stopped" / name) for name in ("whole", "cut"))
    assert_same_run(whole, cut)
    ours, theirs = weights_of(whole), weights_of(cut)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.slow
def test_one_failure_ends_all_of_them(place):
    start = time.monotonic()
    text = job("one_dies", place / "dies", expected=1)
    assert time.monotonic() - start < 120
    assert "fails on purpose" in text


# The whole program under torchrun ----------------------------------------------------------------------------------------

QUICK = {
    "about": "a run that is stopped", "model_name": "finetune", "dataset": "digits", "init_cls": 5, "increment": 5,
    "seed": [3], "backbone_weights": "random", "image_size": 16, "epochs": 6, "ffn_num": 4, "device": "cpu",
}  # fmt: skip


@pytest.mark.slow
def test_sigterm_to_torchrun_then_on_with_one_process(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(QUICK))
    command = ("main.py", "--config", tmp_path / "x.json", "--out", tmp_path / "out")
    process = torchrun(*command)
    deadline = time.monotonic() + 120
    while not any(b'"epoch"' in path.read_bytes() for path in tmp_path.glob("out/*/*/*/metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=120)[0]
    assert re.search(r"interrupted after task \d, phase func, epoch \d.* the same command goes on from there", text), (
        text
    )
    assert text.count("2 processes: each") == 1
    assert text.count("interrupted after") == 1 and "error:" not in text, text
    one = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert one.returncode == 0, one.stderr
    assert "the run began with 2 processes and continues with 1" in one.stderr
    assert "resumed inside the task" in one.stdout + one.stderr
    assert len(read_json(run_of(tmp_path / "out") / "results.json")[0]["top1_curve"]) == 2


# Parts, without processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "world"), [(7, 3), (2, 3), (0, 2), (8, 4), (1, 1)])
def test_parts_are_the_batch(rows, world, monkeypatch):
    monkeypatch.setattr(parallel, "_world", world)
    found = []
    for number in range(world):
        monkeypatch.setattr(parallel, "_rank", number)
        found.append(parallel.shard(list(range(rows))))
    assert list(itertools.chain(*found)) == list(range(rows)) and max(map(len, found)) - min(map(len, found)) <= 1


def test_a_sweep_is_refused_under_torchrun(tmp_path, monkeypatch, capsys):
    run = tiny_experiment("finetune", tmp_path, monkeypatch, sweep={"init_lr": [0.1, 0.2]})
    settings = json.loads((tmp_path / "finetune.json").read_text()) | {"sweep": {"init_lr": [0.1, 0.2]}}
    (tmp_path / "finetune.json").write_text(json.dumps(settings))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main.main([*run, "--out", str(tmp_path)]) == 2
    assert "torchrun computes one run" in capsys.readouterr().err
