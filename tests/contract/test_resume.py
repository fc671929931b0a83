"""A run of any method that is stopped or killed at any moment ends as one that never was, bit for bit."""

import itertools
import os
import re

import pytest
import torch

import main
from tests.helpers.methods import METHODS
from tests.helpers.runs import assert_same_run, stopped_again_and_again, tiny_experiment
from utils.files import storage

# what makes a method take paths that the plain tiny run does not: random draws in training, growth, refits, accumulation
RICHER = {
    "sema": {"ffn_adapter_dropout": 0.1, "rd_views": 1, "optimizer": "adam"},
    "nested_lora": {"nested_lora_update_interval_slow": 3, "nested_lora_skipped_gradients": "accumulate",
                    "head_recalibration": True, "nested_lora_levels": 3},
    "moe_parallel": {"moe_heads": "per_expert", "nested_lora_eval": "slow"},
    "dylora_moe": {"novelty_threshold_mode": "fixed", "novelty_threshold": 2.0, "expert_rank_max": 8, "ffn_num": 2,
                   "plateau_tolerance": 0.9, "plateau_epochs": 1, "rank_growth_epochs": 1, "distill_coef": 1.0,
                   "freeze_on_convergence": False, "replay_per_class": 1, "maturity_steps": 3},
    "sparse_moe": {"router_noisy": True, "router_bias_rate": 0.01, "router_warmup": 4},
    "finetune": {"optimizer": "adam", "head": "aligned", "head_drift_repair": "linear", "compare_heads": True,
                 "head_align_epochs": 2, "head_align_samples": 8},
    "l2p": {"optimizer": "sgd", "scheduler": "cosine", "weight_decay": 0.01, "use_prompt_mask": True, "top_k": 2,
            "train_views": 2},
    "dualprompt": {"weight_decay": 0.01, "batchwise_prompt": True, "scrambled_e_prompt": True},
    "coda_prompt": {"weight_decay": 0.01, "prompt_param": [10, 4, 0.5]},
    "simplecil": {"head": "ridge"},
    "inflora": {"optimizer": "sgd", "weight_decay": 0.01, "lamb": 0.6},
    "sd_lora": {"optimizer": "adam", "init_epoch": 3, "milestones": [1], "restart_magnitudes": True},
    "slca": {"optimizer": "adam", "milestones": [1], "ca_epochs": 2, "ca_samples": 8},
    "aper_adapter": {"tuned_epoch": 6, "optimizer": "adam"},
    "ranpac": {"tuned_epoch": 6, "ranpac_scores": "cosine", "ranpac_ridge": "task", "optimizer": "adam"},
    "ease": {"use_init_ptm": True, "beta": 1.0, "optimizer": "adam"},
}  # fmt: skip


EPOCHS = {"epochs": 2, "func_epoch": 2, "rd_epoch": 2, "init_epochs": 2, "tuned_epoch": 2}


class Killed(BaseException):
    """Stands for the end of the process: nobody catches it."""


@pytest.fixture
def whole(request, tmp_path, monkeypatch):
    """The arguments of a tiny run of a method, and the folder of an uninterrupted one."""
    method, settings = request.param
    run = tiny_experiment(method, tmp_path, monkeypatch, **(EPOCHS | settings))
    assert main.main([*run, "--out", str(tmp_path / "whole")]) == 0
    folder = folder_of(tmp_path / "whole")
    assert main.main(["--explain", str(folder)]) == 0  # what any method logs can be told
    return run, folder


def folder_of(out):
    (folder,) = out.glob("*/*/seed_3")
    return folder


def weights_of(folder):
    return storage.read_state(folder / "checkpoints" / "task_00001.json")[1]


def assert_same(folder, other):
    assert_same_run(folder, other)
    ours, theirs = weights_of(folder), weights_of(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


CASES = [pytest.param((m, RICHER.get(m, {})), id=m) for m in METHODS]
# dozens of runs a method: two of them stand for all in the fast part of the tests
KILLED = [
    pytest.param((m, RICHER.get(m, {})), id=m, marks=() if m in ("finetune", "nested_lora") else pytest.mark.slow)
    for m in METHODS
]


@pytest.mark.parametrize("whole", CASES, indirect=True)
def test_stopped_after_every_second_step_it_ends_the_same(whole, tmp_path, monkeypatch, capsys):
    run, reference = whole
    code, stops = stopped_again_and_again(run, tmp_path / "cut", monkeypatch)
    assert code == 0 and (stops > 2 or "simplecil" in str(run))
    assert_same(folder_of(tmp_path / "cut"), reference)


@pytest.mark.parametrize("whole", KILLED, indirect=True)
def test_killed_at_every_write_it_ends_the_same(whole, tmp_path, monkeypatch):
    run, reference = whole
    write = os.replace
    moments = itertools.count()
    seen = set()

    def replace(source, target):
        """The process dies once just before and once just after a file takes its name; of the numbered states of one phase,
        the first one stands for all."""
        name = re.sub(r"\.\d{6}\.", ".", os.path.basename(target))
        if (key := (next(moments) % 2, name)) not in seen:
            seen.add(key)
            if key[0]:
                write(source, target)
            raise Killed
        write(source, target)

    monkeypatch.setattr(os, "replace", replace)
    kills = 0
    while True:
        try:
            assert main.main([*run, "--out", str(tmp_path / "cut")]) == 0
            break
        except Killed:
            kills += 1
            assert kills < 200
    assert kills > 5
    assert_same(folder_of(tmp_path / "cut"), reference)
