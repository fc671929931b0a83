"""The slot of a layer whose experts are mixed by gates from outside, and the routers that give them in one pass.

Shapes: B batch, N tokens, D width, E experts, L layers with a slot.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn

from backbone.adapter import Adapter, mixture
from backbone.router import Granularity, Router, Routing
from backbone.vit import SlottedViT

Scope = Literal["shared", "layer"]


class RoutedLayer(nn.Module):
    """y = sum_e g_e expert_e(x), [B, N, D] -> [B, N, D], with experts of any ranks. Gates [B, E] or [B, N, E] come from the
    caller, else from the layer's own `router`; without either all are 1, the plain sum.

    `collect`, a list set between passes, receives the Routing of the layer's own router; `forward` changes nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleList()
        self.router: Router | None = None
        self.collect: list[Routing] | None = None

    def __len__(self) -> int:
        return len(self.adapters)

    def experts(self) -> list[Adapter]:
        return cast("list[Adapter]", list(self.adapters))

    def add(self, expert: Adapter) -> None:
        """Adds an expert; an attached router must `grow` with it."""
        self.adapters.append(expert)

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        if gates is None and self.router is not None:
            routing = self.router(x)
            if self.collect is not None:
                self.collect.append(routing)
            gates = routing.gates
        gates = x.new_ones(1, len(self)) if gates is None else gates.to(x.dtype)
        return mixture(x, self.experts(), gates)


class SharedRouter(nn.Module):
    """Gates of all layers from the first slot's input, a Route for SlottedViT: x [B, N, D] -> L tensors [B, N, E] ([B, E] for
    samples). Its L * E columns are kept layer by layer; center and granularity are one, so x is read once.

    What it reads comes from the frozen prefix, so an old image is routed by the same features for ever. `collect` as in
    RoutedLayer, L entries a pass.
    """

    def __init__(self, layers: int, width: int, experts: int, granularity: Granularity):
        super().__init__()
        self.routers = nn.ModuleList(Router(width, experts, granularity=granularity) for _ in range(layers))
        self.collect: list[Routing] | None = None

    def layers(self) -> list[Router]:
        return cast("list[Router]", list(self.routers))

    def forward(self, x: Tensor) -> list[Tensor]:
        read = self.layers()[0].read(x)
        routings = [router.route(read) for router in self.layers()]
        if self.collect is not None:
            self.collect += routings
        return [routing.gates for routing in routings]

    def weights(self, x: Tensor) -> Tensor:
        """The gates as one tensor, [B, N, L, E] for tokens and [B, L, E] for samples."""
        return torch.stack(self(x), dim=-2)


def routed_layers(backbone: SlottedViT) -> list[RoutedLayer]:
    """The routed slots, from the lowest layer up."""
    found = [backbone.slots[name] for name in sorted(backbone.slots, key=int)]
    return [slot for slot in found if isinstance(slot, RoutedLayer)]


def attach_router(backbone: SlottedViT, scope: Scope, granularity: Granularity = "token") -> list[Router]:
    """Puts routers (all gates 1 / E at first) on a backbone whose slots are all RoutedLayers; returns one a layer.

    `shared`: one SharedRouter that reads the first slot's input. `layer`: each layer's own router reads the layer's own
    input, which moves as the adapters below it learn. Raises ValueError if something else is in a slot, if the layers
    have different numbers of experts or none, or if routers are attached already.
    """
    layers = routed_layers(backbone)
    counts = {len(layer) for layer in layers}
    if len(layers) != len(backbone.slots) or len(counts) != 1 or 0 in counts:
        raise ValueError(
            f"a router needs routed layers alone, with the same number of experts in each, at least 1; got {len(layers)} in "
            f"{len(backbone.slots)} slots with {sorted(counts)} experts"
        )
    if routers_of(backbone):
        raise ValueError("a router is attached already, detach it first")
    like = next(backbone.vit.parameters())
    if scope == "shared":
        shared = SharedRouter(len(layers), backbone.width, counts.pop(), granularity)
        backbone.router = shared.to(like)
    elif scope == "layer":
        for layer in layers:
            layer.router = Router(backbone.width, len(layer), granularity=granularity).to(like)
    else:
        raise ValueError(f"router scope {scope!r} is unknown, expected shared or layer")
    return routers_of(backbone)


def detach_router(backbone: SlottedViT) -> None:
    """Takes all routers off: every expert acts with gate 1 again."""
    backbone.router = None
    for layer in routed_layers(backbone):
        layer.router = None


def routers_of(backbone: SlottedViT) -> list[Router]:
    """The attached routers, one a layer from the lowest up; empty if none are."""
    if isinstance(backbone.router, SharedRouter):
        return backbone.router.layers()
    return [layer.router for layer in routed_layers(backbone) if layer.router is not None]


def collect(backbone: SlottedViT, into: list[Routing] | None) -> None:
    """From now on each pass appends its routings, one a layer, to `into`; None ends that."""
    if isinstance(backbone.router, SharedRouter):
        backbone.router.collect = into
    for layer in routed_layers(backbone):
        layer.collect = into
