"""Parameter groups: rates of their own, steps that are really skipped, gradients that are dropped or accumulated."""

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from models.learner.fit import fit
from models.learner.groups import Group, Recipe, optimizer_for
from models.learner.losses import Loss
from tests.helpers.toy import toy_stream
from utils.run.journal import Journal


class Line(nn.Module):
    """As much of a learner as `fit` needs: two weights, y = (slow + fast) x."""

    unchanged_while_training, says_what_it_trains = ("statistics.",), True

    def __init__(self, log, **cfg):
        super().__init__()
        self.slow, self.fast = nn.Parameter(torch.ones(3).double()), nn.Parameter(torch.ones(3).double())
        self.trained, self.images_shown, self.log, self.journal = {}, 0, log, Journal()
        self.cfg = SimpleNamespace(**({"optimizer": "sgd", "weight_decay": 0.1, "min_lr": 0.0, "batch_size": 4} | cfg))
        self.backbone, self.device = SimpleNamespace(vit=nn.Linear(1, 1)), torch.device("cpu")
        self.seen_slow: list[torch.Tensor] = []

    def step(self, x, labels):
        return Loss(((self.slow + self.fast) * x.flatten(1)[:, :3].mean(0).double()).sum() ** 2)

    def _batches(self, data, size, *, shard, **how):
        return data.batches(size, **how)

    def watch(self):
        self.seen_slow.append(self.slow.detach().clone())


def trained(log, groups_of, epochs=2, **cfg):
    learner = Line(log, **cfg)
    task = toy_stream(init_cls=6).task(0)  # 60 images: 15 steps of 4 an epoch
    how = {"phase": "func", "epochs": epochs, "after_step": learner.watch}
    learner.losses = fit(learner, task, learner.step, groups_of(learner), **how).losses
    return learner


def test_rows_outside_the_span_stay_to_the_bit_although_decay_would_move_them(log):
    learner = Line(log)
    task = toy_stream(init_cls=6).task(0)
    fit(
        learner, task, learner.step, [learner.fast], phase="func", epochs=1, lr=0.01, rows=[(learner.fast, range(1, 2))]
    )
    assert learner.fast[[0, 2]].tolist() == [1.0, 1.0] and learner.fast[1] < 1


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_skipped_steps_leave_the_slow_weights_bit_identical(optimizer, log):
    """Momentum and weight decay are on: with a gradient of zero instead of None either would move them."""

    def groups(learner):
        return [Group("slow", [learner.slow], 0.01, interval=5), Group("fast", [learner.fast], 0.01)]

    learner = trained(log, groups, optimizer=optimizer)
    steps = [torch.ones(3).double(), *learner.seen_slow]
    moved = [not torch.equal(a, b) for a, b in pairwise(steps)]
    assert moved == [n % 5 == 0 for n in range(1, 31)]


def test_zero_gradients_would_have_moved_them():
    """The fault this guards against, on torch's own optimizer: momentum 0.9 goes on after one gradient of 1."""
    w = nn.Parameter(torch.zeros(1).double())
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    positions = []
    for gradient in (1.0, 0.0, 0.0):
        w.grad = torch.full((1,), gradient).double()
        optimizer.step()
        positions.append(w.item())
    assert positions == pytest.approx([-0.1, -0.19, -0.271])


def test_dropped_and_accumulated_gradients_against_hand_worked_steps():
    for skipped, expected in (("drop", 6.0), ("accumulate", (1.0 + 2.0 + 6.0) / 3)):
        w = nn.Parameter(torch.zeros(1))
        group = Group("slow", [w], 0.1, interval=3, skipped=skipped)
        for _ in range(2):  # the second round must not remember the first
            for number, gradient in enumerate((1.0, 2.0, 6.0), start=1):
                w.grad = torch.full((1,), gradient)
                group.before_step(number)
                assert (w.grad is None) == (number < 3)
            assert w.grad.item() == pytest.approx(expected)


def test_each_group_has_its_rate_and_a_rate_of_zero_freezes(log):
    def groups(learner):
        return [Group("slow", [learner.slow], 0.0), Group("fast", [learner.fast], 0.01)]

    learner = trained(log, groups, min_lr=0.001)
    assert torch.equal(learner.slow, torch.ones(3).double()) and not torch.equal(learner.fast, torch.ones(3).double())
    assert set(learner.trained) == {id(learner.fast)}
    optimizer, scheduler = optimizer_for(
        learner, [Group("a", [learner.slow], 0.2), Group("b", [learner.fast], 0.02)], learner.cfg, epochs=2
    )
    assert [g["lr"] for g in optimizer.param_groups] == [0.2, 0.02]
    optimizer.step()
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([(0.2 + 0.001) / 2, (0.02 + 0.001) / 2])


