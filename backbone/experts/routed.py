"""Slots whose experts are mixed by gates, beside the MLP or on the block's linear layers, and the routers that set the gates.

Shapes: B batch, N tokens, D width, E experts, L layers with a slot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backbone.adapters import lora
from backbone.adapters.adapter import Adapter, mixture
from backbone.adapters.consolidation import consolidate
from backbone.adapters.lora import Bundle, LoRA, Site
from backbone.blocks import BlockSlot, Slot
from backbone.experts.router import Granularity, Router, Routing
from backbone.vit import SlottedViT

Scope = Literal["shared", "layer"]


class RoutedSlot(Slot):
    """The experts of one layer and, if it has one, the layer's `router`; with gates None all act with gate 1, the plain sum.

    `collect`, a list set between passes, receives the Routing of the layer's router at every call of `gates`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleList()
        self.router: Router | None = None
        self.collect: list[Routing] | None = None

    def __len__(self) -> int:
        return len(self.adapters)

    def add(self, expert: nn.Module) -> None:
        """Adds an expert; an attached router must `grow` with it."""
        self.adapters.append(expert)

    def experts(self) -> list[Any]:
        return list(self.adapters)

    def ranks(self) -> list[int]:
        return [expert.rank for expert in self.experts()]

    def join(self, first: nn.Module, second: nn.Module, weight: float) -> nn.Module:
        """One expert whose function is first + weight * second, exact, of the sum of their ranks."""
        raise TypeError(f"{type(self).__name__} does not say how its experts are joined")

    def gates(self, x: Tensor) -> Tensor | None:
        """The gates [B, E] or [B, N, E] of the layer's router for x [B, N, D]; None without a router."""
        if self.router is None:
            return None
        routing = _recomputed(self.router, x)
        if self.collect is not None:
            self.collect.append(routing)
        return routing.gates


class RoutedLayer(RoutedSlot):
    """Experts beside the MLP: y = sum_e g_e expert_e(x), [B, N, D] -> [B, N, D], of any ranks. Gates [B, E] or [B, N, E]."""

    @property
    def reads(self) -> Literal["token", "gates"]:  # type: ignore[override]
        """With a router in the slot the gates of all tokens are computed, since `collect` gets them all."""
        return "token" if self.router is None else "gates"

    def experts(self) -> list[Adapter]:
        return cast("list[Adapter]", list(self.adapters))

    def join(self, first: nn.Module, second: nn.Module, weight: float) -> nn.Module:
        return consolidate(cast(Adapter, first), cast(Adapter, second), "concat", weight)

    def forward(self, x: Tensor, gates: Tensor | None) -> Tensor:
        gates = x.new_ones(1, len(self)) if gates is None else gates.to(x.dtype)
        return mixture(x, self.experts(), gates)


