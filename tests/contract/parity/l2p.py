"""L2P against LAMDA-PILOT: every choice of prompts, loss, rate, logit, accuracy and final weight."""

from pathlib import Path

from models.families import prompts
from tests.helpers.recorded import Recorded, close, learn_all
from tests.helpers.recorded_prompts import (
    KEYS,
    POOL,
    check_choice,
    check_task,
    check_training,
    same_choice,
    watch_choices,
)

NAMES = {"pool.prompts": "prompt.prompt", "pool.keys": "prompt.prompt_key", "head.weight": "head.weight"}
NAMES |= {"head.bias": "head.bias"}


def check(run: Recorded, tmp_path: Path, monkeypatch) -> None:
    run.arrays |= {f"init/{ours}": run.arrays[f"init/{theirs}"] for ours, theirs in NAMES.items()}
    settings = {k: run.config[k] for k in KEYS + POOL} | {"decay_other_rows": True}
    losses: list[list[float]] = []
    chosen = watch_choices(prompts, monkeypatch)
    for task, learner in learn_all(run, "l2p", settings, tmp_path, monkeypatch, losses):
        check_task(learner, task, run)
        check_choice(learner, task, run)
    for ours, theirs in zip(chosen, [ids for p in run.facts["phases"] for ids in p["prompt_ids"]], strict=True):
        same_choice(ours, theirs)
    check_training(run, losses, tmp_path, "pull")
    for name, theirs in NAMES.items():
        close(learner.get_parameter(name), run.arrays[f"final/{theirs}"], name)
