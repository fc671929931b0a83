"""Which experts of dylora_moe train and act, how the router weights them, and what is logged of their use."""

import math

import pytest
import torch

from backbone.experts import routed
from models.families.experts import all_act, routing_terms
from tests.helpers.dylora import ALWAYS, NEVER, columns_of, experts_of, teach
from tests.helpers.nested import rows
from tests.helpers.toy import toy_settings, toy_stream


def added(*arguments):
    """What routing adds to the loss."""
    terms = routing_terms(*arguments)
    assert terms.keys() == {"z", "balance", "entropy"}
    return float(sum(terms.values()))


def test_target_trains_its_own_expert_and_column_alone_open_trains_all(dylora_moe):
    def moved(**keys):
        learner = teach(dylora_moe(**ALWAYS, **keys, weight_decay=0.0), 2)
        before = [(experts_of(learner, e), columns_of(learner, e)) for e in (0, 1)]
        teach(learner, 3, first=2)
        after = [(experts_of(learner, e), columns_of(learner, e)) for e in (0, 1)]
        return [not torch.equal(a[i], b[i]) for i in (0, 1) for a, b in zip(before, after, strict=True)]

    assert moved(train_experts="target") == [False] * 4
    assert moved(train_experts="target", train_columns="all") == [False, False, True, True]
    assert moved(train_experts="open") == [True] * 4


def test_young_experts_act_always_and_mature_ones_by_top_k(dylora_moe):
    learner = teach(dylora_moe(**ALWAYS, top_k_experts=1, num_experts=4), 3, stream=toy_stream())
    # in task 3 experts 0 and 1 are mature, 2 is young: one of the two and the young one act
    assert [e.young for e in learner.population.experts] == [False, False, True]
    last = rows(learner, "routing")[-1]
    for share in last["share"]:
        assert share[2] == 1 and share[0] + share[1] == pytest.approx(1)
    dense = teach(dylora_moe(**ALWAYS, top_k_experts=1, maturity_tasks=None))
    assert all(share == [1, 1, 1] for share in rows(dense, "routing")[-1]["share"])


def test_maturity_by_steps_comes_within_a_task(dylora_moe):
    stream = toy_stream()
    steps = 2 * 3  # epochs of 20 images by 8
    for limit, young in ((steps, False), (steps + 1, True)):
        learner = teach(dylora_moe(maturity_tasks=None, maturity_steps=limit), 1, stream=stream)
        assert learner.population.experts[0].steps == steps and learner.population.experts[0].young is young


def test_the_temperature_falls_over_a_task_and_its_end_is_evaluated(dylora_moe):
    learner = dylora_moe(router_temperature_start=4.0, router_temperature_end=1.0, epochs=1, batch_size=5)
    seen, router = [], routed.routers_of(learner.backbone)[0]
    learner.backbone.register_forward_pre_hook(
        lambda module, inputs: seen.append(float(router.temperature)) if torch.is_grad_enabled() else None
    )
    teach(learner, 1)
    assert seen == pytest.approx([4, 4 * 0.25**0.25, 2, 4 * 0.25**0.75])
    assert float(router.temperature) == pytest.approx(1)


def test_each_loss_of_routing_acts_and_zero_takes_it_away(dylora_moe):
    from backbone.experts import balance
    from backbone.experts.router import Routing

    learner = teach(
        dylora_moe(
            **ALWAYS, top_k_experts=1, router_aux_loss_coef=3.0, router_entropy_coef=5.0, router_z_loss_coef=7.0
        ),
        3,
    )
    logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(-1)
    routing = Routing(p, p, logits, p.argsort(dim=-1, descending=True)[..., :2])
    z, among = balance.z_loss(routing), torch.tensor([True, True, False])
    for expert in learner.population.experts:
        expert.young = True  # all act: entropy, here among two that learn
    expected = 5 * balance.entropy_loss(routing, among) + 7 * z
    assert added([routing], learner.population.experts, [0, 1], learner.cfg) == pytest.approx(float(expected))
    for expert in learner.population.experts:
        expert.young = False  # top-k: balance
    expected = 3 * balance.balance_loss(routing, among) + 7 * z  # a mean over two equal layers
    assert added([routing, routing], learner.population.experts, [0, 1], learner.cfg) == pytest.approx(float(expected))
    # with one expert that learns there is nothing to balance
    assert added([routing], learner.population.experts, [1], learner.cfg) == pytest.approx(float(7 * z))
    learner.population.experts[
        2
    ].young = True  # acts always beside the best of the others, so it stays out of their balance
    assert not all_act(learner.population.experts, learner.cfg)
    assert added([routing], learner.population.experts, [0, 1, 2], learner.cfg) == pytest.approx(float(expected))
    learner.population.experts[2].young = False
    zero = teach(dylora_moe(router_aux_loss_coef=0.0, router_entropy_coef=0.0, router_z_loss_coef=0.0, **ALWAYS), 3)
    assert added([routing], zero.population.experts, [0, 1], zero.cfg) == 0
    alone = teach(dylora_moe(**NEVER), 1)
    assert routing_terms([routing], alone.population.experts, [0], alone.cfg) == {}


