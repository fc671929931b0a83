"""What follows a selection in moe_parallel: the winner is merged and evaluated, heads are aligned, states are restored."""

import copy
import json

import pytest
import torch

from tests.helpers.contest import logits, rig, tensors
from tests.helpers.nested import Sum, images_of, largest, learn, rows, state
from tests.helpers.toy import toy_stream


@pytest.mark.parametrize("heads", ["shared", "per_expert"])
@pytest.mark.parametrize("reset", ["all", "winner"])
def test_the_winner_is_merged_and_evaluated(heads, reset, contest):
    stream = toy_stream()
    learner = rig(contest(moe_heads=heads, moe_reset=reset, moe_val_ratio=0.3, epochs=8, init_lr=0.1), 2)
    own, take = [], learner._keep_winners_head

    def keep(task):
        own.extend(copy.deepcopy(learner.heads()))
        take(task)

    learner._keep_winners_head = keep
    learner.learn(stream.task(0))
    assert learner.selections()[0]["winner"] == 2 and len(own) == (3 if heads == "per_expert" else 0)
    expected = logits(learner, 2, own[2] if own else None)
    losers = [tensors(learner, k)[4:8] for k in (0, 1)]
    learner.consolidate(stream.task(0))
    with torch.no_grad():
        shown = learner.eval().logits(images_of(stream))
    assert largest(shown - expected[:, :2]) < 1e-12  # concat with alpha 1: slow is now slow + winner, with its own head
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    for nested in learner.backbone.slots.values():
        silent = [not fast(x).any() for fast in nested.fast]
        assert silent == ([True] * 3 if reset == "all" else [False, False, True])
        downs = [fast.down_proj.weight for fast in nested.fast]
        assert not any(torch.equal(a, b) for i, a in enumerate(downs) for b in downs[:i])
    if reset == "winner":
        for k in (0, 1):
            assert all(torch.equal(a, b) for a, b in zip(tensors(learner, k)[4:8], losers[k], strict=True))
    merged = rows(learner, "consolidation")
    assert [(r["layer"], r["expert"], r["merged"]) for r in merged] == [(1, 2, True), (2, 2, True)]


def test_every_head_takes_the_winners_rows(contest):
    stream = toy_stream()
    learner = rig(contest(moe_heads="per_expert", moe_val_ratio=0.3, epochs=8, init_lr=0.1), 1)
    for index in range(2):
        start = [head.weight.detach().clone() for head in learner.heads()]
        assert all(torch.equal(start[0], w) for w in start[1:])
        learn(learner, stream, index + 1, first=index)
        first, total = 2 * index, 2 * index + 2
        for head in learner.heads():
            assert torch.equal(head.weight, learner.head.weight) and torch.equal(head.bias, learner.head.bias)
            assert torch.equal(head.weight[:first], start[0][:first])
            assert not torch.equal(head.weight[first:total], start[0][first:total])


def test_recalibrated_rows_reach_every_head(contest):
    """Otherwise the heads of the others would meet the next selection with rows of another function."""
    settings = {"head_recalibration": True, "nested_lora_consolidation_alpha": 0.5, "moe_heads": "per_expert"}
    learner = contest(**settings)
    task = toy_stream().task(0)
    learner.learn(task)
    before = learner.head.weight.detach().clone()
    learner.consolidate(task)
    assert not torch.equal(before, learner.head.weight)
    assert all(torch.equal(head.weight, learner.head.weight) for head in learner.heads())


@pytest.mark.parametrize("which", ["winner", "sum"])
def test_which_fast_experts_are_evaluated_before_a_merge(which, contest):
    stream = toy_stream()
    learner = rig(contest(moe_eval=which, nested_lora_consolidation_interval=2, moe_val_ratio=0.3, epochs=8), 2)
    learn(learner, stream, 1)
    assert learner.winner == 2 and not any(r["merged"] for r in rows(learner, "consolidation"))
    shown = logits(learner)
    for layer, nested in list(learner.backbone.slots.items()):
        fast = [nested.fast[2]] if which == "winner" else list(nested.fast)
        learner.backbone.slots[layer] = Sum([nested.slow, *fast])
    assert largest(logits(learner) - shown) < 1e-12


def test_learning_and_merging_are_the_same_whatever_is_evaluated(contest):
    """The compression is fitted on what a layer reads with slow and the winner, not with the part that is shown."""
    keys = {"nested_lora_consolidation_rank": 3, "epochs": 4}
    shows = [{}, {"nested_lora_eval": "slow"}, {"nested_lora_eval": "fast"}, {"moe_eval": "sum"}]
    first, *others = [learn(contest(**keys | show), toy_stream(), 2).own_state() for show in shows]
    assert all(torch.equal(v, other[k]) for other in others for k, v in first.items())


def test_in_mode_task_a_merge_leaves_the_experts_of_other_tasks_alone(contest):
    """They are no losers: what they hold is not merged yet."""
    stream = toy_stream()
    learner = contest(moe_mode="task", num_experts=2, nested_lora_consolidation_interval=2, stirred=False)
    learn(learner, stream, 1)
    kept = tensors(learner, 0)[4:8]
    assert kept[2].any()
    learn(learner, stream, 2, first=1)
    assert all(torch.equal(a, b) for a, b in zip(kept, tensors(learner, 0)[4:8], strict=True))
    assert not tensors(learner, 1)[6].any()


# Resume ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"moe_heads": "per_expert", "nested_lora_consolidation_interval": 2},
        {"moe_reset": "winner", "moe_eval": "sum"},
        {"moe_mode": "task", "nested_lora_levels": 3},
    ],
    ids=["not merged yet", "losers go on", "task mode"],
)
def test_a_state_with_a_winner_other_than_0_is_restored_exactly(settings, contest):
    stream = toy_stream()

    def build():
        learner = contest(moe_val_ratio=0.3, epochs=6, **settings)
        return learner if settings.get("moe_mode") == "task" else rig(learner, 1)

    whole = learn(build(), stream, 2)
    assert whole.winner == 1
    structure, saved = json.loads(json.dumps(whole.structure())), state(whole)
    fresh = build()
    fresh.restore(structure)
    fresh.load_own_state(saved)
    assert torch.equal(logits(fresh), logits(whole)) and fresh.winner == 1
    for learner in (whole, fresh):
        learn(learner, stream, 3, first=2)
    assert fresh.selections() == whole.selections()
    assert all(torch.equal(v, fresh.own_state()[k]) for k, v in whole.own_state().items())
