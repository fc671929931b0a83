"""How many runs go side by side where the command line does not say it."""

import argparse
from pathlib import Path

import pytest
import torch

from commands import load
from commands.load import SMALL_RUN, jobs_by_default  # before the fixture that replaces it in all tests
from utils.process import machine, parallel

FILES = Path(__file__).resolve().parents[2] / "exps"


def asked(tmp_path, name, changes=(), **flags):
    args = argparse.Namespace(config=FILES / f"{name}.json", set=list(changes), data_root=None, device=None, out=tmp_path,
                              engine="local", profile=False, resume="auto")  # fmt: skip
    vars(args).update(flags)
    return load.load(args), args


@pytest.fixture
def four_cores(monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 4)
    monkeypatch.setattr(machine, "free_memory", lambda: 100 * SMALL_RUN)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_small_runs_fill_the_cores_as_far_as_runs_are_left_and_memory_has_room(tmp_path, monkeypatch, four_cores):
    assert jobs_by_default(*asked(tmp_path, "quickstart")) == 4
    assert jobs_by_default(*asked(tmp_path, "sema_digits_short")) == 2
    loaded, args = asked(tmp_path, "sema_digits_short")
    done = loaded.cells[0].run_folder(tmp_path, "sema_digits_short", 1993)
    done.mkdir(parents=True)
    (done / "results.json").write_text("{}")
    assert jobs_by_default(loaded, args) == 1
    args.resume = "never"
    assert jobs_by_default(loaded, args) == 2
    for free, jobs in ((2.5 * SMALL_RUN, 2), (0.5 * SMALL_RUN, 1), (None, 4)):
        monkeypatch.setattr(machine, "free_memory", lambda free=free: free)
        assert jobs_by_default(*asked(tmp_path, "quickstart")) == jobs


def test_one_at_a_time_on_a_gpu_with_a_large_backbone_or_where_time_is_measured(tmp_path, monkeypatch, four_cores):
    large = ["backbone_type=vit_tiny_patch16_224"]
    assert jobs_by_default(*asked(tmp_path, "sema_digits_short", large)) == 1
    for flags in ({"profile": True}, {"engine": "slurm"}):
        assert jobs_by_default(*asked(tmp_path, "sema_digits_short", **flags)) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert jobs_by_default(*asked(tmp_path, "sema_digits_short")) == 1
    assert jobs_by_default(*asked(tmp_path, "sema_digits_short", device="cpu")) == 2
    monkeypatch.setattr(parallel, "torchrun_ranks", lambda: (0, 2))
    assert jobs_by_default(*asked(tmp_path, "sema_digits_short", device="cpu")) == 1


def test_a_small_run_computes_in_one_thread_unless_the_user_says_otherwise(monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    machine.use_one_thread()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    machine.use_one_thread()
    assert threads == [1]
    assert (machine.free_memory() or 1) > 0
