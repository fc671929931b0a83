"""Which layers carry adapters, and a sample of what the slots of these layers read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backbone.vit import SlottedViT
from models.learner.base import Learner
from utils.data.tasks import Task

SAMPLED_TOKENS = 4096  # about as many inputs of a layer are sampled for what is measured or fitted on them


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
    """What the slots of `layers` read for a sample of the task's training images, [n, D] each; no old image is used."""
    learner.eval()
    tokens: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    device = next(learner.backbone.vit.parameters()).device
    for images, *_ in task.train.batches(32, draw="merge", augment=False):
        for layer, inputs in learner.backbone.slot_inputs(images.to(device), layers).items():
            tokens[layer].append(inputs.flatten(0, 1))
        if sum(len(x) for x in tokens[layers[0]]) >= SAMPLED_TOKENS:
            break
    return {layer: torch.cat(batches) for layer, batches in tokens.items()}
