"""A start imports what it needs and nothing heavier, and what was left out is there when it is asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import startup

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = ("torch._dynamo", "sympy", "timm.models.beit", "huggingface_hub", "sklearn", "scipy", "matplotlib")


def said(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_check_imports_no_compiler_no_other_models_and_no_data_libraries():
    code = f"""
import sys, main
assert main.main(["--config", "exps/sema_digits_short.json", "--check"]) == 0
found = [name for name in {LEFT_OUT} if name in sys.modules]
stand_in = sys.modules["timm.models._hub"]
held = type(stand_in).__name__
hub = sys.modules["timm.models._builder"].has_hf_hub(necessary=True) and "huggingface_hub" in sys.modules
real = sys.modules["timm.models._hub"] is not stand_in and "HfApi" in vars(sys.modules["timm.models._hub"])
import timm, torch
operator = sys.modules["torchvision.ops.roi_align"]
import timm.models.vision_transformer as family
from backbone.vit import VisionTransformer
whole = len(timm.list_models()) > 500 and timm.models.vit_tiny_patch16_224 is family.vit_tiny_patch16_224
same = VisionTransformer is family.VisionTransformer is timm.models.VisionTransformer
stands_in = operator.is_compile_supported("cpu") == sys.modules["torch._dynamo.utils"].is_compile_supported("cpu")
print([found, whole and timm.__version__ == timm.version.__version__, same, stands_in, held, hub, real])
"""
    assert said(code) == "[[], True, True, True, '_Functions', True, True]"


def test_timm_is_as_usual_where_its_packages_cannot_be_held_back():
    """A timm whose family needs more of the packages than they define yet."""
    code = """
import importlib
real, asked = importlib.import_module, []
def refuse(name, package=None):
    if name.startswith("timm."):
        asked.append(name)
        raise ImportError(name)
    return real(name, package)
importlib.import_module = refuse
import backbone.timm_vit, sys
importlib.import_module = real
print([asked[0], "timm.models.beit" in sys.modules, len(sys.modules["timm"].list_models()) > 500])
"""
    assert said(code) == "['timm.models.vision_transformer', True, True]"


def test_the_benchmark_ends_at_the_first_step_and_tells_failures(tmp_path):
    settings = {"model_name": "simplecil", "dataset": "digits", "init_cls": 5, "increment": 5, "seed": [1]}
    path = tmp_path / "no_step.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    ways = startup.commands(str(path), tmp_path / "out")
    assert startup.took(ways["--check"]).processor > 0
    with pytest.raises(RuntimeError, match="no step was taken"):
        startup.took(ways["first training step"])
    first = startup.commands("exps/sema_digits_short.json", tmp_path / "out")["first training step"]
    assert startup.took(first).wall > 0
    (rows,) = (tmp_path / "out" / "sema_digits_short").rglob("metrics.jsonl")
    assert '"epoch"' not in rows.read_text(encoding="utf-8")


def test_the_table_says_what_is_met():
    found = {
        "a": [startup.Took(1.0, 9.0), startup.Took(2.0, 8.0), startup.Took(4.0, 7.0)],
        "b": [startup.Took(3.0, 3.0)],
    }
    lines = startup.table(found | {"c": found["b"]}, {"a": 2, "b": 2}).split("\n")[2:]
    assert lines == [
        "| a | 2.00 | 8.00 | 2 s | met |",
        "| b | 3.00 | 3.00 | 2 s | NOT MET |",
        "| c | 3.00 | 3.00 | | |",
    ]
