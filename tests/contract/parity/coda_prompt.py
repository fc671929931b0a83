"""CODA-Prompt against LAMDA-PILOT: every loss, rate, logit, accuracy and final weight, from the recorded draws."""

from pathlib import Path

import numpy as np

from tests.helpers.recorded import Recorded, close, learn_all
from tests.helpers.recorded_prompts import KEYS, check_task, check_training

PARTS = {"prompts": "p", "keys": "k", "attentions": "a"}
LAYERS = range(5)


def check(run: Recorded, tmp_path: Path, monkeypatch) -> None:
    size, length, weight = run.config["prompt_param"]
    for layer in LAYERS:
        for name, letter in PARTS.items():
            run.arrays[f"init/components.{layer}.{name}"] = np.zeros(())
            for task in range(len(run.sizes)):
                drawn = run.arrays[f"draws/task{task}.layer{layer}.{letter}"]
                run.arrays[f"init/components.{layer}.task{task}.{name}"] = drawn
    settings = {k: run.config[k] for k in KEYS} | {"prompt_param": (size, int(length), weight)}
    settings |= {"decay_other_rows": True, "cosine_off_by_one": True, "drop_last": True}
    losses: list[list[float]] = []
    for task, learner in learn_all(run, "coda_prompt", settings, tmp_path, monkeypatch, losses):
        check_task(learner, task, run)
    check_training(run, losses, tmp_path, "penalty")
    for layer, part in zip(LAYERS, learner.components, strict=True):
        for name, letter in PARTS.items():
            theirs = run.arrays[f"final/e_{letter}_{layer}"]
            close(part.get_parameter(name), theirs, f"layer {layer} {name}")
    close(learner.head.weight, run.arrays["final/head.weight"], "head")
    close(learner.head.bias, run.arrays["final/head.bias"], "head bias")