def test_without_routing_experts_add_up(dylora_moe):
    learner = teach(dylora_moe(**ALWAYS, use_moe_routing=False))
    assert routed.routers_of(learner.backbone) == [] and rows(learner, "routing") == []
    slot, x = routed.routed_layers(learner.backbone)[0], torch.randn(2, 5, 16)
    torch.testing.assert_close(slot(x, None), sum(e(x) for e in slot.experts()), rtol=0, atol=1e-6)
    assert len(slot) == 3


@pytest.mark.parametrize("scope", ["shared", "layer"])
@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_scopes_and_granularities_learn(scope, granularity, dylora_moe):
    learner = teach(dylora_moe(**ALWAYS, router_scope=scope, router_granularity=granularity), 2)
    assert columns_of(learner, 1).abs().max() > 0
    (last,) = [r for r in rows(learner, "routing") if r["task"] == 1]
    assert len(last["gate"]) == 2 and all(sum(g) == pytest.approx(1) for g in last["gate"])
    assert all(0 <= h <= 0.6932 for h in last["entropy"])


def test_the_router_is_centred_on_the_first_task_on_request(dylora_moe):
    centred, plain = teach(dylora_moe(), 1), teach(dylora_moe(router_centre=False), 1)
    assert routed.routers_of(centred.backbone)[0].center.abs().max() > 0
    assert routed.routers_of(plain.backbone)[0].center.abs().max() == 0


def test_the_use_of_experts_in_training_is_told_for_every_phase_epoch_and_layer(dylora_moe):
    learner = teach(dylora_moe(**ALWAYS, top_k_experts=1), 2)
    told = rows(learner, "experts")
    assert [(r["task"], r["phase"], r["epoch"], r["layer"]) for r in told] == [
        (t, "func", e, n) for t in (0, 1) for e in (1, 2) for n in (1, 2)
    ]
    for row in told:
        experts = row["task"] + 1  # expert 0 is mature in task 2, 1 is young: both act
        assert sum(row["share"]) == pytest.approx(experts) and sum(row["gate"]) == pytest.approx(1)
        assert len(row["share"]) == len(row["gradient"]) == experts and all(g > 0 for g in row["gradient"])
        assert 0 <= row["token_entropy"] <= math.log(experts) + 1e-6
    assert told[-1]["router_gradient"] > 0 and told[0]["router_gradient"] == 0
    assert not rows(teach(dylora_moe(use_moe_routing=False), 1), "experts")[len(told) :]


# Columns aimed at the new classes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["token", "sample"])
@pytest.mark.parametrize("scope", ["shared", "layer"])
def test_an_aimed_column_leaves_old_images_to_the_old_expert(dylora_moe, scope, granularity):
    def share_of_the_new(start):
        where = {
            "router_scope": scope,
            "router_granularity": granularity,
            "maturity_tasks": None,
            "maturity_steps": None,
        }
        learner = dylora_moe(router_column_start=start, init_lr=1e-4, min_lr=0.0, **where, **ALWAYS)
        teach(learner, 2)
        found = []
        for index in (0, 1):
            routings = []
            routed.collect(learner.backbone, routings)
            with torch.no_grad():
                learner.backbone(next(iter(toy_stream().test(index).batches(100, augment=False, shuffle=False)))[0])
            routed.collect(learner.backbone, None)
            found.append(float(torch.stack([r.gates[..., 1].mean() for r in routings]).mean()))
        return found

    old, new = share_of_the_new("prototype")
    assert new > 0.6 and old < 0.4
    assert share_of_the_new("zero") == pytest.approx([0.5, 0.5], abs=1e-3)


def test_a_prototype_needs_the_centre():
    texts = [
        text
        for _, text in toy_settings("dylora_moe", router_column_start="prototype", router_centre=False).cross_checks()
    ]
    assert any(text.startswith("router_column_start: prototype compares") for text in texts)
