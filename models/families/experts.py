"""What a task with routed experts is decided and trained on: novelty, terms of the loss, distillation, plateaus.

Shapes: B batch, C classes, D width, n images of a task, S stored class embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from backbone.experts import balance, novelty
from backbone.experts.router import Routing
from models.families.population import Expert
from models.learner.base import Learner
from models.learner.copies import Teacher
from models.settings.experts import GateSettings, NoveltySettings

LWF_TEMPERATURE = 2.0


@dataclass
class TrainingProgress:
    """What the steps of a phase change beside weights, as `fit` saves it: steps `done`, held-out losses `measured`, and the
    facts of the `experts`; `changed` is called once these are restored."""

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
    """Whether the mixture is dense: young experts always act, and `top_k_experts` of the mature."""
    return cfg.top_k_experts + sum(e.young for e in experts) >= len(experts)


def plateau(losses: Sequence[float], epochs: int, tolerance: float) -> bool:
    """Whether the last `epochs` losses bring no improvement by the share `tolerance` over the best before them."""
    if len(losses) <= epochs:
        return False
    return min(losses[-epochs:]) >= (1 - tolerance) * min(losses[:-epochs])


def routing_terms(
    routings: Sequence[Routing], experts: Sequence[Expert], learning: Sequence[int], cfg: GateSettings
) -> dict[str, Tensor]:
    """Terms of the loss as they enter it: the z-loss, and among the experts that learn the balance, or the entropy while all
    experts act. Means over layers; zero for what does not apply, nothing without routings or with one expert.

    Young experts beside top-k always act: their share says nothing, so they stay out of the balance."""
    if not routings or len(experts) == 1:
        return {}
    dense = all_act(experts, cfg)
    among = torch.zeros(len(experts), dtype=torch.bool, device=routings[0].gates.device)
    for e in learning:
        among[e] = dense or not experts[e].young
    z = cfg.router_z_loss_coef * balance.over_layers(balance.z_loss, routings)
    terms = {"z": z, "balance": torch.zeros_like(z), "entropy": torch.zeros_like(z)}
    if among.sum() > 1:
        kind = balance.entropy_loss if dense else balance.balance_loss
        weight = cfg.router_entropy_coef if dense else cfg.router_aux_loss_coef
        terms["entropy" if dense else "balance"] = weight * balance.over_layers(kind, routings, [among] * len(routings))
    return terms


def score_distance(before: Tensor, now: Tensor) -> Tensor:
    """How far scores moved, [B, C] and [B, C] -> scalar: T^2 KL(before, now) at temperature T (Hinton et al. 2015, as Learning
    without Forgetting). No gradient reaches `before`."""
    was, is_now = ((scores / LWF_TEMPERATURE).log_softmax(dim=1) for scores in (before, now))
    return F.kl_div(is_now, was.detach(), reduction="batchmean", log_target=True) * LWF_TEMPERATURE**2


def distance(
    learner: Learner, teacher: Teacher, features: Tensor, images: Tensor, first: int, on: Literal["features", "logits"]
) -> Tensor:
    """How far the features [B, D] of images moved from the teacher's, or the scores of the classes below `first` from the
    teacher's scores: a scalar."""
    before = teacher.features(images)
    if on == "features":
        return F.mse_loss(features, before)
    return score_distance(teacher.head(before)[:, :first], learner.head(features)[:, :first])


THRESHOLDS = (-0.2, 0.0, 0.2, 0.4, 0.6, 0.8)  # at which the decisions of a run are replayed after its last task


def policy_of(cfg: NoveltySettings) -> novelty.Policy:
    """The keys that decide on a spawn."""
    return novelty.Policy(
        cfg.novelty_threshold,
        cfg.novelty_threshold_mode,
        cfg.novelty_delta,
        cfg.novelty_min_samples,
        cfg.novelty_cooldown,
        cfg.num_experts if cfg.grow_experts else 1,  # all initial experts are one skill
    )


def facts_of(
    cfg: NoveltySettings,
    tokens: Tensor,
    labels: Tensor,
    stored: Tensor,
    images: Tensor,
    owners: Sequence[tuple[int, int]],
    generator: torch.Generator,
) -> dict[str, Any]:
    """What `novelty.decide` asks of a task with mean tokens [n, D] and labels [n], beside stored embeddings [S, D] of `images`
    [S] each and (task, skill) of each in `owners`: similarities, their interval, a calibrated threshold. Empty without any."""
    facts: dict[str, Any] = {}
    if not owners:
        return facts
    tasks, skills = zip(*owners, strict=True)
    middle = novelty.centre(stored, images)
    known = stored, skills, middle, cfg.novelty_similarity
    facts["similar"] = novelty.similarities(novelty.class_means(tokens, labels)[0], *known).tolist()
    if cfg.novelty_threshold_mode == "calibrated":
        facts["calibrated"] = novelty.calibrate(stored, tasks, middle, cfg.novelty_similarity, cfg.novelty_quantile)
    if cfg.novelty_confidence:
        how: dict[str, Any] = {
            "confidence": cfg.novelty_confidence,
            "resamples": cfg.novelty_resamples,
            "generator": generator,
        }
        facts["bounds"] = novelty.interval(tokens, labels, *known, **how)
    return facts


def sentence(decision: novelty.Decision, policy: novelty.Policy, facts: dict[str, Any]) -> str:
    """A decision in a line, with the thresholds at which it would have been a spawn: any above the interval, unless
    something else stands against it."""
    free = novelty.decide(replace(policy, mode="fixed", threshold=math.inf), **facts)
    would = f"any threshold above {decision.high:.3f}" if free.spawn else f"no threshold ({free.reason})"
    return (
        f"task {decision.task + 1}: similarity {decision.best:.3f} ({decision.low:.3f} to {decision.high:.3f}) against "
        f"threshold {decision.threshold:.3f}: {decision.reason}, expert {decision.skill} "
        f"{'is new' if decision.spawn else 'goes on'}; would spawn at {would}"
    )


def spawned_at(decisions: Sequence[novelty.Decision], policy: novelty.Policy) -> dict[float, list[int]]:
    """The tasks after the first at which each of THRESHOLDS, fixed, would have spawned, all else as in `policy`."""
    fixed = (replace(policy, mode="fixed", threshold=threshold) for threshold in THRESHOLDS)
    return {policy.threshold: novelty.replay(decisions, policy)[1:] for policy in fixed}


def in_words(spawned: dict[float, list[int]]) -> str:
    parts = [f"{t:g}: {', '.join(str(task + 1) for task in tasks) or 'none'}" for t, tasks in spawned.items()]
    return f"a fixed threshold would have spawned at tasks ({'; '.join(parts)})"
