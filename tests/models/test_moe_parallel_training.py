"""Experts that compete in moe_parallel learn as each would alone; what they share gets the mean of their gradients."""

import pytest
import torch

from models.learner import fit
from tests.helpers.contest import tensors
from tests.helpers.nested import largest, learn, rows
from tests.helpers.toy import toy_stream

RATE, MULTIPLIERS = 0.05, (1.0, 0.5, 0.25)


def solo(contest, together, k, **settings):
    """A run of expert k alone, from the same start values."""
    alone = contest(
        num_experts=1, **{"nested_lora_lr_fast": RATE * MULTIPLIERS[k], "nested_lora_lr_slow": RATE} | settings
    )
    alone.head.load_state_dict(together.heads()[min(k, len(together.heads()) - 1)].state_dict())
    for own, theirs in zip(alone.backbone.slots.values(), together.backbone.slots.values(), strict=True):
        own.slow.load_state_dict(theirs.slow.state_dict())
        own.fast[0].load_state_dict(theirs.fast[k].state_dict())
    return alone


def train(learner, task=1):
    """Learns one task as it comes from the stream, without what the selection then does to the heads."""
    learner._select = lambda *_: None
    learner.learn(toy_stream().task(task))
    return learner


@pytest.mark.parametrize("layers", [(1, 2), (0, 2), (2, 2)])
def test_with_slow_fixed_and_heads_of_their_own_every_expert_equals_its_solo_run(layers, contest):
    keys = {"layers": layers, "epochs": 3, "moe_heads": "per_expert", "nested_lora_lr_slow": 0.0}
    keys |= {"weight_decay": 0.05, "moe_val_ratio": 0.2}
    together = contest(**keys)
    alone = [solo(contest, together, k, **keys) for k in range(3)]
    starts = [tensors(together, k) for k in range(3)]
    train(together)
    ends = [tensors(train(learner), 0) for learner in alone]  # 3 epochs of 16 images, momentum 0.9
    for k in range(3):
        for ours, expected in zip(tensors(together, k), ends[k], strict=True):
            assert largest(ours - expected) < 1e-12
        assert largest(starts[k][-2] - ends[k][-2]) > 1e-3 and largest(starts[k][-6] - ends[k][-6]) > 1e-4
        assert largest(ends[k][-2] - ends[k - 1][-2]) > 1e-6  # experts went different ways


def one_step(**other):
    once = {"epochs": 1, "batch_size": 100, "weight_decay": 0.0, "moe_val_ratio": 0.2, "nested_lora_lr_slow": RATE}
    return once | other


def changes(learner, count):
    """By how much one step moves (slow, fast expert, head) of every expert."""
    before = [tensors(learner, k) for k in range(count)]
    train(learner)
    return [[b - a for a, b in zip(before[k], tensors(learner, k), strict=True)] for k in range(count)]


def test_what_is_shared_gets_the_mean_of_the_branches_gradients(contest):
    together = contest(**one_step())
    alone = [changes(solo(contest, together, k, **one_step()), 1)[0] for k in range(3)]
    ours = changes(together, 3)
    layers = 2
    for i, own in enumerate(ours[0]):
        fast = i < 8 * layers and i % 8 >= 4
        if fast:  # an expert of its own: as alone
            assert all(largest(ours[k][i] - alone[k][i]) < 1e-12 for k in range(3))
        else:  # slow, and the shared head
            assert largest(own - sum(a[i] for a in alone) / 3) < 1e-12
    moved = [largest(change) for change in ours[0]]
    assert all(moved[i] > 1e-6 for i in (2, 6, 10, 14, 16))


def test_the_mean_loss_gives_every_expert_a_kth_of_the_gradient(contest):
    by_sum, by_mean = (changes(contest(**one_step(moe_loss=loss)), 3) for loss in ("sum", "mean"))
    for k in range(3):
        for i, (a, b) in enumerate(zip(by_sum[k], by_mean[k], strict=True)):
            factor = 3 if i < 16 and i % 8 >= 4 else 1  # shared parameters have the mean of the branches in both
            assert largest(a - factor * b) < 1e-12
        assert largest(by_sum[k][6]) > 1e-6


def test_rates_and_groups_of_the_experts(contest, monkeypatch):
    seen, real = [], fit.optimizer_for

    def watched(learner, groups, cfg, **how):
        seen.append(list(groups))
        return real(learner, groups, cfg, **how)

    monkeypatch.setattr(fit, "optimizer_for", watched)
    for heads, more in (("shared", {}), ("per_expert", {"fast_lr_multipliers": (3.0, 1.0, 0.2)})):
        learner = contest(moe_heads=heads, nested_lora_lr_fast=0.08, nested_lora_lr_slow=0.01, epochs=1, **more)
        learner.learn(toy_stream().task(0))
        names = ["head"] if heads == "shared" else ["head 0", "head 1", "head 2"]
        fast = [0.24, 0.08, 0.016] if more else [0.08, 0.04, 0.02]
        assert [g.name for g in seen[-1]] == ["slow", "fast 0", "fast 1", "fast 2", *names]
        assert [g.lr for g in seen[-1]] == pytest.approx([0.01, *fast] + [RATE] * len(names))
        every = [id(p) for g in seen[-1] for p in g.parameters]
        assert len(set(every)) == len(every)
        assert set(every) == set(learner.trained) == {id(p) for p in learner.parameters() if p.requires_grad}
        assert learner.planned_parameters()[0] == ("every task", sum(p.numel() for p in learner.trained.values()))


# One expert -----------------------------------------------------------------------------------------------------------


def test_one_expert_needs_no_selection(contest):
    learner = learn(contest(num_experts=1, moe_val_ratio=0.0), toy_stream(), 2)
    assert learner.selections() == [] and learner.winner == 0 and not rows(learner, "held_out")
    alone = learn(contest(num_experts=1, moe_val_ratio=0.2), toy_stream(), 1)
    assert alone.selections()[0]["margin"] is None and len(alone.selections()[0]["accuracies"]) == 1


def test_one_expert_is_the_chain(contest):
    """K = 1 without held-out data learns exactly what nested_lora learns."""
    one = learn(contest(num_experts=1, moe_val_ratio=0.0, stirred=False), toy_stream(), 3)
    chain = learn(contest("nested_lora", stirred=False), toy_stream(), 3)
    assert all(largest(v - one.own_state()[k]) < 1e-12 for k, v in chain.own_state().items())


# Mode task ------------------------------------------------------------------------------------------------------------


def test_in_mode_task_each_task_trains_the_expert_it_belongs_to(contest):
    stream = toy_stream()
    learner = contest(moe_mode="task", num_experts=2, nested_lora_lr_slow=0.0, moe_heads="per_expert", stirred=False)
    assert len(learner.heads()) == 1
    for index, expert in enumerate((0, 1, 0)):
        before = [tensors(learner, k)[4:8] for k in range(2)]
        learn(learner, stream, index + 1, first=index, consolidate=False)
        moved = [
            any(not torch.equal(a, b) for a, b in zip(before[k], tensors(learner, k)[4:8], strict=True)) for k in (0, 1)
        ]
        assert moved == [k == expert for k in range(2)] and learner.winner == expert
        assert learner.selections() == [] and rows(learner, "held_out") == []
        learner.consolidate(stream.task(index))
    assert [r["expert"] for r in rows(learner, "consolidation") if r["layer"] == 1] == [0, 1, 0]
