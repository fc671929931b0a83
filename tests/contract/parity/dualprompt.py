"""DualPrompt against LAMDA-PILOT, its scrambled prefixes included: every choice, loss, rate, logit and final weight."""

from pathlib import Path

import numpy as np

from tests.helpers.recorded import Recorded
from tests.helpers.recorded_prompts import check_pool_method

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
    settings = {k: run.config[k] for k in LAYERS}
    settings |= {k: tuple(v) for k, v in settings.items() if isinstance(v, list)} | {"scrambled_e_prompt": True}
    check_pool_method(run, "dualprompt", NAMES, settings, tmp_path, monkeypatch, ours)
