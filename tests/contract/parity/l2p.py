"""L2P against LAMDA-PILOT: every choice of prompts, loss, rate, logit, accuracy and final weight."""

from pathlib import Path

from tests.helpers.recorded import Recorded
from tests.helpers.recorded_prompts import check_pool_method

NAMES = {"pool.prompts": "prompt.prompt", "pool.keys": "prompt.prompt_key", "head.weight": "head.weight"}
NAMES |= {"head.bias": "head.bias"}


def check(run: Recorded, tmp_path: Path, monkeypatch) -> None:
    check_pool_method(run, "l2p", NAMES, {}, tmp_path, monkeypatch)
