"""One training session of adapters with a cosine head of the task's classes, as APER, RanPAC and EASE have it.

Shapes: B batch, C classes of the task.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from backbone.heads.heads import CosineHead
from models.learner.base import Learner
from models.learner.fit import fit
from models.learner.groups import Recipe, count
from models.learner.losses import Loss, cross_entropy_among
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
    """Trains `adapters` and a new head on the cross-entropy among the task's classes; returns the trained head.

    Biases and sigma are decayed with all the rest, as in the originals. During training the head is the learner's
    `local_head`, so that an interrupted phase saves it; `name` decides its start values."""
    head: CosineHead = learner.initialise(name, CosineHead(learner.backbone.width, task.total - task.first))
    learner.local_head = head

    def step(images: Tensor, labels: Tensor) -> Loss:
        scores = head(learner.backbone(images))
        return cross_entropy_among(scores, labels - task.first, 0, task.total - task.first)

    learner.train()
    fit(learner, task, step, session_parameters(adapters, head), phase="adapt", epochs=epochs, lr=lr, recipe=recipe)
    del learner.local_head
    return head


def session_parameters(adapters: Iterable[nn.Module], head: CosineHead) -> list[nn.Parameter]:
    """The parameters that a session trains."""
    return [*(p for adapter in adapters for p in adapter.parameters()), *head.parameters()]


def planned_session(learner: Learner, adapters: Iterable[nn.Module], classes: int) -> int:
    """The number of parameters that a session with `classes` classes trains."""
    return count(session_parameters(adapters, CosineHead(learner.backbone.width, classes)))


def planned_once(learner: Learner) -> list[tuple[str, int]]:
    """Lines of --check where the first task alone is a session: adapters and a cosine head, then nothing."""
    size = planned_session(learner, learner.backbone.slots.values(), learner.cfg.init_cls)
    return [("task 1: adapters and a cosine head of its classes", size), ("later tasks: nothing is trained", 0)]
