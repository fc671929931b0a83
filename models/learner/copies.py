"""Copies of a learner: as it is now, to teach its later self; or of its shapes alone, to count what later tasks train."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class Teacher:
    """A learner as it was when this was built, frozen, over the same frozen ViT: only what methods add exists twice.

    It is not a Module, so a learner may hold it in an attribute and its checkpoint stays as it is. No gradient is taken."""

    def __init__(self, learner: Any):
        of_heads = (learner.statistics, learner.compared, learner.unrepaired)
        memo: dict[int, Any] = {id(head): head for head in of_heads}
        if not learner.trains_backbone:
            memo[id(learner.backbone)] = learner.backbone.frozen_copy()
        self._learner = _copied(learner, memo).requires_grad_(False).eval()

    @torch.no_grad()
    def features(self, images: Any) -> Tensor:
        """Features [B, D] of images [B, 3, H, W] or of their activations."""
        return self._learner.features(images)

    @torch.no_grad()
    def head(self, features: Tensor) -> Tensor:
        """The linear head's scores [B, C] of features [B, D], over all classes."""
        return self._learner.head(features)


def sketch(learner: Any) -> Any:
    """A copy of a learner that has shapes and no values, so it can grow and the learner stays as it is."""
    memo: dict[int, Any] = {id(b): b.detach().to("meta") for b in learner.buffers()}
    for p in learner.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to("meta"), p.requires_grad)
    return _copied(learner, memo)


def _copied(learner: Any, memo: dict[int, Any]) -> Any:
    shared = (learner.cfg, learner.log, learner.init, learner.journal)
    memo |= {id(thing): thing for thing in shared}
    # parameters trained so far and caches are left out
    apart = {
        name: vars(learner)[name]
        for name in ("trained", "_cache", "_queries", "_spaces", "_before")
        if name in vars(learner)
    }
    memo |= {id(thing): type(thing)() if isinstance(thing, dict) else None for thing in apart.values()}
    return copy.deepcopy(learner, memo)
