"""Learners that several files of this folder test."""

import pytest
import torch
from torch import nn

from models.learner import fit
from tests.helpers.toy import toy_backbone


@pytest.fixture
def chain(toy_learner):
    """A nested_lora learner in float64 on a toy backbone that pools all tokens: its features tell the classes apart."""

    def build(**settings):
        backbone = toy_backbone(class_token=False, global_pool="avg").double()
        return toy_learner("nested_lora", backbone=backbone, **settings)

    return build


@pytest.fixture
def contest(toy_learner):
    """A moe_parallel learner in float64 with K = 3; its adapters are away from their start values."""

    def build(method="moe_parallel", *, layers=(1, 2), stirred=True, **settings):
        backbone = toy_backbone(class_token=False, global_pool="avg").double()
        span = {"adapt_start_layer": layers[0], "adapt_end_layer": layers[1]}
        learner = toy_learner(method, backbone=backbone, **span | settings)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for adapter in (a for nested in learner.backbone.slots.values() for a in nested.adapters() if stirred):
                nn.init.normal_(adapter.up_proj.weight, std=0.1, generator=generator)
        return learner

    return build


@pytest.fixture
def dylora_moe(toy_learner):
    """A dylora_moe learner with room for three experts, a fixed threshold of novelty and no freezing."""

    def make(**keys):
        fixed = {"num_experts": 3, "freeze_on_convergence": False, "novelty_threshold_mode": "fixed"}
        return toy_learner("dylora_moe", **(fixed | keys))

    return make


@pytest.fixture
def fits(monkeypatch):
    """The groups and the optimizer of every phase, with the optimizer's state as it was at its start."""
    seen, real = [], fit.optimizer_for

    def watched(learner, groups, cfg, **how):
        optimizer, scheduler = real(learner, groups, cfg, **how)
        seen.append((list(groups), optimizer, dict(optimizer.state)))
        return optimizer, scheduler

    monkeypatch.setattr(fit, "optimizer_for", watched)
    return seen
