"""Imports point one way, importing has no effect, and nothing is ever unpickled."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RANK = {"utils": 0, "backbone": 1, "models": 2, "commands": 3, "main": 4}
FOLDERS = ("commands", "models", "backbone", "utils")
MODULES = [Path("main.py"), *sorted(p.relative_to(ROOT) for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))]


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of everything a file imports, also inside functions and under TYPE_CHECKING."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide the direction"
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_one_way(path):
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    rank = RANK[path.parts[0].removesuffix(".py")]
    above = {name for name in imported(tree) if RANK.get(name, -1) > rank}
    assert not above, f"{path} imports {above}"
    assert not imported(tree) & {"tests", "benchmarks", "conftest"}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_every_file_says_what_it_is_for(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    if text.strip():
        first = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
        assert len(first) > 20 and first.endswith((".", ":")), path


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_nothing_is_unpickled(path):
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert not imported(tree) & {"dill", "joblib", "shelve", "marshal", "cloudpickle"}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        # CIFAR's python files go through a subclass of Unpickler that builds arrays and nothing else
        assert called not in ("pickle.load", "pickle.loads", "pickle.Unpickler"), f"{path}:{node.lineno}"
        assert called != "torch.load" or given.get("weights_only") == "True", f"{path}:{node.lineno}"
        assert given.get("allow_pickle") in (None, "False"), f"{path}:{node.lineno}"


HEAVY = ("torch", "timm", "torchvision", "matplotlib", "sklearn", "safetensors")


@pytest.mark.parametrize(
    "module",
    [
        "main",
        "models",
        "backbone.catalogue",
        "utils.config.schema",
        "commands.options",
        "utils.data",
        "utils.report.console",
        "utils.process.machine",
    ],
)
def test_light_modules_import_nothing_heavy(module):
    code = f"import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


def test_importing_everything_has_no_effect():
    """No output, no files, no random numbers drawn, no threads or global settings changed."""
    names = [".".join(p.with_suffix("").parts).removesuffix(".__init__") for p in MODULES]
    code = f"""
import importlib, os, random, sys, tempfile
import numpy, torch
os.chdir(tempfile.mkdtemp())
def state():
    return (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), torch.get_num_threads(),
            torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
            dict(os.environ), os.listdir())
before = state()
for name in {names}:
    importlib.import_module(name)
assert state() == before
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
