"""SLCA: rates, what the alignment is trained on and leaves behind, and the backbone as part of the learner's state."""

import pytest
import torch
from torch.nn import functional as F

import models
from backbone import catalogue
from backbone.heads.alignment import normalised
from tests.helpers.toy import toy_backbone, toy_stream
from utils.config import resolve
from utils.run.journal import Journal


def learned(learner, stream, tasks):
    for index in range(tasks):
        task = stream.task(index)
        learner.learn(task)
        learner.consolidate(task)
    return learner.eval()


def test_logits_over_the_mean_norm_of_their_tasks():
    scores = torch.tensor([[3.0, 4.0, 0.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    made = normalised(scores, [2, 3])
    torch.testing.assert_close(made, scores / 3, atol=1e-6, rtol=0)  # norms 5 and 1
    assert torch.autograd.gradcheck(lambda s: F.cross_entropy(normalised(s, [2, 3]), torch.tensor([3])), scores)


def test_the_backbone_has_its_own_rate_and_zero_freezes_it(toy_learner):
    stream, moves = toy_stream(), {}
    for scale in (0.0, 0.001, 0.002):
        backbone = toy_backbone().double()
        start = backbone.vit.blocks[0].mlp.fc1.weight.clone()
        keys = {"bcb_lrscale": scale, "weight_decay": 0.0, "epochs": 1, "batch_size": 500}  # one step
        learned(toy_learner("slca", backbone=backbone, **keys), stream, 1)
        moves[scale] = backbone.vit.blocks[0].mlp.fc1.weight - start
    assert not moves[0.0].any() and moves[0.001].any()
    torch.testing.assert_close(moves[0.002], 2 * moves[0.001])


def test_the_next_task_starts_from_the_head_before_the_alignment(toy_learner):
    learner, stream = toy_learner("slca", ca_epochs=2), toy_stream()
    learned(learner, stream, 1)
    assert torch.equal(learner._rows(), learner.unaligned)  # the first task has no alignment
    learned_rows = learner.unaligned[:2].clone()
    learned(learner, stream, 2)
    assert not torch.equal(learner._rows()[:4], learner.unaligned[:4])
    assert torch.equal(learner.unaligned[:2, -1], learned_rows[:, -1]) is False  # the loop above began anew
    kept = learner.unaligned[:4].clone()
    learner.learn(stream.task(2))
    assert torch.equal(learner.unaligned[:4], kept) and not torch.equal(learner._rows()[:4], kept)


@pytest.mark.parametrize(
    ("by_size", "expected"), [(False, [0.95, 0.95, 0.95, 0.95, 1, 1]), (True, [0.95, 0.95, 1, 1, 1.05, 1.05])]
)
def test_old_means_shrink_by_the_task_a_class_came_with(by_size, expected, toy_learner):
    learner, stream = toy_learner("slca", epochs=1, ca_task_by_size=by_size), toy_stream(init_cls=4, increment=2)
    learned(learner, stream, 2)
    torch.testing.assert_close(learner._shrinking(stream.task(1)), torch.tensor(expected))


def test_draws_depend_on_seed_task_and_epoch(toy_learner):
    learner = toy_learner("slca", ca_samples=3)
    learner.seen = 4
    first, second = toy_stream(seed=1), toy_stream(seed=2)
    one, again = (learner._draw(first.task(1), 0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert one[0].shape == (4, 3, 16) and sorted(one[1].tolist()) == list(range(12))
    for other in (learner._draw(first.task(1), 1), learner._draw(second.task(1), 0), learner._draw(first.task(2), 0)):
        assert not torch.equal(one[0], other[0])


def test_drawn_features_are_no_training_images(toy_learner):
    learner, stream = learned(toy_learner("slca", epochs=2, ca_epochs=3), toy_stream(), 1), toy_stream()
    learner.begin_task()
    learner.learn(stream.task(1))
    assert learner.images_shown == 2 * len(stream.task(1).train)


@pytest.mark.parametrize(("method", "name"), [("slca", "gaussians."), ("inflora", "memories.")])
def test_what_no_phase_touches_is_not_saved_with_every_epoch(method, name, toy_learner, monkeypatch):
    learner, saved = learned(toy_learner(method, epochs=1), toy_stream(), 1), []
    real = Journal.save

    def watched(self, phase, state, **how):
        saved.append(state()["tensors"])
        real(self, phase, state, **how)

    monkeypatch.setattr(Journal, "save", watched)
    learner.begin_task()
    learner.learn(toy_stream().task(1))
    assert any(key.startswith(name) for key in learner.own_state())
    assert saved and all(saved) and not any(key.startswith((name, "statistics.")) for found in saved for key in found)


def test_statistics_of_old_classes_are_never_renewed(toy_learner):
    learner, stream = learned(toy_learner("slca"), toy_stream(), 1), toy_stream()
    kept = learner.gaussians.means[:2].clone()
    learner.learn(stream.task(1))
    assert torch.equal(learner.gaussians.means[:2], kept) and learner.gaussians.means[2:4].any()
    assert not learner.gaussians.means[4:].any()


def test_with_class_statistics_there_is_no_alignment(toy_learner):
    learner = learned(toy_learner("slca", head="ncm"), toy_stream(), 2)
    assert torch.equal(learner._rows(), learner.unaligned)


@pytest.mark.parametrize(
    ("method", "keys", "acting"),
    [
        ("slca", {"model_postfix": "20e", "lrate": 0.01, "epochs": 20, "ca_epochs": 3, "milestones": [18]}, {"rate": 0.01}),
        (
            "sd_lora",
            {"scheduler": "cosine", "min_lr": 0.005, "tuned_epoch": 20, "filepath": "./CF100/", "init_epoch": 20,
             "init_lr": 0.008, "init_milestones": [60, 120, 170], "init_lr_decay": 0.1, "init_weight_decay": 0.0005,
             "lrate": 0.008, "milestones": [40, 70], "lrate_decay": 0},
            {"milestones": (40, 70), "lrate_decay": 0.0},
        ),
        (
            "inflora",
            {"net_type": "sip", "embd_dim": 768, "num_heads": 12, "total_sessions": 10, "EPSILON": 1e-8, "init_epoch": 20,
             "init_lr": 0.0005, "init_lr_decay": 0.1, "init_weight_decay": 0.0, "lrate": 0.0005, "lrate_decay": 0.1,
             "rank": 10, "lamb": 0.95, "lame": 1.0, "num_workers": 16},
            {"rank": 10, "optimizer": "adam"},
        ),
    ],
)  # fmt: skip
def test_files_of_the_originals_load(method, keys, acting):
    common = {
        "prefix": "reproduce",
        "dataset": "cifar224",
        "memory_size": 0,
        "memory_per_class": 0,
        "fixed_memory": False,
    }
    common |= {"shuffle": True, "init_cls": 10, "increment": 10, "device": ["0"], "seed": [1993], "weight_decay": 5e-4}
    names = {"methods": models.available(), "backbones": catalogue.names, "settings_of": models.settings_of}
    found = resolve.resolve(common | keys | {"model_name": method, "batch_size": 64}, source="x.json", **names)
    assert {key: getattr(found.settings, key) for key in acting} == acting
