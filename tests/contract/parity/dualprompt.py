"""DualPrompt against LAMDA-PILOT, its scrambled prefixes included: every choice, loss, rate, logit and final weight."""

from pathlib import Path

import numpy as np

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

NAMES = {"general.values": "g_prompt", "pool.prompts": "e_prompt.prompt", "pool.keys": "e_prompt.prompt_key"}
NAMES |= {"head.weight": "head.weight", "head.bias": "head.bias"}
LAYERS = ("g_prompt_layer_idx", "e_prompt_layer_idx", "g_prompt_length", "use_g_prompt", "use_e_prompt")
LAYERS += ("use_prefix_tune_for_g_prompt", "use_prefix_tune_for_e_prompt", "same_key_value")


def ours(name: str, value: np.ndarray) -> np.ndarray:
    """Theirs has [layers, 2, length, heads, D / heads], with the pool's size before the length."""
    if name == "g_prompt":
        return value.reshape(*value.shape[:3], -1)
    return (
        np.moveaxis(value, 2, 0).reshape(value.shape[2], *value.shape[:2], value.shape[3], -1)
        if value.ndim == 6
        else value
    )


def check(run: Recorded, tmp_path: Path, monkeypatch) -> None:
    run.arrays |= {f"init/{name}": ours(theirs, run.arrays[f"init/{theirs}"]) for name, theirs in NAMES.items()}
    settings = {k: run.config[k] for k in KEYS + POOL + LAYERS}
    settings |= {k: tuple(v) for k, v in settings.items() if isinstance(v, list)}
    settings |= {"decay_other_rows": True, "scrambled_e_prompt": True}
    losses: list[list[float]] = []
    chosen = watch_choices(prompts, monkeypatch)
    for task, learner in learn_all(run, "dualprompt", settings, tmp_path, monkeypatch, losses):
        check_task(learner, task, run)
        check_choice(learner, task, run)
    for own, theirs in zip(chosen, [ids for p in run.facts["phases"] for ids in p["prompt_ids"]], strict=True):
        same_choice(own, theirs)
    check_training(run, losses, tmp_path, "pull")
    for name, theirs in NAMES.items():
        close(learner.get_parameter(name), ours(theirs, run.arrays[f"final/{theirs}"]), name)