class RoutedLinears(RoutedSlot, BlockSlot):
    """Experts on the block's linear layers: W z + b becomes W z + b + sum_e g_e scale_e U_e A_e z in each target, with one
    gate an expert for all targets. All experts have the same targets; ranks and alphas may differ.

    Gates [B, E] or [B, N, E] are decided by the block's input x, before its attention. The experts act by hooks that are
    there for the time of a call only: afterwards the block is timm's alone, and backbones that share one frozen ViT, as
    a teacher and its pupil do, never see each other's experts.
    """

    def experts(self) -> list[Bundle]:
        return cast("list[Bundle]", list(self.adapters))

    def add(self, expert: nn.Module) -> None:
        """As in RoutedSlot. Raises ValueError for other targets than those of the experts that are there."""
        targets = cast(Bundle, expert).targets
        if len(self) and set(targets) != set(self.experts()[0].targets):
            raise ValueError(
                f"the experts here are on {', '.join(self.experts()[0].targets)}, the new one on {', '.join(targets)}"
            )
        super().add(expert)

    def join(self, first: nn.Module, second: nn.Module, weight: float) -> nn.Module:
        return lora.merge_bundles([cast(Bundle, first), cast(Bundle, second)], [1.0, weight])

    def forward(self, x: Tensor, gates: Tensor | None, block: nn.Module) -> Tensor:
        """The output [B, N, D] of `block` for its input x [B, N, D]."""
        experts = self.experts()

        def adding(target: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
            loras = [expert[target] for expert in experts]
            return lambda linear, inputs, output: output + lora.mixture(inputs[0], loras, gates)

        hooks = []
        try:
            for target in experts[0].targets:
                hooks.append(block.get_submodule(lora.TARGETS[target]).register_forward_hook(adding(target)))
            return block(x)
        finally:
            for hook in hooks:
                hook.remove()


class SharedRouter(nn.Module):
    """Gates of all layers from the first slot's input, a Route for SlottedViT: x [B, N, D] -> L tensors [B, N, E] ([B, E] for
    samples). It has one Router of E columns a layer; these share center and granularity, so x is read once.

    What it reads comes from the frozen prefix, so an old image is routed by the same features for ever. `collect` as in
    RoutedSlot, L entries a pass.
    """

    def __init__(self, layers: int, width: int, experts: int, granularity: Granularity):
        super().__init__()
        self.routers = nn.ModuleList(Router(width, experts, granularity=granularity) for _ in range(layers))
        self.collect: list[Routing] | None = None

    def layers(self) -> list[Router]:
        return cast("list[Router]", list(self.routers))

    def forward(self, x: Tensor) -> list[Tensor]:
        routings = _recomputed(self._routings, x)
        if self.collect is not None:
            self.collect += routings
        return [routing.gates for routing in routings]

    def _routings(self, x: Tensor) -> list[Routing]:
        read = self.layers()[0].read(x)
        return [router.route(read) for router in self.layers()]


def _recomputed(route: Callable[[Tensor], Any], x: Tensor) -> Any:
    """route(x), whose intermediate results are computed again in the backward pass: the centred tokens would take one more
    [B, N, D] of memory, while x stays in memory anyway, since the experts read it."""
    return checkpoint(route, x, use_reentrant=False, preserve_rng_state=False) if torch.is_grad_enabled() else route(x)


def routed_layers(backbone: SlottedViT) -> list[RoutedSlot]:
    """The routed slots, from the lowest layer up."""
    slots = [backbone.slots[name] for name in sorted(backbone.slots, key=int)]
    return [slot for slot in slots if isinstance(slot, RoutedSlot)]


def loras_of(backbone: SlottedViT, expert: int) -> dict[Site, LoRA]:
    """The LoRAs of one expert by (layer, target), as backbone/adapters/peft_format.py writes them: what acts where its
    gate is 1.

    Raises ValueError where no layer has experts on its linear layers, or not all of these have this one."""
    slots = {int(name): slot for name, slot in backbone.slots.items() if isinstance(slot, RoutedLinears)}
    if not slots:
        raise ValueError("the backbone has no LoRA experts")
    count = min(map(len, slots.values()))
    if not 0 <= expert < count:
        raise ValueError(f"expert {expert} does not exist, there are {count} in each layer, counted from 0")
    bundles = {layer: slots[layer].experts()[expert] for layer in sorted(slots)}
    return {(layer, target): bundle[target] for layer, bundle in bundles.items() for target in bundle.targets}


def attach_router(backbone: SlottedViT, scope: Scope, granularity: Granularity = "token") -> list[Router]:
    """Puts routers (all gates 1 / E at first) on a backbone whose slots are all routed; returns one a layer.

    `shared`: one SharedRouter that reads the first slot's input. `layer`: a router in each layer reads that layer's
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
        raise ValueError("a router is attached already")
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


@torch.no_grad()
def merge_experts(backbone: SlottedViT, gone: int, into: int, gates: Tensor) -> None:
    """f_into + (g_gone / g_into) f_gone takes the place of expert `into` in every layer, with its mean gates g of gates [L, E]:
    what the two add together on average, exact for gates that are these. The column of `gone` is dropped, and its share
    goes to all that are left. Where g_into is 0 nothing is known of the ratio, and f_into stays as it is."""
    for slot, g in zip(routed_layers(backbone), gates, strict=True):
        weight = float(g[gone] / g[into]) if g[into] > 0 else 0.0
        if weight > 0:
            slot.adapters[into] = slot.join(slot.adapters[into], slot.adapters[gone], weight)
        del slot.adapters[gone]
    for router in routers_of(backbone):
        router.drop(gone)
