"""What a training step returns, and what many steps need: cross-entropy among some classes, and a head's rows of a task.

Shapes: B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn import functional as F

from utils.data.tasks import Task


@dataclass(frozen=True)
class Loss:
    """The result of a step.

    `total`: the scalar whose gradient is taken. `correct`: how many of the batch are right, a scalar; None without scores.
    `terms`: the parts of `total` by name, scalars as they enter it; their mean over an epoch is logged under that name. All
    steps of a phase give the same names; `task_loss` is usual for the cross-entropy.
    `remember`: tensors [B, ...] by name, one row per sample; `fit` returns those of all steps."""

    total: Tensor
    correct: Tensor | None = None
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    remember: Mapping[str, Tensor] = field(default_factory=dict)


def cross_entropy_among(scores: Tensor, labels: Tensor, first: int, total: int) -> Loss:
    """Mean cross-entropy over the classes first..total-1 alone, and how many are right among them.

    scores [B, C], labels [B]. Equal to setting the other scores to -inf (Ahn et al. 2021's separated softmax,
    LAMDA-PILOT's mask), without infinities in the graph."""
    among = scores[:, first:total]
    return Loss(F.cross_entropy(among, labels - first), (among.argmax(dim=1) == labels - first).sum())


def rows_of(task: Task, *heads: nn.Module) -> list[tuple[nn.Parameter, range]]:
    """For `fit(rows=...)`: each parameter of the heads with the rows of the task's classes."""
    return [(p, range(task.first, task.total)) for head in heads for p in head.parameters()]
