"""The loss of a classifier that is aligned on features drawn from class Gaussians, as SLCA and LCA have it.

SLCA: Zhang et al., ICCV 2023, arXiv 2303.05118. LCA: Tran et al., ICLR 2026, arXiv 2603.09888.
Shapes: B batch, C classes seen, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def normalised(scores: Tensor, sizes: Sequence[int]) -> Tensor:
    """scores [B, C] over the mean of the norms of its blocks, one for each task with `sizes` of classes.

    The norm is part of the gradient."""
    norms = torch.stack([block.norm(dim=1) + 1e-7 for block in scores.split(list(sizes), dim=1)])
    return scores / norms.mean(dim=0).unsqueeze(1)


def alignment_losses(scores: Tensor, labels: Tensor, sizes: Sequence[int], temperature: float) -> Tensor:
    """Cross-entropy [B] of scores [B, C] among all classes seen, labels [B].

    Scores are first divided by the mean norm of their tasks' blocks and by `temperature`; 0: by neither."""
    if temperature:
        scores = normalised(scores, sizes) / temperature
    return F.cross_entropy(scores, labels, reduction="none")


def local(losses: Tensor, labels: Tensor, near: Tensor, weight: float) -> Tensor:
    """LCA's loss of a batch: the mean over its classes of mean l_i + weight * mean |l_i - l_j|, i and j different features of
    the class. Both means are over features `near` [B] their class's mean, closer than to any other class's; a class without
    any has the mean of all its losses [B] alone. labels [B]."""
    same = labels.unsqueeze(1) == labels  # [B, B]
    of_class = same.sum(dim=1)
    nearby = (same & near).sum(dim=1)
    counted = torch.where(nearby > 0, near, torch.ones_like(near))
    number = torch.where(nearby > 0, nearby, of_class)
    share = counted / number / of_class.reciprocal().sum()  # 1 over the features that count, over the number of classes
    pairs = same & near & near.unsqueeze(1)
    pairs.fill_diagonal_(False)
    differences = (losses.unsqueeze(1) - losses).abs() * pairs / (nearby * (nearby - 1)).clamp(min=1)
    return (share * losses).sum() + weight * differences.sum() / of_class.reciprocal().sum()


def nearest_is_own(features: Tensor, labels: Tensor, means: Tensor) -> Tensor:
    """Whether each of features [B, D] is at least as close to the mean of its class as to any of means [C, D]: bool [B]."""
    distances = torch.cdist(features, means)
    return distances.gather(1, labels.unsqueeze(1)).squeeze(1) <= distances.amin(dim=1)


def shrinking(task_of: Tensor, current: int) -> Tensor:
    """SLCA's factor of each class's mean: 0.9 + 0.1 (i + 1) / (T + 1) with i its task, task_of [C], and T the current one."""
    return 0.9 + 0.1 * (task_of + 1) / (current + 1)


def drawn(generator: torch.Generator, classes: int, samples: int, noise: int) -> tuple[Tensor, Tensor]:
    """Standard normal numbers [classes, S, noise] for `samples` S features of each class, and the order [classes * S] in which
    they are shown."""
    normals = torch.randn(classes, samples, noise, generator=generator)
    return normals, torch.randperm(classes * samples, generator=generator)
