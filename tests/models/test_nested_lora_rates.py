"""Who trains at which rate and interval in nested_lora: groups of parameters, momentum, skipped gradients, rows of the head."""

import pytest
import torch
from torch import nn

from tests.helpers.nested import largest, learn
from tests.helpers.toy import toy_stream


def groups_of(learner, fits, task=0):
    learn(learner, toy_stream(), task + 1, first=task, consolidate=False)
    return {g.name: g for g in fits[-1][0]}


@pytest.mark.parametrize(
    ("settings", "rates", "intervals"),
    [
        ({"nested_lora_levels": 1}, [0.01], [4]),
        ({"nested_lora_levels": 2}, [0.01, 0.09], [4, 1]),
        ({"nested_lora_levels": 3}, [0.01, 0.03, 0.09], [4, 2, 1]),  # geometric
        ({"nested_lora_levels": 3, "nested_lora_lr_slow": 0.0}, [0.0, 0.045, 0.09], [4, 2, 1]),  # 0 has no geometry
        (
            {"nested_lora_levels": 4, "nested_lora_level_lrs": (0.5, 0.6), "nested_lora_level_intervals": (3, 7)},
            [0.01, 0.5, 0.6, 0.09],
            [4, 3, 7, 1],
        ),
    ],
)
def test_rates_and_intervals_of_the_levels(settings, rates, intervals, chain, fits):
    keys = {
        "nested_lora_lr_slow": 0.01,
        "nested_lora_lr_fast": 0.09,
        "nested_lora_update_interval_slow": 4,
        "epochs": 1,
    }
    groups = groups_of(chain(**keys | settings), fits)
    head = groups.pop("head")
    assert (head.lr, head.interval) == (0.05, 1)
    assert [g.lr for g in groups.values()] == pytest.approx(rates)
    assert [g.interval for g in groups.values()] == intervals
    names = ["slow", *(f"level {i}" for i in range(1, len(rates) - 1)), "fast"]
    assert list(groups) == names[: len(rates)]


@pytest.mark.parametrize("method", ["concat", "pam"])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_every_trained_parameter_is_in_exactly_one_group(levels, method, chain, fits):
    learner = chain(
        nested_lora_levels=levels, head_lr=0.3, nested_lora_lr_slow=0.01, nested_lora_consolidation_method=method
    )
    for task in range(2):
        groups = groups_of(learner, fits, task)
        every = [p for g in groups.values() for p in g.parameters]
        assert len({id(p) for p in every}) == len(every)
        assert (
            {id(p) for p in every} == {id(p) for p in learner.parameters() if p.requires_grad} == set(learner.trained)
        )
        assert groups["head"].lr == 0.3 and {id(p) for p in groups["head"].parameters} == {
            id(p) for p in learner.head.parameters()
        }
        slow = [p for a in learner.backbone.slots.values() for p in a.trainable(a.slow)]
        assert groups["slow"].lr == 0.01 and [id(p) for p in groups["slow"].parameters] == [id(p) for p in slow]
        learner.consolidate(toy_stream().task(task))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_slow_rate_of_0_or_an_interval_never_reached_keeps_slow_to_the_bit(optimizer, chain):
    def moved(**settings):
        learner = chain(optimizer=optimizer, weight_decay=0.1, **settings)
        with torch.no_grad():
            for nested in learner.backbone.slots.values():
                nn.init.normal_(nested.slow.up_proj.weight)
        before = [p.clone() for a in learner.backbone.slots.values() for p in a.slow.parameters()]
        learn(learner, toy_stream(), 1, consolidate=False)
        after = [p for a in learner.backbone.slots.values() for p in a.slow.parameters()]
        before, after = before[::2], after[::2]  # the weights: biases of dead units have no reason to move
        return [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]

    assert moved() == [True] * 4
    assert moved(nested_lora_lr_slow=0.0) == [False] * 4
    assert moved(nested_lora_update_interval_slow=7) == [False] * 4  # 2 epochs of 3 steps
    assert moved(nested_lora_update_interval_slow=6) == [True] * 4


def test_gradients_of_skipped_steps_are_dropped_or_their_mean_is_taken_by_key(chain, fits):
    ends = []
    for skipped in ("drop", "accumulate"):
        learner = chain(nested_lora_skipped_gradients=skipped, nested_lora_update_interval_slow=3, nested_lora_levels=3)
        groups = groups_of(learner, fits)
        assert [(g.skipped, g.interval) for g in groups.values()][:3] == [(skipped, 3), (skipped, 2), ("drop", 1)]
        ends.append(learner.backbone.slots["2"].slow.up_proj.bias.detach().clone())
    assert largest(ends[0] - ends[1]) > 1e-6


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_no_momentum_survives_what_it_was_gathered_for(optimizer, chain, fits):
    stream = toy_stream()
    learner = learn(chain(optimizer=optimizer), stream, 1)
    old = {id(p) for group in fits[0][1].param_groups for p in group["params"]}
    assert fits[0][1].state and not fits[0][2]
    learn(learner, stream, 2, first=1, consolidate=False)
    (groups, second, at_start) = fits[1]
    assert at_start == {} and second is not fits[0][1]
    held = {id(p) for group in second.param_groups for p in group["params"]}
    adapters = {id(p) for a in learner.backbone.slots.values() for p in a.parameters()}
    assert adapters <= held and not adapters & old  # both are new objects after the merge
    assert {g.name for g in groups} == {"slow", "fast", "head"}


def test_head_rows_of_other_tasks_stay_unless_asked_for(chain):
    def moved(flag):
        learner = learn(chain(weight_decay=0.1, decay_other_rows=flag), toy_stream(), 1)
        before = learner.head.weight.detach().clone()
        learn(learner, toy_stream(), 2, first=1)
        return [not torch.equal(a, b) for a, b in zip(before, learner.head.weight, strict=True)]

    assert moved(False) == [False, False, True, True, False, False] and moved(True) == [True] * 6


def test_planned_parameters_count_what_is_trained(chain):
    learner = chain(nested_lora_lr_slow=0.0)
    lines = learner.planned_parameters()
    learn(learner, toy_stream(), 1, consolidate=False)
    assert lines[0] == ("every task", sum(p.numel() for p in learner.trained.values()))
    assert "  of these fast, rate 0.05" in dict(lines) and dict(lines)["  slow is frozen: its rate is 0"] == 0
