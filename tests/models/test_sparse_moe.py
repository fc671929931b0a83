"""The sparse mixture as a learner: what its keys do, and that its use of experts is told as it was."""

import json

import pytest
import torch

from backbone.adapters.adapter import Adapter
from models.learner.layers import slot_inputs
from tests.helpers.toy import toy_settings, toy_stream


def rows(learner, kind):
    lines = (learner.log.folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def learned(learner, tasks=1):
    stream = toy_stream()
    for index in range(tasks):
        learner.begin_task()
        learner.learn(stream.task(index))
        learner.consolidate(stream.task(index))
    return learner


def test_use_and_gradients_are_told_for_every_layer_and_epoch(toy_learner):
    learner = learned(toy_learner("sparse_moe", top_k_experts=2, epochs=2), 2)
    told = rows(learner, "experts")
    assert [(r["task"], r["epoch"], r["layer"]) for r in told] == [
        (t, e, n) for t in (0, 1) for e in (1, 2) for n in (1, 2)
    ]
    for row in told:
        assert sum(row["share"]) == pytest.approx(2) and sum(row["gate"]) == pytest.approx(1)
        assert len(row["gradient"]) == 3 and row["router_gradient"] >= 0
    assert any(row["router_gradient"] > 0 for row in told)
    assert all(moe.collect is None for moe in learner.experts().values())


def test_all_to_one_expert_trains_that_expert_alone(toy_learner):
    learner = toy_learner("sparse_moe", fixed_routing="expert", fixed_expert=1, weight_decay=0.0, top_k_experts=1)
    before = {k: v.clone() for k, v in learner.own_state().items()}
    learned(learner)
    moved = {
        k.split(".")[4] for k, v in learner.own_state().items() if "experts" in k and not torch.equal(v, before[k])
    }
    assert moved == {"1"}
    assert not any("router.columns" in k and not torch.equal(v, before[k]) for k, v in learner.own_state().items())
    assert all(row["share"] == [0.0, 1.0, 0.0] and row["router_gradient"] == 0 for row in rows(learner, "experts"))
    assert [g["group"] for g in rows(learner, "groups")[0]["groups"]] == ["experts", "head"]


def test_uniform_routing_uses_all_alike(toy_learner):
    learner = learned(toy_learner("sparse_moe", fixed_routing="uniform"))
    assert all(row["gate"] == pytest.approx([1 / 3] * 3) for row in rows(learner, "experts"))


def test_the_losses_pull_towards_balance(toy_learner):
    def spread(coefficient):
        learner = toy_learner(
            "sparse_moe", top_k_experts=1, router_aux_loss_coef=coefficient, init_lr=0.5, weight_decay=0.0, epochs=8
        )
        last = rows(learned(learner), "experts")[-1]
        return max(last["share"]) - min(last["share"])

    assert spread(10.0) < spread(0.0)


def test_the_router_reads_distances_from_the_first_tasks_mean_token(toy_learner):
    learner = toy_learner("sparse_moe")
    expected = slot_inputs(learner, toy_stream().task(0), learner.layers)
    learned(learner, 2)
    for layer, moe in learner.experts().items():
        torch.testing.assert_close(moe.router.center, expected[layer].mean(dim=0))
    plain = learned(toy_learner("sparse_moe", router_centre=False))
    assert not any(moe.router.center.any() for moe in plain.experts().values())


def test_a_layer_has_the_parameters_of_the_dense_adapter(toy_learner):
    from tests.helpers.toy import toy_backbone

    learner = toy_learner(
        "sparse_moe",
        expert_hidden=None,
        ffn_num=220,
        backbone=toy_backbone(embed_dim=64),
        num_experts=2,
        top_k_experts=1,
    )
    dense = sum(p.numel() for p in Adapter(64, 220).parameters())
    for moe in learner.experts().values():
        assert abs(sum(p.numel() for p in moe.parameters()) / dense - 1) < 0.01


def test_the_routers_rate_rises_over_its_warm_up(toy_learner, monkeypatch):
    learner = toy_learner("sparse_moe", router_lr=0.4, router_warmup=4, epochs=1, batch_size=4)
    seen = []
    real = torch.optim.SGD.step

    def step(self, *args):
        seen.append([g["lr"] for g in self.param_groups])
        return real(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    learned(learner)  # 20 images: 5 steps
    assert [rates[1] for rates in seen] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    assert {rates[0] for rates in seen} == {0.05}


def test_balancing_by_bias_moves_the_choice_and_nothing_else(toy_learner):
    moved = learned(
        toy_learner("sparse_moe", top_k_experts=1, router_bias_rate=0.01, router_aux_loss_coef=0.0, epochs=1)
    )
    plain = learned(toy_learner("sparse_moe", top_k_experts=1, router_aux_loss_coef=0.0, epochs=1))
    steps = 3  # 20 images in batches of 8
    for moe, other in zip(moved.experts().values(), plain.experts().values(), strict=True):
        in_steps = moe.router.selection_bias / 0.01
        torch.testing.assert_close(in_steps, in_steps.round(), atol=1e-4, rtol=0)
        assert 0 < in_steps.abs().max() <= steps + 1e-4
        assert not other.router.selection_bias.any()


def test_contradictions_are_refused_and_keys_that_do_not_act_are_told():
    def faults(**keys):
        return [text for _, text in toy_settings("sparse_moe", **keys).cross_checks()]

    assert not faults(num_experts=1)  # the default of top_k_experts asks for no more than there are
    assert faults(expert_capacity=1.0, router_granularity="sample") == [
        "expert_capacity: counts tokens, and whole images cannot be cut; null is expected with "
        "router_granularity sample"
    ]
    assert faults(num_experts=2, top_k_experts=3) == ["top_k_experts: 3 is above num_experts 2; set it to at most that"]
    assert faults(fixed_expert=3) == ["fixed_expert: 3 does not exist, experts are 0..2"]
    assert faults(router_lr=0.001, min_lr=0.01) == ["min_lr: 0.01 is above router_lr 0.001"]
    told = list(toy_settings("sparse_moe", fixed_routing="uniform", router_lr=0.1, expert_hidden=None).remarks())
    assert told == ["these keys have no effect with fixed_routing uniform: router_lr"]
    keys = {"fixed_routing": "uniform", "top_k_experts": 1, "expert_capacity": 1.5, "expert_hidden": None}
    told = list(toy_settings("sparse_moe", **keys).remarks())
    assert [line.rpartition(": ")[2] for line in told] == ["top_k_experts", "expert_capacity"]
