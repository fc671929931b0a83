"""How routers start: what they read is centred by the first task, and the column of a new expert is opened.

Shapes: n tokens or images of a sample, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from backbone.experts.router import Router
from models.learner.base import Learner
from models.learner.layers import slot_inputs
from models.settings.experts import GateSettings
from utils.data.tasks import Task


def router_inputs(learner: Learner, task: Task, layers: Sequence[int], cfg: GateSettings) -> list[Tensor]:
    """What the router of each layer reads of a sample of the task's images, before centring: tokens or mean tokens [n, D].

    A shared router reads the input of the first layer for all layers."""
    tokens = slot_inputs(learner, task, layers)
    if cfg.router_granularity == "sample":
        count = learner.backbone.tokens
        tokens = {layer: rows.unflatten(0, (-1, count)).mean(dim=1) for layer, rows in tokens.items()}
    return [tokens[layers[0] if cfg.router_scope == "shared" else layer] for layer in layers]


def centre(routers: Sequence[Router], inputs: Sequence[Tensor]) -> None:
    """Each router from now on reads x minus the mean of its inputs [n, D]."""
    for router, tokens in zip(routers, inputs, strict=True):
        router.set_center(tokens.mean(dim=0))


def open_columns(routers: Sequence[Router], inputs: Sequence[Tensor] | None) -> None:
    """Opens the last column of each router: aimed at its inputs [n, D] where it sees them, otherwise at logit 0."""
    for i, router in enumerate(routers):
        centred = None if inputs is None else inputs[i] - router.center
        if centred is None or not router.sees(centred):
            router.set_offset(len(router) - 1, 0.0)
        else:
            router.aim(len(router) - 1, centred)
