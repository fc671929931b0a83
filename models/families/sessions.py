"""One training session of adapters with a cosine head of the task's own classes, as APER, RanPAC and EASE have it.

Shapes: B batch, C classes of the task.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn import functional as F

from backbone.heads.heads import CosineHead
from models.learner.base import Learner
from models.learner.fit import fit
from models.learner.groups import Recipe
from utils.data.tasks import Task


def train_session(
    learner: Learner,
    task: Task,
    adapters: Iterable[nn.Module],
    *,
    name: str,
    epochs: int,
    lr: float,
    recipe: Recipe | None = None,
) -> CosineHead:
    """Trains `adapters` and a new head on the cross-entropy among the task's classes; returns the head, its work done.

    Biases and sigma are decayed with all the rest, as in the originals. While it is trained the head is the learner's
    `local_head`, so that a phase that is interrupted saves it; `name` decides its start values."""
    head: CosineHead = learner.initialise(name, CosineHead(learner.backbone.width, task.total - task.first))
    learner.local_head = head

    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        scores, own = head(learner.backbone(images)), labels - task.first
        return F.cross_entropy(scores, own), (scores.argmax(dim=1) == own).sum()

    learner.train()
    parameters = [*(p for adapter in adapters for p in adapter.parameters()), *head.parameters()]
    fit(learner, task, step, parameters, phase="adapt", epochs=epochs, lr=lr, recipe=recipe)
    del learner.local_head
    return head


def planned_once(learner: Learner) -> list[tuple[str, int]]:
    """Lines of --check where the first task alone is a session: adapters and a cosine head, then nothing."""
    head = learner.cfg.init_cls * learner.backbone.width + 1
    size = sum(p.numel() for p in learner.backbone.slots.parameters()) + head
    return [("task 1: adapters and a cosine head of its classes", size), ("later tasks: nothing is trained", 0)]
