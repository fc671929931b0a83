"""Training images held out of a task's training, for a choice that must not use test data."""

from __future__ import annotations

import torch

from models.learner.base import Learner
from utils.data.batches import TaskData
from utils.data.tasks import Task


def hold_out(
    learner: Learner, task: Task, ratio: float, *, key: str, draw: str, purpose: str
) -> tuple[TaskData, TaskData | None]:
    """(what is trained on, what is held out): of each class the share `ratio`, at least one image; their rows are logged.

    A class with one image keeps it for training, since a class that nobody trains on is lost; a warning names `key`. None
    where no class can spare one."""
    data = task.train
    counts = torch.bincount(data.labels)
    spares = counts[data.labels] > 1  # [n]
    alone = int((counts == 1).sum())
    if alone:
        classes = "1 class has one training image" if alone == 1 else f"{alone} classes have one training image each"
        learner.log.warn(f"task {task.index + 1}: {classes}, which {key} does not hold out for the {purpose}")
    if not spares.any():
        return data, None
    _, held = data.subset(torch.nonzero(spares).flatten()).split(ratio, draw)
    learner.log.row("held_out", task=task.index, purpose=purpose, samples=held.rows.tolist())
    trained_on = torch.isin(torch.from_numpy(data.rows), torch.from_numpy(held.rows), invert=True)
    return data.subset(torch.nonzero(trained_on).flatten()), held
