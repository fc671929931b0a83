"""Inspects the routing of a finished model from outside: which layers are routed, what they choose, what other choices do.

Works on slots with a router inside (SparseMoE, RoutedLayer) and on a shared router. Nothing here changes a weight, and a pass
that is observed computes what a plain one does.
Shapes: B batch, N tokens, E experts, k chosen experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor

from backbone.experts import routed
from backbone.experts.moe import SparseMoE
from backbone.experts.router import Router, Routing, one_expert, random_experts, uniform
from backbone.vit import SlottedViT
from utils.process.seeds import named_generator

How = Literal["uniform", "random"] | int  # an int: all to the expert of this index


def routed_blocks(backbone: SlottedViT) -> list[int]:
    """The layers whose experts a learned router gates, from the lowest up; those of fixed routing are not among them."""
    gated: list[Any] = [*_sparse(backbone)]
    if routed.routers_of(backbone):
        gated += routed.routed_layers(backbone)
    return [int(name) for name in sorted(backbone.slots, key=int) if backbone.slots[name] in gated]


@contextmanager
def collecting(backbone: SlottedViT) -> Iterator[list[Routing]]:
    """Yields a list to which each pass appends one Routing for each of `routed_blocks`, until the block is left."""
    routings: list[Routing] = []
    slots = _sparse(backbone)
    try:
        routed.collect(backbone, routings)
        for slot in slots:
            slot.collect = routings
        yield routings
    finally:
        routed.collect(backbone, None)
        for slot in slots:
            slot.collect = None


@contextmanager
def forced(backbone: SlottedViT, how: How, seed: int = 0) -> Iterator[None]:
    """Within the block all passes are routed without regard to their input: `uniform` over all experts, to `random` ones
    (for each token or sample anew as many as the router chooses), or all to one expert.

    The gates have the sum of the router's gates, so only who acts changes, not how much: a top-1 router gives its expert
    p < 1, and a control with gate 1 would double or quadruple the output for a reason that is not routing.
    Random choices come from (seed, layer) alone: batches of any size draw the same. Raises ValueError without a learned
    router or for an expert that is not there.
    """
    routers = _routers(backbone)
    if not routers:
        raise ValueError("there is no learned router whose choice could be replaced")
    if isinstance(how, int) and not 0 <= how < len(routers[0]):
        raise ValueError(f"expert {how} does not exist, there are experts 0..{len(routers[0]) - 1}")
    draws = [named_generator(seed, "random routing", place) for place in range(len(routers))]

    def replaced(place: int, learned: Tensor) -> Routing:
        experts = learned.shape[-1]
        if how == "random":
            routing = random_experts(learned, experts, min(routers[place].top_k or experts, experts), draws[place])
        else:
            routing = uniform(learned, experts) if how == "uniform" else one_expert(learned, experts, how)
        return routing._replace(gates=routing.gates * learned.sum(dim=-1, keepdim=True))

    def hook_of(place: int) -> Callable[[Router, Any, Routing], Routing]:
        return lambda router, inputs, routing: replaced(place, routing.gates)

    # forward hooks leave nothing behind when they are removed, whatever happened in between
    if (shared := backbone.router) is not None:
        hooks = [shared.register_forward_hook(lambda _, __, gates: [replaced(n, g).gates for n, g in enumerate(gates)])]
    else:
        hooks = [router.register_forward_hook(hook_of(place)) for place, router in enumerate(routers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _sparse(backbone: SlottedViT) -> list[SparseMoE]:
    slots = [backbone.slots[name] for name in sorted(backbone.slots, key=int)]
    return [slot for slot in slots if isinstance(slot, SparseMoE) and slot.fixed is None]


def _routers(backbone: SlottedViT) -> list[Router]:
    """One router a layer of `routed_blocks`."""
    return [slot.router for slot in _sparse(backbone)] or routed.routers_of(backbone)
