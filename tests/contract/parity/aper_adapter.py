"""APER with adapters against LAMDA-PILOT: the session's losses and weights, features, prototypes, logits, accuracies."""

from pathlib import Path

import torch

from tests.helpers.recorded import Recorded, check_first_session, close, first_session, learn_all, logits_of


def check(run: Recorded, tmp_path: Path, monkeypatch) -> None:
    seen, settings = first_session(run, monkeypatch)
    for task, learner in learn_all(run, "aper_adapter", settings, tmp_path, monkeypatch, []):
        logits = logits_of(learner, run)
        close(logits, run.arrays[f"task{task.index}/test_logits"], f"logits after task {task.index}")
        weight = learner.statistics.weight[: task.total]
        close(weight, run.arrays[f"task{task.index}/head_weight"], f"prototypes after task {task.index}")
        run.check_accuracies(logits, task.first, task.index)
        for part in ("train", "test"):
            images = torch.from_numpy(run.arrays[f"{part}_images"]).double()
            close(learner.features(images), run.arrays[f"{part}_features"], f"{part} features")
    check_first_session(run, learner, seen)
