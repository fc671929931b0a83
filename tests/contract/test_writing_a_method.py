"""The example of docs/writing-a-method.md is a method: put into models/, it passes contract tests and runs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = ["test_learns_and_predicts", "test_the_backbone_changes", "test_a_sample_alone", "test_structure_and_weights"]
EXPERIMENT = {
    "about": "The guide's example.", "model_name": "gated", "dataset": "digits", "init_cls": 4, "increment": 3,
    "batch_size": 128, "image_size": 16, "epochs": 1, "init_lr": 0.05, "seed": [5], "backbone_weights": "random",
}  # fmt: skip


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The program with the page's method in it."""
    there = tmp_path_factory.mktemp("guide")
    for folder in ("backbone", "commands", "models", "utils", "tests", "benchmarks"):
        shutil.copytree(ROOT / folder, there / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("main.py", "pyproject.toml"):
        shutil.copy(ROOT / name, there)
    page = (ROOT / "docs" / "writing-a-method.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    (there / "models" / "gated.py").write_text("\n".join(blocks), encoding="utf-8")
    (there / "gated.json").write_text(json.dumps(EXPERIMENT), encoding="utf-8")
    return there


def run(copy, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_passes_contract_tests(copy):
    chosen = f"gated and ({' or '.join(TESTS)})"
    shown = run(copy, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib",
                "tests/contract/test_methods.py", "-k", chosen)  # fmt: skip
    assert "12 passed" in shown


def test_it_runs_and_logs_its_terms(copy):
    assert "second task: one gate a layer more" in run(copy, "main.py", "--config", "gated.json", "--check")
    run(copy, "main.py", "--config", "gated.json")
    rows = [json.loads(line) for line in (copy / "logs" / "latest" / "metrics.jsonl").read_text().splitlines()]
    epochs = [row for row in rows if row["kind"] == "epoch"]
    assert len(epochs) == 3 and all(row["gate_cost"] > 0 for row in epochs)
    assert all(row["loss"] == pytest.approx(row["task_loss"] + row["gate_cost"], rel=1e-4) for row in epochs)
    assert [row["images"] for row in rows if row["kind"] == "sure"] == [row["images"] for row in epochs]
