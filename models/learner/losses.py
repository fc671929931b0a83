"""Cross-entropy among a task's own classes, and the rows of a head that other tasks own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.data.tasks import Task


def cross_entropy_among(scores: Tensor, labels: Tensor, first: int, total: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy over the classes first..total-1 alone, and how many are right among them.

    scores [B, C], labels [B] -> two scalars. Equal to setting the other scores to -inf (Ahn et al. 2021's separated
    softmax, LAMDA-PILOT's mask), without infinities in the graph."""
    among = scores[:, first:total]
    return F.cross_entropy(among, labels - first), (among.argmax(dim=1) == labels - first).sum()


def keep_other_rows(head: nn.Linear, task: Task) -> Callable[[], None]:
    """A function that gives the head's rows of other tasks their present values back: weight decay shrinks them."""
    kept = [p.detach().clone() for p in head.parameters()]

    @torch.no_grad()
    def restore() -> None:
        for parameter, old in zip(head.parameters(), kept, strict=True):
            parameter[: task.first] = old[: task.first]
            parameter[task.total :] = old[task.total :]

    return restore


def keeping(rows: Sequence[tuple[nn.Parameter, range | None]], decay_other_rows: bool) -> Callable[[], None] | None:
    """A function for after a step that gives each parameter's rows outside the range that learns (None: all learn) their
    present values back; None where nothing is to be kept. Momentum and weight decay alone would move them."""
    if decay_other_rows:
        return None
    kept = [(p, own, p.detach().clone()) for p, own in rows if own is not None]

    @torch.no_grad()
    def restore() -> None:
        for parameter, own, old in kept:
            parameter[: own.start] = old[: own.start]
            parameter[own.stop :] = old[own.stop :]

    return restore
