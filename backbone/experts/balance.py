"""What keeps routing balanced and sound: auxiliary losses, and how much each expert is used.

All read one layer's Routing. Several layers: the loss of each, then the mean (`over_layers`); over the tokens of all layers
at once, one layer's favourite would hide behind another's. Shapes: T tokens or samples, E experts, k choices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from backbone.experts.router import Routing


def balance_loss(routing: Routing, among: Tensor | None = None) -> Tensor:
    """E * sum_e f_e P_e (Switch Transformer, Fedus et al. 2021, eq. 4 to 6): 1 when all experts share alike, E when all goes
    to one. f_e: share of the assignments to e, a count without gradient; P_e: mean of the full softmax.

    `among` [E] bool: the experts that train (None: all). E, f and P are then those of these experts alone: against the
    whole softmax the loss would drive tokens away from the experts that train.
    """
    probabilities, counts = routing.probabilities.flatten(0, -2), assignments(routing).to(routing.probabilities)
    if among is not None:
        probabilities, counts = probabilities[:, among], counts[among]
    return counts.numel() * (_share(counts) * _share(probabilities.mean(dim=0))).sum()


def entropy_loss(routing: Routing, among: Tensor | None = None) -> Tensor:
    """log E - H(P) with P the mean of the full softmax: 0 when all experts share alike, log E when all goes to one.

    For dense gates, where each expert is assigned each token and f says nothing: the entropy of the mean is
    raised instead (LIMoE's global term, Mustafa et al. 2022, arXiv 2206.02770). `among` as in `balance_loss`.
    """
    mean = routing.probabilities.flatten(0, -2).mean(dim=0)
    mean = _share(mean if among is None else mean[among])
    return mean.new_tensor(float(mean.numel())).log() - torch.special.entr(mean).sum()


def z_loss(routing: Routing) -> Tensor:
    """mean_t logsumexp(z_t)^2 (ST-MoE, Zoph et al. 2022, eq. 5): keeps the logits where the softmax is precise."""
    return routing.logits.logsumexp(dim=-1).square().mean()


def over_layers(
    loss: Callable[..., Tensor], routings: Sequence[Routing], among: Sequence[Tensor | None] | None = None
) -> Tensor:
    """The mean of `loss` over the layers' routings, each with its mask `among` [E], if there are masks.

    Raises ValueError without any routing or if `among` does not have one entry a layer."""
    if not routings or (among is not None and len(among) != len(routings)):
        raise ValueError(
            f"a loss over layers needs routings and as many masks, got {len(routings)} and {among and len(among)}"
        )
    if among is None:
        return torch.stack([loss(routing) for routing in routings]).mean()
    return torch.stack([loss(routing, mask) for routing, mask in zip(routings, among, strict=True)]).mean()


def assignments(routing: Routing) -> Tensor:
    """How often each expert was chosen, [E] integers that sum to T * k."""
    return torch.bincount(routing.chosen.flatten(), minlength=routing.gates.shape[-1])


class Utilisation(NamedTuple):
    """How one layer's experts are used, each [E]."""

    share: Tensor  # share of the tokens on which the expert acts; sums to k less what capacity dropped
    gate: Tensor  # mean gate over all tokens
    entropy: (
        Tensor  # mean entropy (nats) of the softmax of the tokens that chose it: 0 sure, log E undecided; 0 if none did
    )


@torch.no_grad()
def utilisation(routings: Sequence[Routing]) -> Utilisation:
    """The use of one layer's experts over the tokens of one or more batches."""
    gates = torch.cat([routing.gates.flatten(0, -2) for routing in routings])
    entropy = torch.cat([torch.special.entr(r.probabilities.flatten(0, -2)).sum(dim=-1) for r in routings])  # [T]
    acts = (gates > 0).to(entropy.dtype)  # [T, E]; a choice that capacity dropped has gate 0
    counts = acts.sum(dim=0)
    return Utilisation(counts / len(gates), gates.mean(dim=0), acts.T @ entropy / counts.clamp(min=1))


def _share(amounts: Tensor) -> Tensor:
    """Each one's share of the sum; zeros stay zeros."""
    return amounts / amounts.sum().clamp(min=torch.finfo(amounts.dtype).tiny)