def test_divided_gradients():
    w = nn.Parameter(torch.zeros(1))
    w.grad = torch.full((1,), 6.0)
    Group("slow", [w], 0.1, divide=4).before_step(1)
    assert w.grad.item() == 1.5


def test_an_empty_group_is_an_error(log):
    learner = Line(log)
    with pytest.raises(ValueError, match=r"parameter group 'fast' is empty, its learning rate 0.5 has no effect"):
        optimizer_for(learner, [Group("fast", [], 0.5)], learner.cfg, epochs=1)


def test_groups_are_logged_with_rate_and_size(log):
    trained(log, lambda x: [Group("slow", [x.slow], 0.01, interval=5), Group("fast", [x.fast], 0.1)], epochs=1)
    rows = [json.loads(line) for line in (log.folder / "metrics.jsonl").read_text().splitlines()]
    (told,) = [r["groups"] for r in rows if r["kind"] == "groups"]
    assert told == [
        {"group": "slow", "lr": 0.01, "parameters": 3, "interval": 5},
        {"group": "fast", "lr": 0.1, "parameters": 3, "interval": 1},
    ]
    (epoch,) = [r for r in rows if r["kind"] == "epoch"]
    assert epoch["lr"] == [0.01, 0.1]
    text = (log.folder / "run.log").read_text()
    assert "slow 3 at rate 0.01 every 5 steps, fast 3 at rate 0.1" in text


def test_a_gradient_that_is_not_finite_stops_before_the_step_and_names_what_was_saved_last(log):
    learner = Line(log)
    learner.journal.last = "task 1, phase func, epoch 1"
    seen = []

    def step(x, labels):
        """From the third step on the loss is finite and the derivative of the root at 0 is not."""
        seen.append(len(labels))
        if len(seen) < 3:
            return learner.step(x, labels)
        return Loss((learner.fast * 0).sum().sqrt() + learner.slow.sum())

    task = toy_stream(init_cls=6).task(0)
    groups = [Group("slow", [learner.slow], 0.01), Group("fast", [learner.fast], 0.1)]
    with pytest.raises(ValueError) as error:
        fit(learner, task, step, groups, phase="func", epochs=1, after_step=learner.watch)
    assert "the gradient of fast is not finite at task 1, phase func, epoch 1, step 3; nothing was updated" in str(
        error.value
    )
    assert "what was saved last is task 1, phase func, epoch 1. Lower the learning rate (0.01, 0.1)" in str(error.value)
    assert len(learner.seen_slow) == 2 and torch.equal(learner.slow.detach(), learner.seen_slow[-1])


def test_a_recipe_replaces_optimizer_decay_and_schedule(toy_learner):
    learner = toy_learner("finetune", weight_decay=0.3)
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    for name, kind in kinds.items():
        group = [Group("head", list(learner.head.parameters()), 0.5)]
        recipe = Recipe(name, 0.125, lambda epoch: (1.0, 0.5, 0.25)[epoch])
        optimizer, scheduler = optimizer_for(learner, group, learner.cfg, epochs=2, recipe=recipe)
        assert type(optimizer) is kind and optimizer.param_groups[0]["weight_decay"] == 0.125
        rates = []
        for _ in range(2):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert rates == [0.5, 0.25]


@pytest.mark.parametrize("returned", [(torch.tensor(1.0), None), Loss(torch.ones(2)), None])
def test_a_step_that_returns_no_loss_is_told_what_was_expected(returned, toy_learner):
    learner, task = toy_learner("finetune"), toy_stream().task(0)
    with pytest.raises(TypeError, match=r"at task 1, phase func, epoch 1, step 1: expected is Loss\(total"):
        fit(learner, task, lambda *_: returned, learner.trainable(), phase="func", epochs=1, lr=0.1)


def test_terms_are_columns_and_what_a_step_remembers_comes_back(toy_learner):
    learner, task = toy_learner("finetune"), toy_stream().task(0)  # 20 images: batches of 8, 8 and 4

    def step(images, labels):
        total = learner.head(learner.backbone(images)).square().mean()
        return Loss(total, None, {"half": total / 2}, {"labels": labels})

    fitted = fit(learner, task, step, learner.trainable(), phase="func", epochs=2, lr=0.1)
    assert [len(labels) for labels in fitted.remembered["labels"]] == [8, 8, 4] * 2
    rows = [json.loads(line) for line in (learner.log.folder / "metrics.jsonl").read_text().splitlines()]
    epochs = [row for row in rows if row["kind"] == "epoch"]
    assert [row["half"] for row in epochs] == pytest.approx([row["loss"] / 2 for row in epochs], rel=1e-6)
