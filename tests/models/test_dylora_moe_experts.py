"""The life of an expert of dylora_moe: its rank grows, it freezes, it is merged into another, it is restored."""

import json

import pytest
import torch

from backbone.experts import routed
from models.families.experts import plateau
from tests.helpers.dylora import ALWAYS, NEVER, experts_of, teach
from tests.helpers.nested import images_of, rows
from tests.helpers.toy import toy_stream

# Rank -----------------------------------------------------------------------------------------------------------------


def test_ranks_of_linear_experts_grow_with_the_function_kept(dylora_moe):
    stream = toy_stream()
    learner = teach(dylora_moe(expert_rank_max=7, ffn_num=2, lora_target=("qkv", "fc1")), 1, stream=stream)
    with torch.no_grad():
        before, rank = learner.features(images_of(stream)), learner.population.ranks()[0][0]
        learner.population.grow_rank(3, "here", learner.initialise)
        assert learner.population.ranks() == [[rank + 3]] * 2
        torch.testing.assert_close(learner.features(images_of(stream)), before, rtol=0, atol=1e-6)
    expert = learner.backbone.slots["1"].adapters[0]
    for target in ("qkv", "fc1"):
        assert expert[target].up[:, rank:].abs().max() == 0 and (expert[target].down[rank:].abs().amax(dim=1) > 0).all()


def test_rank_growth_keeps_the_function_and_the_parameters_are_counted_once(dylora_moe):
    stream = toy_stream()
    learner = teach(dylora_moe(expert_rank_max=7, ffn_num=2), 1, stream=stream)
    with torch.no_grad():
        before, rank = learner.features(images_of(stream)), learner.population.ranks()[0][0]
        learner.population.grow_rank(3, "here", learner.initialise)
        assert learner.population.ranks()[0][0] == rank + 3
        torch.testing.assert_close(learner.features(images_of(stream)), before, rtol=0, atol=1e-6)
    slot = routed.routed_layers(learner.backbone)[0]
    up, down = slot.adapters[0].up_proj.weight, slot.adapters[0].down_proj.weight
    assert up[:, rank:].abs().max() == 0 and (down[rank:].abs().amax(dim=1) > 0).all()  # can learn at once


def test_rank_grows_where_the_held_out_loss_stalls_and_not_otherwise(dylora_moe):
    keys = {"expert_rank_max": 5, "ffn_num": 2, "rank_growth_step": 2, "rank_growth_epochs": 1, "plateau_epochs": 1}
    stalled = teach(dylora_moe(**keys, plateau_tolerance=0.99, epochs=2), 1)  # next to nothing counts as improvement
    (grown,) = rows(stalled, "rank")
    assert grown["rank"] == 4 and grown["helped"] is False  # so it ends there
    assert stalled.population.ranks() == [[4], [4]]
    alive = {id(p) for p in stalled.parameters()}
    assert set(stalled.trained) <= alive
    (held,) = rows(stalled, "held_out")
    assert len(held["samples"]) == 2 and {r["images"] for r in rows(stalled, "epoch")} == {18}
    going = teach(dylora_moe(**keys, plateau_tolerance=0.0, epochs=1), 1)  # one epoch shows no stall
    assert len(rows(going, "rank")) == 1 and going.population.ranks() == [[2], [2]]  # the one row from above


def test_the_rank_never_exceeds_its_most(dylora_moe):
    learner = dylora_moe(expert_rank_max=5, ffn_num=2, rank_growth_step=4)
    assert learner.population.room(5, 4) == 3
    learner.population.grow_rank(3, "x", learner.initialise)
    assert learner.population.room(5, 4) == 0


# Freezing -------------------------------------------------------------------------------------------------------------


def test_plateau():
    assert not plateau([1.0, 1.0], 2, 0.0)  # too short to tell
    assert plateau([1.0, 1.0], 1, 0.0)
    assert plateau([1.0, 0.995], 1, 0.01) and not plateau([1.0, 0.98], 1, 0.01)
    assert plateau([1.0, 0.5, 0.6, 0.7], 2, 0.0) and not plateau([1.0, 0.5, 0.6, 0.4], 2, 0.0)
    assert plateau([0.0, 0.0], 1, 0.5)


def test_what_converged_is_frozen_for_good(dylora_moe):
    keys = {"freeze_on_convergence": True, "plateau_epochs": 1, "plateau_tolerance": 0.99}
    learner = teach(dylora_moe(**ALWAYS, **keys), 1)
    assert learner.population.experts[0].frozen
    kept = experts_of(learner, 0)
    teach(learner, 3, first=1)
    assert torch.equal(experts_of(learner, 0), kept)
    assert [r["learned"] for r in rows(learner, "freeze")] == [[0], [1], [2]]
    free = teach(dylora_moe(**ALWAYS, **(keys | {"freeze_on_convergence": False})), 2)
    assert not any(e.frozen for e in free.population.experts)


