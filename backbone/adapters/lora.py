"""LoRA experts for the ViT's linear layers, and the one kernel that mixes a layer's experts in one down and one up product.

This file has the experts alone; `backbone.experts.routed.RoutedLinears` is the slot that holds them and applies them by hooks
for the time of a pass. Wrapper modules in place of the linear layers would rename the frozen ViT's weights
(`attn.qkv.base.weight`), which checkpoints, hashes and strict loading name; with hooks its modules and state_dict never change.
Shapes: B batch, N tokens, I inputs and O outputs of a linear layer, R rank, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.vit import SlottedViT
from utils.text import nearest

TARGETS = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}  # name -> place in timm's Block
Site = tuple[int, str]  # layer and target


class LoRA(nn.Module):
    """One expert: (alpha / R) U A x, [.., I] -> [.., O]   (Hu et al. 2022, section 4.1).

    `down` A [R, I], `up` U [O, R], no biases; `alpha` None stands for R, a scale of 1. Starts with A Kaiming and U zero, so it
    adds exactly 0 until the first step. Trains both. Raises ValueError for a rank below 1.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float | None = None):
        super().__init__()
        if rank < 1:
            raise ValueError(f"a LoRA needs a rank of at least 1, got {rank}")
        self.down = nn.Parameter(torch.empty(rank, inputs))
        self.up = nn.Parameter(torch.empty(outputs, rank))
        self.alpha = rank if alpha is None else alpha
        self.reset_parameters()

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.up)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up) * self.scale


def mixture(x: Tensor, experts: Sequence[LoRA], gates: Tensor | None = None) -> Tensor:
    """sum_e g_e scale_e U_e A_e x in one down and one up product, whatever the ranks.

    x [B, N, I]; gates [B, E] (per sample), [B, N, E] (per token) or None (all 1); returns [B, N, O]. As in
    `backbone.adapters.adapter.mixture` a gate scales its expert's slice of the hidden units [B, N, sum R_e] instead of
    its output.
    Raises ValueError for gates of another shape: a size of 1 would otherwise spread over the batch in silence.
    """
    hidden = F.linear(x, torch.cat([e.down for e in experts]))
    if gates is not None:
        expected = (*x.shape[: gates.dim() - 1], len(experts))
        if gates.dim() not in (2, 3) or gates.shape != expected:
            batch, tokens, count = x.shape[0], x.shape[1], len(experts)
            raise ValueError(
                f"gates of shape {list(gates.shape)} do not fit: [{batch}, {count}] (samples, experts) or "
                f"[{batch}, {tokens}, {count}] (samples, tokens, experts) is expected"
            )
        gates = gates.unsqueeze(1) if gates.dim() == 2 else gates
        spread = [gates[..., i : i + 1].expand(*gates.shape[:-1], e.rank) for i, e in enumerate(experts)]
        hidden = hidden * torch.cat(spread, dim=-1).to(hidden.dtype)
    return F.linear(hidden, torch.cat([e.up * e.scale for e in experts], dim=1))


class Bundle(nn.Module):
    """One expert on several linear layers of a block: a LoRA for each target, which one gate scales.

    Ranks and alphas may differ between the targets, as in a peft adapter. Raises ValueError for no target or an unknown one."""

    def __init__(self, loras: Mapping[str, LoRA]):
        super().__init__()
        if not loras or not set(loras) <= set(TARGETS):
            raise ValueError(f"an expert has a LoRA for some of {', '.join(TARGETS)}; got {list(loras) or 'none'}")
        self.loras = nn.ModuleDict(loras)

    def __getitem__(self, target: str) -> LoRA:
        return cast(LoRA, self.loras[target])

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(self.loras)

    @property
    def rank(self) -> int:
        """The largest of its LoRAs' ranks; a learner's experts have one for all."""
        return max(self[target].rank for target in self.targets)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        for target in self.targets:
            self[target].reset_parameters(generator)


def bundle(backbone: SlottedViT, layer: int, targets: Sequence[str], rank: int) -> Bundle:
    """A new expert for the linear layers `targets` of a layer, of scale 1. Raises ValueError as `linear_of` does."""
    linears = {target: linear_of(backbone, layer, target) for target in targets}
    return Bundle({target: LoRA(at.in_features, at.out_features, rank) for target, at in linears.items()})


def merge_bundles(experts: Sequence[Bundle], weights: Sequence[float]) -> Bundle:
    """`merge` target by target: exact with these fixed gates."""
    return Bundle({target: merge([expert[target] for expert in experts], weights) for target in experts[0].targets})


def linear_of(backbone: SlottedViT, layer: int, target: str) -> nn.Linear:
    """The frozen linear layer `target` of a layer. Raises ValueError for an unknown target, or if it is not an nn.Linear."""
    if target not in TARGETS:
        raise ValueError(f"lora_target {target!r} is unknown, {', '.join(TARGETS)} are known{nearest(target, TARGETS)}")
    if not 0 <= layer < backbone.depth:
        raise ValueError(f"layer {layer} does not exist, the backbone has layers 0..{backbone.depth - 1}")
    module: Any = backbone.vit.blocks[layer]
    for name in TARGETS[target].split("."):
        module = getattr(module, name, None)
    if type(module) is not nn.Linear:
        there = "none of that name" if module is None else type(module).__name__
        raise ValueError(f"layer {layer} has no linear layer {TARGETS[target]}, but {there}")
    attention: Any = backbone.vit.blocks[layer].attn
    if target == "qkv" and getattr(attention, "q_bias", None) is not None and not attention.qkv_bias_separate:
        raise ValueError(
            f"layer {layer} never calls its linear layer {TARGETS[target]}: {type(attention).__name__} multiplies by its "
            f"weight with the biases of queries and values apart (q_bias, v_bias), so a LoRA there would have no effect"
        )
    return module


@torch.no_grad()
def merge(experts: Sequence[LoRA], weights: Sequence[float]) -> LoRA:
    """The one LoRA that equals `experts` with these fixed gates: factors side by side, exact, of the sum of the ranks.

    Experts of weight 0 are left out. Raises ValueError if none is left, or the numbers differ.
    """
    if len(experts) != len(weights) or not any(weights):
        raise ValueError(f"one weight for each of {len(experts)} experts is expected, not all 0; got {list(weights)}")
    weighted = [(e, w) for e, w in zip(experts, weights, strict=True) if w]
    first, weight = weighted[0]
    alone = first if len(weighted) == 1 and weight == 1 else None
    rank, (outputs, inputs) = sum(e.rank for e, _ in weighted), (len(first.up), first.down.shape[1])
    whole = LoRA(inputs, outputs, rank, alone.alpha if alone else None).to(first.down)
    whole.down.copy_(torch.cat([e.down for e, _ in weighted]))
    whole.up.copy_(alone.up if alone else torch.cat([e.up * (e.scale * w) for e, w in weighted], dim=1))
    return whole
