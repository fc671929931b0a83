"""What the phases of routed experts compute: who is mature, when a loss stands still, and the losses beside cross-entropy.

Pure functions; models/dylora_moe.py says when they are called. Shapes: B batch, D width, E experts, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbone import balance
from backbone.router import Routing
from backbone.vit import SlottedViT
from models.expert_settings import GateSettings

LWF_TEMPERATURE = 2.0  # of Learning without Forgetting (Li and Hoiem 2016)


@dataclass(frozen=True)
class Teacher:
    """The model as it was before a task, over the same frozen ViT."""

    backbone: SlottedViT
    head: nn.Module


@dataclass
class Expert:
    """What is known of an expert beside its weights."""

    tasks: int = 0  # in which it learned
    steps: int = 0
    young: bool = True
    frozen: bool = False
    peak: float = 0.0  # largest mean gate in any task since it was there

    def is_mature(self, cfg: GateSettings) -> bool:
        """By the tasks it learned or by its steps, whichever comes first; a frozen one is as mature as it gets."""
        by_tasks = cfg.maturity_tasks is not None and self.tasks >= cfg.maturity_tasks
        by_steps = cfg.maturity_steps is not None and self.steps >= cfg.maturity_steps
        return self.frozen or by_tasks or by_steps


@dataclass
class Course:
    """What the steps of a phase change beside weights, as `fit` saves it: steps `done`, held-out losses `measured`, and what is
    known of the `experts`; `changed` is called after the experts came back."""

    experts: list[Expert]
    measured: list[float]
    changed: Callable[[], None]
    done: int = 0

    def state_dict(self) -> Any:
        return {"done": self.done, "measured": self.measured, "experts": [asdict(e) for e in self.experts]}

    def load_state_dict(self, state: Any) -> None:
        self.done, self.measured[:] = state["done"], state["measured"]
        self.experts[:] = [Expert(**facts) for facts in state["experts"]]
        self.changed()


def all_act(experts: Sequence[Expert], cfg: GateSettings) -> bool:
    """Whether the mixture is dense: young experts act always, `top_k_experts` of the mature."""
    return cfg.top_k_experts + sum(e.young for e in experts) >= len(experts)


def plateau(losses: Sequence[float], epochs: int, tolerance: float) -> bool:
    """Whether the last `epochs` losses bring no improvement by the share `tolerance` over the best before them."""
    if len(losses) <= epochs:
        return False
    return min(losses[-epochs:]) >= (1 - tolerance) * min(losses[:-epochs])


def routing_loss(
    routings: Sequence[Routing], experts: Sequence[Expert], learning: Sequence[int], cfg: GateSettings
) -> Tensor | float:
    """Balance, or entropy while all experts act, among the experts that learn; and the z-loss. Mean over layers.

    Young experts beside top-k act always: their share says nothing, so they stay out of the balance."""
    if not routings or len(experts) == 1:
        return 0.0
    dense = all_act(experts, cfg)
    among = torch.zeros(len(experts), dtype=torch.bool, device=routings[0].gates.device)
    for e in learning:
        among[e] = dense or not experts[e].young
    loss = cfg.router_z_loss_coef * balance.over_layers(balance.z_loss, routings)
    if among.sum() > 1:
        kind = balance.entropy_loss if dense else balance.balance_loss
        weight = cfg.router_entropy_coef if dense else cfg.router_aux_loss_coef
        loss = loss + weight * balance.over_layers(kind, routings, [among] * len(routings))
    return loss


def score_distance(before: Tensor, now: Tensor) -> Tensor:
    """How far scores moved, [B, C] and [B, C] -> scalar: T^2 KL(before, now) at temperature T (Hinton et al. 2015, as Learning
    without Forgetting). No gradient reaches `before`."""
    was, is_now = ((scores / LWF_TEMPERATURE).log_softmax(dim=1) for scores in (before, now))
    return F.kl_div(is_now, was.detach(), reduction="batchmean", log_target=True) * LWF_TEMPERATURE**2
