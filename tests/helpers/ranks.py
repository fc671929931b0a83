"""What tests/contract/test_parallel.py runs in several processes: `torchrun tests/helpers/ranks.py JOB FOLDER`; one
job is many small runs.

Starting processes costs more than all that runs in them, so they live through a whole job.
"""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

import main
import models
from models.learner import losses
from tests.helpers.methods import METHODS
from tests.helpers.runs import tiny_experiment
from tests.helpers.toy import toy_backbone, toy_dataset, toy_settings, toy_stream
from utils.files.storage import write_state
from utils.process import interrupt, parallel, startup
from utils.process.seeds import seed_everything
from utils.run.journal import Journal
from utils.run.log import RunLog, SilentLog

# 40 images a task: three batches of 13, and one of a single image, of which only one process has a part
TINY = {"batch_size": 13, "detect_batch_size": 13, "epochs": 2, "func_epoch": 2, "rd_epoch": 2}
# keys that make a method take the paths which need care
RICHER = {
    "sema": {"rd_views": 1, "record_when": "end", "detect_scope": "task", "optimizer": "adam"},
    "nested_lora": {"nested_lora_update_interval_slow": 3, "nested_lora_skipped_gradients": "accumulate",
                    "head_recalibration": True},
    "moe_parallel": {"moe_heads": "per_expert", "head": "ncm"},
    "dylora_moe": {"novelty_threshold_mode": "fixed", "novelty_threshold": 2.0, "expert_rank_max": 8, "ffn_num": 2,
                   "plateau_tolerance": 0.9, "plateau_epochs": 1, "rank_growth_epochs": 1, "distill_coef": 1.0,
                   "freeze_on_convergence": False, "replay_per_class": 1, "maturity_steps": 3},
    "sparse_moe": {"router_bias_rate": 0.01, "router_warmup": 4, "routing_controls": True},
    "finetune": {"train_views": 2, "prefix_cache": "disk", "head": "ridge"},
    "simplecil": {"head": "ridge"},
}  # fmt: skip
CASES = {method: (method, RICHER.get(method, {})) for method in METHODS}
# terms that are no means over samples are means of the parts' in several processes
SEPARABLE = {"router_aux_loss_coef": 0.0, "router_entropy_coef": 0.0}
SMALL = {"seed": [3], "ffn_adapter_dropout": 0.1, "func_epoch": 2, "rd_epoch": 1}


def run(name, method, place, patch, **settings):
    """A tiny run of the whole program; its exit code."""
    files = place / f"files_{parallel.torchrun_ranks()[0]}"
    files.mkdir(parents=True, exist_ok=True)
    experiment = tiny_experiment(method, files, patch, **{**TINY, **settings})
    return main.main([*experiment, "--out", str(place / name)])


def every_method(place):
    with pytest.MonkeyPatch.context() as patch:
        for name, (method, settings) in CASES.items():
            assert run(name, method, place, patch, **settings) == 0


def full_batches(place):
    """Two tasks of every method in float64, where a step takes all images; the state after each."""
    place.mkdir(parents=True, exist_ok=True)
    for method in METHODS:
        log = RunLog(place / method, console=False) if parallel.is_first() else SilentLog(place / method)
        with log:
            for task, state in enumerate(states_of(method, log)):
                if parallel.is_first():
                    write_state(place / f"{method}.{task}.json", {}, state)


def states_of(method, log):
    cfg = toy_settings(method, batch_size=100, detect_batch_size=100, weight_decay=0.01, **SEPARABLE)
    stream = toy_stream(toy_dataset(train=11))
    learner = models.build(cfg, toy_backbone().double(), 6, 1, log)
    for index in range(2):
        seed_everything(1, index, *parallel.rank_seed())
        learner.begin_task()
        learner.journal = Journal()
        task = stream.task(index, with_past=learner.uses_past)
        learner.learn(task)
        learner.consolidate(task)
        yield {name: tensor.clone() for name, tensor in learner.own_state().items()}


def stopped(place):
    """Runs whole and stopped after every fifth step, where only the last process gets the notice; with dropout."""
    steps, last = itertools.count(1), parallel.rank() == parallel.world() - 1
    with pytest.MonkeyPatch.context() as patch:
        assert run("whole", "sema", place, patch, **SMALL) == 0
        patch.setattr(interrupt, "stop_requested_here", lambda: next(steps) % 5 == 0 and last)
        stops = 0
        while (code := run("cut", "sema", place, patch, **SMALL)) == 75:
            stops += 1
            assert stops < 100
        assert code == 0
    if parallel.is_first():
        (place / "stops.json").write_text(json.dumps(stops))


def one_dies(place):
    """The last process fails in its fourth step."""
    steps, real = itertools.count(1), losses.cross_entropy_among

    def fails(*args):
        if parallel.rank() == parallel.world() - 1 and next(steps) == 4:
            raise RuntimeError("this process fails on purpose")
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.finetune.cross_entropy_among", fails)
        startup.leave(run("dies", "finetune", place, patch))


JOBS = {job.__name__: job for job in (every_method, full_batches, stopped, one_dies)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    parallel.start("cpu")
    end, parallel.stop = parallel.stop, lambda: None
    JOBS[sys.argv[1]](Path(sys.argv[2]))
    end()
