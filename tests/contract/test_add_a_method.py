"""The README's "add a method in three steps", done by a stranger: one file in models/, one in exps/, one command."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

METHOD = '''"""Toy: a linear head on frozen features, nothing done about forgetting."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from backbone.heads.heads import LinearHead
from models.learner.base import Learner as Base
from models.learner.fit import fit
from models.learner.losses import cross_entropy_among
from utils.config.schema import Trained
from utils.data.tasks import Task


class Settings(Trained):
    toy_epochs: int = Field(1, ge=1, description="passes over each task")


class Learner(Base):
    def __init__(self, *args: Any):
        super().__init__(*args)
        self.head = self.initialise("head", LinearHead(self.backbone.width, self.num_classes))

    def learn(self, task: Task) -> None:
        self.seen = task.total

        def step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            return cross_entropy_among(self.head(self.backbone(images)), labels, task.first, task.total)

        fit(self, task, step, self.head.parameters(), phase="func", epochs=self.cfg.toy_epochs, lr=self.cfg.init_lr)
'''
EXPERIMENT = {
    "about": "A toy.", "model_name": "toy", "dataset": "digits", "init_cls": 4, "increment": 3, "batch_size": 128,
    "image_size": 16, "toy_epochs": 2, "init_lr": 0.05, "seed": [5],
}  # fmt: skip


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The program without its history, and the two files a user adds."""
    there = tmp_path_factory.mktemp("copy")
    for folder in ("backbone", "commands", "models", "utils"):
        shutil.copytree(ROOT / folder, there / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "main.py", there)
    (there / "models" / "toy.py").write_text(METHOD, encoding="utf-8")
    (there / "exps").mkdir()
    (there / "exps" / "toy_digits.json").write_text(json.dumps(EXPERIMENT), encoding="utf-8")
    return there


def run(copy, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "main.py", *arguments]
    return subprocess.run(command, cwd=copy, capture_output=True, text=True, env=environment, timeout=300)


def test_it_is_listed(copy):
    shown = run(copy, "--list").stdout
    assert "toy           Toy: a linear head on frozen features" in shown and "exps/toy_digits.json" in shown


def test_its_keys_are_checked(copy):
    done = run(copy, "--config", "exps/toy_digits.json", "--set", "toy_epoch=3")
    assert done.returncode == 2 and "did you mean 'toy_epochs'" in done.stderr


def test_it_runs(copy):
    done = run(copy, "--config", "exps/toy_digits.json")
    assert done.returncode == 0, done.stderr
    results = json.loads((copy / "logs" / "latest" / "results.json").read_text(encoding="utf-8"))
    assert results["model_name"] == "toy" and results["test_evaluations"] == 3
    assert results["top1_curve"][0] > 50  # four classes, a quarter would be chance
    assert results["trainable_parameters"] == [128 * 10 + 10] * 3
