"""Whether a task gets an expert of its own: from prefix features to a decision, told with all it was made on.

The mathematics is backbone/novelty.py's; here it meets the keys and the log.
Shapes: n images, D width, S stored embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from backbone import novelty
from models.expert_settings import NoveltySettings

THRESHOLDS = (-0.2, 0.0, 0.2, 0.4, 0.6, 0.8)  # at which a run's decisions are replayed after its last task


def policy_of(cfg: NoveltySettings) -> novelty.Policy:
    """The keys that decide on a spawn."""
    return novelty.Policy(
        cfg.novelty_threshold,
        cfg.novelty_threshold_mode,
        cfg.novelty_delta,
        cfg.novelty_min_samples,
        cfg.novelty_cooldown,
        cfg.num_experts if cfg.grow_experts else 1,  # all that are there from the start are one skill
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


def told(decision: novelty.Decision, policy: novelty.Policy, facts: dict[str, Any]) -> str:
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
