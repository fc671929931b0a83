"""Fine-tuning of the whole ViT: what it trains, with which recipe in the first task and later, and that it is saved."""

import pytest
import torch

from models.learner import fit as fitting
from tests.helpers.methods import run
from tests.helpers.toy import toy_backbone, toy_stream

KEYS = {
    "trainable": "backbone", "mask_old_classes": True, "init_epoch": 1, "epochs": 2, "init_lr": 0.01, "lrate": 0.02,
    "init_weight_decay": 0.0, "weight_decay": 0.1, "init_milestones": (5,), "milestones": (1,), "lrate_decay": 0.5,
    "init_lr_decay": 0.25,
}  # fmt: skip


@pytest.fixture
def optimizers(monkeypatch):
    """(epochs, weight decay, momentum, rates of the epochs 0 to 5, trained numbers) of each phase."""
    seen, real = [], fitting.optimizer_for

    def watched(learner, groups, cfg, **how):
        optimizer, schedule = real(learner, groups, cfg, **how)
        (group,) = optimizer.param_groups
        rates = [group["initial_lr"] * schedule.lr_lambdas[0](epoch) for epoch in range(6)]
        size = sum(p.numel() for p in group["params"])
        seen.append((how["epochs"], group["weight_decay"], group["momentum"], rates, size))
        return optimizer, schedule

    monkeypatch.setattr(fitting, "optimizer_for", watched)
    return seen


def test_the_whole_vit_is_trained_by_the_recipe_of_its_task(toy_learner, optimizers):
    backbone = toy_backbone()
    whole = sum(p.numel() for p in backbone.vit.parameters()) + 6 * 17  # and a head of six classes
    before = {k: v.clone() for k, v in backbone.vit.state_dict().items()}
    learner = run(toy_learner("finetune", backbone=backbone, **KEYS), toy_stream())
    assert learner.planned_parameters() == [("every task", whole)]
    first, *later = optimizers
    assert first == (1, 0.0, 0.9, pytest.approx([0.01] * 5 + [0.0025]), whole)
    assert later == [(2, 0.1, 0.9, pytest.approx([0.02] + [0.01] * 5), whole)] * 2
    moved = {k for k, v in backbone.vit.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == before.keys() and not len(learner.backbone.slots)
    saved = {k: v.clone() for k, v in learner.own_state().items()}
    assert {f"backbone.vit.{k}" for k in before} <= saved.keys()
    fresh = toy_learner("finetune", backbone=toy_backbone(seed=1), **KEYS)
    fresh.restore(learner.structure())
    fresh.load_own_state(saved)
    fresh.eval()
    images = torch.rand(3, 3, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(fresh.logits(images), learner.logits(images), rtol=0, atol=1e-6)


def test_the_first_tasks_recipe_is_that_of_all_where_the_file_is_silent(toy_learner, optimizers):
    run(toy_learner("finetune", epochs=2, init_lr=0.03, milestones=(1,), weight_decay=0.2), toy_stream(), tasks=2)
    assert optimizers[0] == optimizers[1] and optimizers[0][:2] == (2, 0.2)
