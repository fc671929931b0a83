"""What a merge of nested adapters keeps and changes: level by level, what starts anew, the head's recalibration."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers.nested import Sum, largest, learn, logits, rows, state
from tests.helpers.toy import toy_stream

EXACT = {  # settings with which a merge of alpha 1 keeps the function
    "concat relu": {"nested_lora_consolidation_method": "concat"},
    "concat none": {"nested_lora_consolidation_method": "concat", "nested_lora_activation": "none"},
    "svd none": {
        "nested_lora_consolidation_method": "svd",
        "nested_lora_activation": "none",
        "nested_lora_consolidation_rank": 8,
    },
    "pam relu": {"nested_lora_consolidation_method": "pam"},
}


@pytest.mark.parametrize("name", EXACT)
def test_after_a_merge_with_alpha_1_slow_alone_is_what_both_were(name, chain):
    stream = toy_stream()
    learner = learn(chain(**EXACT[name]), stream, 2, consolidate=False)  # slow holds the first task already
    before, slow_before = logits(learner, "combined"), logits(learner, "slow")
    assert largest(before - slow_before) > 1e-3
    learner.consolidate(stream.task(1))
    after = logits(learner, "combined")
    assert largest(after - before) < 1e-12 and largest(logits(learner, "slow") - after) < 1e-12
    assert largest(logits(learner, "fast") - after) > 1e-3
    assert all(row["error"] < 1e-12 for row in rows(learner, "consolidation"))


def test_another_alpha_changes_the_function(chain):
    stream = toy_stream()
    learner = learn(chain(nested_lora_consolidation_alpha=0.5), stream, 1, consolidate=False)
    before = logits(learner)
    learner.consolidate(stream.task(0))
    assert largest(logits(learner) - before) > 1e-3
    (one, two) = rows(learner, "consolidation")
    assert one["error"] < 1e-12 and two["alpha"] == 0.5  # it is exact all the same: slow + fast / 2 is what was wanted


def test_an_interval_merges_every_second_task_only(chain):
    stream = toy_stream()
    learner = chain(nested_lora_consolidation_interval=2)
    for index in range(3):
        learn(learner, stream, index + 1, first=index, consolidate=False)
        before = state(learner)
        learner.consolidate(stream.task(index))
        same = all(k in learner.own_state() and torch.equal(v, learner.own_state()[k]) for k, v in before.items())
        assert same == (index != 1)
    assert [(r["task"], r["merged"]) for r in rows(learner, "consolidation") if r["layer"] == 1] == [
        (0, False), (1, True), (2, False),
    ]  # fmt: skip
    assert all(("error" in r) == r["merged"] for r in rows(learner, "consolidation"))


def test_without_consolidation_both_go_on(chain):
    learner = chain(nested_lora_use_consolidation=False)
    before = state(learn(learner, toy_stream(), 1, consolidate=False))
    learner.consolidate(toy_stream().task(0))
    assert all(torch.equal(v, learner.own_state()[k]) for k, v in before.items())
    assert not any(r["merged"] for r in rows(learner, "consolidation"))


@pytest.mark.parametrize("part", ["combined", "slow", "fast"])
def test_the_part_that_is_evaluated(part, chain):
    stream = toy_stream()
    learner = learn(chain(nested_lora_eval=part, nested_lora_consolidation_interval=2), stream, 1)
    ours = logits(learner)
    for layer, nested in list(learner.backbone.slots.items()):
        chosen = {"combined": [nested.slow, nested.fast[0]], "slow": [nested.slow], "fast": [nested.fast[0]]}[part]
        learner.backbone.slots[layer] = Sum(chosen)
    assert largest(ours - logits(learner)) < 1e-12
    assert largest(ours) > 1e-3


def test_training_sees_both_parts_whatever_is_evaluated(chain):
    runs = [learn(chain(nested_lora_eval=part), toy_stream(), 2) for part in ("combined", "slow", "fast")]
    assert all(torch.equal(v, other.own_state()[k]) for other in runs[1:] for k, v in runs[0].own_state().items())


def test_rank_grows_with_concat_up_to_the_cap(chain):
    stream = toy_stream()
    free, capped = chain(), chain(nested_lora_consolidation_rank=5)
    for learner in (free, capped):
        learn(learner, stream, 3)
    assert [r["rank"] for r in rows(free, "consolidation") if r["layer"] == 1][:3] == [4, 6, 8]
    assert [a.ranks() for a in free.backbone.slots.values()] == [[8, 2]] * 2
    assert [a.ranks() for a in capped.backbone.slots.values()] == [[5, 2]] * 2
    text = (Path(free.log.folder) / "run.log").read_text()
    assert "merged by concat with alpha 1, rank 8, largest difference to the wanted function" in text


def test_pam_never_moves_the_shared_down_projection(chain):
    stream = toy_stream()
    learner = chain(nested_lora_consolidation_method="pam", weight_decay=0.1)
    start = [a.slow.down_proj.weight.clone() for a in learner.backbone.slots.values()]
    for index in range(3):
        learn(learner, stream, index + 1, first=index)
        for nested, down in zip(learner.backbone.slots.values(), start, strict=True):
            assert all(torch.equal(a.down_proj.weight, down) for a in nested.adapters())
            assert largest(nested.slow.up_proj.weight) > 0 and not nested.fast[0].up_proj.weight.any()
        moved = [p for a in learner.backbone.slots.values() for x in a.adapters() for p in x.down_proj.parameters()]
        assert not {id(p) for p in moved} & set(learner.trained)


# Starting anew --------------------------------------------------------------------------------------------------------


def gradients(learner, stream, task):
    """Of the fast adapters, before and after one further step of SGD."""
    images, labels, _ = next(iter(stream.task(task).train.batches(20)))
    fast = [p for a in learner.backbone.slots.values() for p in a.fast[0].parameters()]
    for p in fast:
        p.requires_grad_(True)
    found = []
    for _ in range(2):
        loss = nn.functional.cross_entropy(learner.head(learner.backbone(images)), labels)
        found.append(torch.autograd.grad(loss, fast))
        with torch.no_grad():
            for p, g in zip(fast, found[-1], strict=True):
                p -= 0.1 * g
    return [[bool(g.any()) for g in step] for step in found]


def test_a_fresh_start_is_silent_and_every_factor_learns_within_a_step(chain):
    stream = toy_stream()
    learner = learn(chain(nested_lora_rank=8), stream, 1)
    inputs = torch.randn(2, 5, 16, dtype=torch.float64)
    assert all(not a.fast[0](inputs).any() for a in learner.backbone.slots.values())
    first, second = gradients(learner, stream, 1)  # per layer: down weight and bias, up weight and bias
    assert first == [False, False, True, True] * 2 and second == [True] * 8


def test_a_zero_start_learns_a_constant_only(chain):
    stream = toy_stream()
    learner = learn(chain(nested_lora_reset="zero"), stream, 1)
    first, second = gradients(learner, stream, 1)
    assert first == second == [False, False, False, True] * 2
    learn(learner, stream, 2, first=1, consolidate=False)
    for nested in learner.backbone.slots.values():
        down, up = nested.fast[0].down_proj, nested.fast[0].up_proj
        assert not any(p.any() for p in (down.weight, down.bias, up.weight)) and up.bias.any()


# Levels ---------------------------------------------------------------------------------------------------------------


def test_three_levels_hand_their_content_down(chain):
    """Fast goes into the middle at every merge, the middle into slow, slowest pair first: nothing falls two levels at once."""
    stream = toy_stream()
    learner = learn(chain(nested_lora_levels=3, nested_lora_lr_slow=0.0), stream, 1, consolidate=False)
    nested, x = learner.backbone.slots["1"], torch.randn(2, 5, 16, dtype=torch.float64)
    slow, middle, fast = (adapter(x).detach() for adapter in nested.adapters())
    assert not slow.any() and middle.any() and fast.any()  # slow is frozen here and empty
    combined = logits(learner)
    learner.consolidate(stream.task(0))
    assert largest(nested.slow(x) - middle) < 1e-12
    assert largest(nested.middle[0](x) - fast) < 1e-12
    assert not nested.fast[0](x).any()
    assert largest(logits(learner) - combined) < 1e-12
    assert [(r["level"], r["merged"]) for r in rows(learner, "consolidation") if r["layer"] == 1] == [
        (1, True), (2, True),
    ]  # fmt: skip
    assert [a.ranks() for a in learner.backbone.slots.values()] == [[4, 4, 2]] * 2


def test_three_levels_with_an_interval_of_two(chain):
    """Fast is merged every 2 tasks, the middle level every 4."""
    stream = toy_stream(init_cls=1, increment=1)
    learner = learn(chain(nested_lora_levels=3, nested_lora_consolidation_interval=2, epochs=1), stream, 4)
    found = {(r["task"], r["level"]): r["merged"] for r in rows(learner, "consolidation") if r["layer"] == 1}
    assert [found[t, 2] for t in range(4)] == [False, True, False, True]
    assert [found[t, 1] for t in range(4)] == [False, False, False, True]


# Recalibration --------------------------------------------------------------------------------------------------------


def test_recalibration_lowers_the_loss_by_the_tasks_own_rows_alone(chain):
    def run(flag):
        stream = toy_stream()
        learner = chain(nested_lora_consolidation_alpha=0.3, head_recalibration=flag, weight_decay=0.1, epochs=5)
        learn(learner, stream, 2, consolidate=False)
        trained = learner.head.weight.detach().clone()
        learner.consolidate(stream.task(1))
        with torch.no_grad():
            features, labels = learner.features_of(stream.task(1).train)
            loss = nn.functional.cross_entropy(learner.head(features)[:, 2:4], labels - 2).item()
        same = [torch.equal(a, b) for a, b in zip(trained, learner.head.weight, strict=True)]
        return loss, same, learner

    (plain, kept, without), (refitted, changed, learner) = run(False), run(True)
    assert refitted < plain - 1e-3
    assert kept == [True] * 6 and changed == [True, True, False, False, True, True]
    own, other = learner.own_state(), without.own_state()
    assert [k for k in own if not torch.equal(own[k], other[k])] == ["head.weight", "head.bias"]
    assert [r["phase"] for r in rows(learner, "epoch")][-10:] == ["func"] * 5 + ["recalibrate"] * 5
