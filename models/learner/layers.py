"""Which layers carry adapters, and what these layers read of a task's images.

Shapes: n tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backbone.vit import SlottedViT
from models.learner.base import Learner
from utils.data.tasks import Task
from utils.process import parallel

SAMPLED_TOKENS = 4096  # about how many inputs of a layer a measurement or a merge samples


def layer_range(start: int | None, end: int | None, backbone: SlottedViT) -> range:
    """The layers `start..end`, both included; None: the last three. Raises ValueError if the backbone lacks some."""
    top = backbone.depth - 1
    last = top if end is None else end
    first = max(0, last - 2) if start is None else start
    if not first <= last <= top:
        raise ValueError(
            f"adapt_start_layer, adapt_end_layer: {first}..{last} do not lie within the backbone's layers 0..{top}; "
            f"the last three are {max(0, top - 2)} and {top}"
        )
    return range(first, last + 1)


@torch.no_grad()
def slot_inputs(learner: Learner, task: Task, layers: Sequence[int]) -> dict[int, Tensor]:
    """The inputs of the slots in `layers`, [n, D] each, for a sample of the task's training images; no old image is used."""
    learner.eval()
    tokens: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for images, *_ in task.train.batches(32, draw="merge", augment=False):
        for layer, inputs in learner.backbone.slot_inputs(images.to(learner.device), layers).items():
            tokens[layer].append(inputs.flatten(0, 1))
        if sum(len(x) for x in tokens[layers[0]]) >= SAMPLED_TOKENS:
            break
    return {layer: torch.cat(batches) for layer, batches in tokens.items()}


@torch.no_grad()
def moments(learner: Learner, task: Task, modules: Sequence[nn.Module], draw: str) -> list[Tensor]:
    """For each module the mean of x x^T [D, D] in float64, over all tokens x that it reads of the task's training images.

    One pass over the images, augmented as `draw` says."""
    learner.eval()
    width, device = learner.backbone.width, learner.device
    sums = [torch.zeros(width, width, dtype=torch.float64, device=device) for _ in modules]
    count = 0

    def adding(total: Tensor) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().double().flatten(0, 1)
            total.add_(x.T @ x)

        return add

    hooks = [module.register_forward_pre_hook(adding(total)) for module, total in zip(modules, sums, strict=True)]
    try:
        for images, _, positions in learner._batches(task.train, learner.cfg.batch_size, draw=draw, shard=True):
            if len(positions):  # otherwise the one image is padding
                learner.backbone(images.to(device))
                count += len(positions) * learner.backbone.tokens
    finally:
        for hook in hooks:
            hook.remove()
    count = sum(parallel.counts(count))
    return [parallel.total(total) / count for total in sums]
