"""Training images held out of a task's training, for a choice that must not use test data."""

from __future__ import annotations

import torch
from torch import Tensor

from backbone.vit import Activations
from models.learner.base import Learner
from models.learner.losses import cross_entropy_among
from utils.data.batches import TaskData
from utils.data.tasks import Task


def hold_out(
    learner: Learner,
    task: Task,
    ratio: float,
    *,
    key: str,
    draw: str,
    purpose: str,
    data: TaskData | None = None,
) -> tuple[TaskData, TaskData | None]:
    """(what is trained on, what is held out): of each class the share `ratio`, at least one image; their rows are logged.

    `data` is divided in place of the task's images, if given.
    A class with one image keeps it for training, since a class that nobody trains on is lost; a warning names `key`. None
    where no class can spare one."""
    data = task.train if data is None else data
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


@torch.no_grad()
def held_out_score(learner: Learner, held: TaskData, first: int, total: int) -> tuple[float, float]:
    """(mean cross-entropy, accuracy as a fraction) of the linear head on held-out training images, among the classes first ..
    total - 1; the learner is in training mode afterwards."""
    learner.eval()
    summed, right = 0.0, 0

    def scored(images: Tensor | Activations) -> Tensor:
        return learner.head(learner.backbone(images))

    for scores, labels in learner.outputs(scored, held, learner.cfg.eval_batch_size, augment=False, shuffle=False):
        loss = cross_entropy_among(scores, labels.to(scores.device), first, total)
        assert loss.correct is not None
        summed, right = summed + loss.total.item() * len(labels), right + int(loss.correct)
    learner.train()
    return summed / len(held), right / len(held)