def test_a_task_of_a_frozen_expert_trains_the_head_and_column_alone(dylora_moe):
    keys = {"freeze_on_convergence": True, "plateau_epochs": 1, "plateau_tolerance": 0.99}
    learner = teach(dylora_moe(**NEVER, **keys), 1)
    teach(learner, 2, first=1)
    assert sum(p.numel() for p in learner.trained.values()) == learner.head.weight.numel() + learner.head.bias.numel()


def test_an_expert_frozen_while_young_is_mature(dylora_moe):
    learner = teach(
        dylora_moe(
            freeze_on_convergence=True, plateau_epochs=1, plateau_tolerance=0.99, maturity_tasks=3, epochs=3, **ALWAYS
        ),
        2,
    )
    assert [e.frozen for e in learner.population.experts] == [True, True]
    learner.population.mature(learner)
    assert not any(e.young for e in learner.population.experts)
    assert [row["expert"] for row in rows(learner, "mature")] == [0, 1]


# Merging --------------------------------------------------------------------------------------------------------------


def test_merging_adds_the_weighted_functions_and_drops_the_column(dylora_moe):
    learner = teach(dylora_moe(**ALWAYS), 3)
    slots = routed.routed_layers(learner.backbone)
    x = torch.randn(2, 5, 16)
    gates = torch.tensor([[0.1, 0.4, 0.5], [0.2, 0.3, 0.5]])
    first, second = ([slot.adapters[e](x) for slot in slots] for e in (0, 2))
    kept = [r.columns[2].clone() for r in routed.routers_of(learner.backbone)]
    young = [e.steps for e in learner.population.experts]
    learner.population.merge(0, 2, gates)
    assert learner.population.target == 1 and learner.population.owners == [
        (0, 1),
        (0, 1),
        (1, 0),
        (1, 0),
        (2, 1),
        (2, 1),
    ]
    assert [e.steps for e in learner.population.experts] == young[1:]
    for i, (slot, router) in enumerate(zip(slots, routed.routers_of(learner.backbone), strict=True)):
        weight = gates[i, 0] / gates[i, 2]
        torch.testing.assert_close(slot.adapters[1](x), second[i] + weight * first[i], rtol=0, atol=1e-5)
        assert len(slot) == len(router) == 2 and torch.equal(router.columns[1], kept[i])
        assert slot.adapters[1].rank == 4


def test_only_experts_that_no_task_used_much_are_merged(dylora_moe):
    learner = teach(dylora_moe(**ALWAYS, merge_below=0.0))
    assert rows(learner, "merge") == [] and all(0 < e.peak <= 1 for e in learner.population.experts)
    merged = teach(
        dylora_moe(**ALWAYS, merge_below=1.0), 3
    )  # everything is low beside 1 but the first, alone in task 1
    assert {r["task"] for r in rows(merged, "merge")} <= {1, 2}
    survivor = [e.peak for e in merged.population.experts]
    assert 1.0 in survivor  # peaks last: expert 0 had all of task 1


def test_an_expert_added_after_a_merge_has_start_values_of_its_own(dylora_moe):
    learner = teach(dylora_moe(**ALWAYS), 2)
    old = experts_of(learner, 1)
    learner.population.merge(0, 1, torch.full((2, 2), 0.5))
    learner.population.add(learner.initialise)
    assert learner.population.created == 3
    fresh = routed.routed_layers(learner.backbone)[0].adapters[1].down_proj.weight
    assert not torch.equal(fresh.flatten(), old[: fresh.numel()])


# Restoring ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [None, ("qkv",), ("qkv", "proj", "fc1", "fc2")], ids=str)
def test_grown_merged_and_frozen_experts_are_restored(targets, dylora_moe):
    keys = {
        **ALWAYS,
        "lora_target": targets,
        "expert_rank_max": 5,
        "freeze_on_convergence": True,
        "plateau_tolerance": 0.99,
    }
    keys |= {"plateau_epochs": 1, "rank_growth_epochs": 1, "top_k_experts": 1}
    stream = toy_stream()
    learner = teach(dylora_moe(**keys), 2, stream=stream)
    gates = torch.tensor([[0.5, 0.5], [0.0, 1.0]])  # ranks differ between layers from here on
    learner.population.merge(0, 1, torch.stack([gates[0], gates[1]]))
    assert learner.population.ranks() == [[10], [5]] and learner.population.experts[0].frozen
    fresh = dylora_moe(**keys)
    fresh.restore(json.loads(json.dumps(learner.structure())))
    fresh.load_own_state({k: v.clone() for k, v in learner.own_state().items()})
    assert fresh.structure() == learner.structure()
    for made in (learner, fresh):
        teach(made, 3, first=2, stream=stream)
    with torch.no_grad():
        assert torch.equal(learner.logits(images_of(stream)), fresh.logits(images_of(stream)))
    assert fresh.structure() == learner.structure()
    assert all(torch.equal(v, fresh.own_state()[k]) for k, v in learner.own_state().items())
