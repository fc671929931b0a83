"""The routed learner that grows: each part does what its key says, and what it decided can be read and restored."""

import json
import math
from dataclasses import fields

import numpy as np
import pytest
import torch

from backbone.experts import novelty, routed
from backbone.experts.novelty import Decision, replay
from models.families.experts import THRESHOLDS, all_act, herd, herd_classes, plateau, policy_of, routing_loss
from tests.helpers.toy import toy_settings, toy_stream
from utils.data.batches import TaskData

FIXED = {"novelty_threshold_mode": "fixed"}
ALWAYS, NEVER = FIXED | {"novelty_threshold": 2.0}, FIXED | {"novelty_threshold": -2.0}


@pytest.fixture
def build(toy_learner):
    def make(**keys):
        fixed = {"num_experts": 3, "freeze_on_convergence": False, "novelty_threshold_mode": "fixed"}
        return toy_learner("dylora_moe", **(fixed | keys))

    return make


def rows(learner, kind):
    lines = (learner.log.folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def teach(learner, tasks=3, first=0, stream=None):
    stream = stream or toy_stream()
    for index in range(first, tasks):
        learner.begin_task()
        task = stream.task(index, with_past=learner.uses_past)
        learner.learn(task)
        learner.consolidate(task)
    learner.eval()
    return learner


def experts_of(learner, expert):
    """Every number of one expert, layer after layer."""
    slots = routed.routed_layers(learner.backbone)
    return torch.cat([p.flatten() for slot in slots for p in slot.adapters[expert].parameters()]).clone()


def columns_of(learner, expert):
    return torch.cat([r.columns[expert] for r in routed.routers_of(learner.backbone)]).clone()


def images_of(stream):
    return next(iter(stream.test(0).batches(100, augment=False, shuffle=False)))[0]


# 1 and 2: novelty and spawning --------------------------------------------------------------------------------------


def test_the_thresholds_ends_spawn_always_up_to_the_most_or_never(build):
    assert len(teach(build(**ALWAYS)).experts) == 3
    assert len(teach(build(**ALWAYS, num_experts=2)).experts) == 2
    assert len(teach(build(**NEVER)).experts) == 1
    learner = teach(build(**ALWAYS, novelty_cooldown=1))
    assert [r["reason"] for r in rows(learner, "novelty")[-3:]] == ["first", "cooldown", "novel"]
    assert [len(r.columns) for r in routed.routers_of(learner.backbone)] == [2, 2]
    assert learner.adapters_per_layer() == [0, 2, 2]


def test_few_images_never_spawn(build):
    learner = teach(build(**ALWAYS, novelty_min_samples=21))
    assert [r["reason"] for r in rows(learner, "novelty")] == ["first", "few images", "few images"]


def test_decisions_carry_their_numbers_and_can_be_replayed_from_the_results(build):
    keys = {"novelty_threshold": 0.3}
    learner = teach(build(**keys))
    told = rows(learner, "novelty")
    names = [f.name for f in fields(Decision)]
    decisions = [Decision(**{name: row[name] for name in names}) for row in told]
    spawned = [d.task for d in decisions if d.spawn]
    policy = policy_of(learner.cfg)
    assert replay(decisions, policy) == spawned and decisions[0].reason == "first"
    for made in decisions[1:]:
        assert made.low <= made.best <= made.high and made.threshold == 0.3 and made.images == 20
        assert made.best == max(made.similarities)
    assert replay(decisions, policy_of(toy_settings("dylora_moe", **ALWAYS))) == [0, 1, 2]
    assert replay(decisions, policy_of(toy_settings("dylora_moe", **NEVER))) == [0]


def test_the_results_carry_the_decisions_and_the_log_tells_other_thresholds(build):
    stream, learner, carried = toy_stream(), build(novelty_threshold=0.3), []
    for index in range(3):
        teach(learner, index + 1, first=index, stream=stream)
        carried += json.loads(json.dumps(learner.selections()))
    assert [c.pop("kind") for c in carried] == ["novelty"] * 3 and [c["task"] for c in carried] == [0, 1, 2]
    decisions = [Decision(**c) for c in carried]
    assert novelty.decisions([{"kind": "novelty", **c} for c in carried] + [{"kind": "other"}]) == learner.decisions
    told = (learner.log.folder / "run.log").read_text()
    for made in decisions[1:]:
        assert f"would spawn at any threshold above {made.high:.3f}" in told
    (row,) = rows(learner, "would_spawn")
    assert row["thresholds"] == list(THRESHOLDS)
    for threshold, tasks in zip(THRESHOLDS, row["tasks"], strict=True):
        policy = policy_of(toy_settings("dylora_moe", novelty_threshold=threshold))
        assert [0, *tasks] == replay(decisions, policy)
        words = ", ".join(str(task + 1) for task in tasks) or "none"
        assert f"{threshold:g}: {words}" in told
    # just above the interval the whole run spawns there, just below it does not
    high = decisions[1].high
    for shift in (1e-6, -1e-6):
        again = teach(build(novelty_threshold=high + shift), 2)
        assert rows(again, "novelty")[-1]["spawn"] is (shift > 0)


def test_what_no_threshold_would_spawn_is_told_with_the_reason(build):
    learner = teach(build(**NEVER, novelty_min_samples=21), 2)
    assert (
        "similar, expert 0 goes on; would spawn at no threshold (few images)"
        in (learner.log.folder / "run.log").read_text()
    )


def test_an_estimate_that_is_not_sure_does_not_spawn_unless_confidence_is_off(build):
    teach(first := build(**NEVER), 2)
    row = rows(first, "novelty")[-1]
    between = {"novelty_threshold": (row["best"] + row["high"]) / 2}
    assert row["best"] < row["high"]
    assert rows(teach(build(**between), 2), "novelty")[-1]["reason"] == "uncertain"
    assert rows(teach(build(**between, novelty_confidence=0.0), 2), "novelty")[-1]["reason"] == "novel"


def test_embeddings_are_the_class_means_of_the_prefix_and_training_does_not_move_them(build):
    stream = toy_stream()
    learner = build(**ALWAYS)
    expected = []
    for index in range(3):
        images, labels = [], []
        for x, y, *_ in stream.task(index).train.batches(7, augment=False):
            images.append(x), labels.append(y)
        images, labels = torch.cat(images), torch.cat(labels)
        means = learner.backbone.mean_tokens(images, [1])[1].double()
        expected += [means[labels == c].mean(0) for c in labels.unique()]
    teach(learner, stream=stream)
    torch.testing.assert_close(learner.embeddings, torch.stack(expected), rtol=1e-5, atol=1e-6)
    assert learner.images.tolist() == [10] * 6
    assert learner.owners == [(0, 0), (0, 0), (1, 1), (1, 1), (2, 2), (2, 2)]
    assert learner.task_experts() == {0: 0, 1: 1, 2: 2}


def test_confidence_zero_uses_the_estimate_alone(build):
    for row in rows(teach(build(novelty_confidence=0.0)), "novelty")[1:]:
        assert row["low"] == row["best"] == row["high"]


def test_calibration_and_median_reach_the_decision(build):
    learner = teach(build(novelty_threshold_mode="calibrated", novelty_similarity="median", novelty_quantile=1.0))
    for row in rows(learner, "novelty")[1:]:
        assert row["threshold"] == row["calibrated"] != 0.5
    adaptive = teach(build(novelty_threshold_mode="adaptive", novelty_delta=0.1, **{"novelty_threshold": 2.0}), 2)
    assert rows(adaptive, "novelty")[-1]["threshold"] == pytest.approx(2 - 0.1 * 0.6931472)


def test_spawning_alone_scales_the_old_experts_and_adds_nothing_of_its_own(build):
    """The new column opens at the gate of the others; with its logit far below, everything is as it was."""
    stream = toy_stream()
    learner = teach(build(**ALWAYS), 1, stream=stream)
    with torch.no_grad():
        before = learner.features(images_of(stream))
        learner._spawn(stream.task(1))
        learner._apply_modes()
        for router in routed.routers_of(learner.backbone):
            assert router.offset.tolist() == [0, 0]
            assert torch.equal(router(torch.randn(2, 5, 16)).gates, torch.full((2, 5, 2), 0.5))
            router.set_offset(1, -1e4)
        torch.testing.assert_close(learner.features(images_of(stream)), before, rtol=0, atol=1e-6)


# 3: who learns, and who acts ----------------------------------------------------------------------------------------


def test_target_trains_its_own_expert_and_column_alone_open_trains_all(build):
    def moved(**keys):
        learner = teach(build(**ALWAYS, **keys, weight_decay=0.0), 2)
        before = [(experts_of(learner, e), columns_of(learner, e)) for e in (0, 1)]
        teach(learner, 3, first=2)
        after = [(experts_of(learner, e), columns_of(learner, e)) for e in (0, 1)]
        return [not torch.equal(a[i], b[i]) for i in (0, 1) for a, b in zip(before, after, strict=True)]

    assert moved(train_experts="target") == [False] * 4
    assert moved(train_experts="target", train_columns="all") == [False, False, True, True]
    assert moved(train_experts="open") == [True] * 4


def test_young_experts_act_always_and_mature_ones_by_top_k(build):
    learner = teach(build(**ALWAYS, top_k_experts=1, num_experts=4), 3, stream=toy_stream())
    # in task 3 experts 0 and 1 are mature, 2 is young: one of the two and the young one act
    assert [e.young for e in learner.experts] == [False, False, True]
    last = rows(learner, "routing")[-1]
    for share in last["share"]:
        assert share[2] == 1 and share[0] + share[1] == pytest.approx(1)
    dense = teach(build(**ALWAYS, top_k_experts=1, maturity_tasks=None))
    assert all(share == [1, 1, 1] for share in rows(dense, "routing")[-1]["share"])


def test_maturity_by_steps_comes_within_a_task(build):
    stream = toy_stream()
    steps = 2 * 3  # epochs of 20 images by 8
    for limit, young in ((steps, False), (steps + 1, True)):
        learner = teach(build(maturity_tasks=None, maturity_steps=limit), 1, stream=stream)
        assert learner.experts[0].steps == steps and learner.experts[0].young is young


def test_the_temperature_falls_over_a_task_and_its_end_is_evaluated(build):
    learner = build(router_temperature_start=4.0, router_temperature_end=1.0, epochs=1, batch_size=5)
    seen, router = [], routed.routers_of(learner.backbone)[0]
    learner.backbone.register_forward_pre_hook(
        lambda module, inputs: seen.append(float(router.temperature)) if torch.is_grad_enabled() else None
    )
    teach(learner, 1)
    assert seen == pytest.approx([4, 4 * 0.25**0.25, 2, 4 * 0.25**0.75])
    assert float(router.temperature) == pytest.approx(1)


def test_each_loss_of_routing_acts_and_zero_takes_it_away(build):
    from backbone.experts import balance
    from backbone.experts.router import Routing

    learner = teach(
        build(**ALWAYS, top_k_experts=1, router_aux_loss_coef=3.0, router_entropy_coef=5.0, router_z_loss_coef=7.0), 3
    )
    logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(-1)
    routing = Routing(p, p, logits, p.argsort(dim=-1, descending=True)[..., :2])
    z, among = balance.z_loss(routing), torch.tensor([True, True, False])
    for expert in learner.experts:
        expert.young = True  # all act: entropy, here among two that learn
    expected = 5 * balance.entropy_loss(routing, among) + 7 * z
    assert float(routing_loss([routing], learner.experts, [0, 1], learner.cfg)) == pytest.approx(float(expected))
    for expert in learner.experts:
        expert.young = False  # top-k: balance
    expected = 3 * balance.balance_loss(routing, among) + 7 * z  # a mean over two equal layers
    assert float(routing_loss([routing, routing], learner.experts, [0, 1], learner.cfg)) == pytest.approx(
        float(expected)
    )
    assert float(routing_loss([routing], learner.experts, [1], learner.cfg)) == pytest.approx(
        float(7 * z)
    )  # nothing to balance
    learner.experts[2].young = True  # acts always beside the best of the others, so it stays out of their balance
    assert not all_act(learner.experts, learner.cfg)
    assert float(routing_loss([routing], learner.experts, [0, 1, 2], learner.cfg)) == pytest.approx(float(expected))
    learner.experts[2].young = False
    zero = teach(build(router_aux_loss_coef=0.0, router_entropy_coef=0.0, router_z_loss_coef=0.0, **ALWAYS), 3)
    assert float(routing_loss([routing], zero.experts, [0, 1], zero.cfg)) == 0
    alone = teach(build(**NEVER), 1)
    assert routing_loss([routing], alone.experts, [0], alone.cfg) == 0


def test_without_routing_experts_add_up(build):
    learner = teach(build(**ALWAYS, use_moe_routing=False))
    assert routed.routers_of(learner.backbone) == [] and rows(learner, "routing") == []
    slot, x = routed.routed_layers(learner.backbone)[0], torch.randn(2, 5, 16)
    torch.testing.assert_close(slot(x), sum(e(x) for e in slot.experts()), rtol=0, atol=1e-6)
    assert len(slot) == 3


@pytest.mark.parametrize("scope", ["shared", "layer"])
@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_scopes_and_granularities_learn(scope, granularity, build):
    learner = teach(build(**ALWAYS, router_scope=scope, router_granularity=granularity), 2)
    assert columns_of(learner, 1).abs().max() > 0
    (last,) = [r for r in rows(learner, "routing") if r["task"] == 1]
    assert len(last["gate"]) == 2 and all(sum(g) == pytest.approx(1) for g in last["gate"])
    assert all(0 <= h <= 0.6932 for h in last["entropy"])


def test_the_router_is_centred_on_the_first_task_on_request(build):
    centred, plain = teach(build(), 1), teach(build(router_centre=False), 1)
    assert routed.routers_of(centred.backbone)[0].center.abs().max() > 0
    assert routed.routers_of(plain.backbone)[0].center.abs().max() == 0


def test_the_use_of_experts_in_training_is_told_for_every_phase_epoch_and_layer(build):
    learner = teach(build(**ALWAYS, top_k_experts=1), 2)
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
    assert not rows(teach(build(use_moe_routing=False), 1), "experts")[len(told) :]


# 4: distillation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("on", "coefficient", "targets"),
    [("features", 3.0, None), ("logits", 100.0, None), ("features", 3.0, ("qkv", "fc2"))],
)
def test_distillation_holds_what_mature_experts_knew(on, coefficient, targets, build):
    stream = toy_stream()
    images = next(iter(stream.task(1).train.batches(100, augment=False)))[0]

    def drift(weight):
        """How far the new images' scores of the old classes move."""
        keys = {"distill_coef": weight, "distill_on": on, "weight_decay": 0.0, "epochs": 6}
        keys |= {"lora_target": targets}
        learner = teach(build(**NEVER, **keys), 1, stream=stream)
        with torch.no_grad():
            before = learner.logits(images)
        teach(learner, 2, first=1, stream=stream)
        with torch.no_grad():
            moved = learner.logits(images)[:, :2] - before
        return float((moved - moved.mean(dim=1, keepdim=True)).norm())  # a shift of all scores is no change

    assert drift(coefficient) < 0.7 * drift(0.0)


def test_a_teacher_is_needed_only_where_a_mature_expert_learns(build, monkeypatch):
    from models.dylora_moe import Learner

    calls = []
    original = Learner._distance
    monkeypatch.setattr(Learner, "_distance", lambda self, *a: calls.append(1) or original(self, *a))
    teach(build(**ALWAYS, distill_coef=1.0, train_experts="target"))
    teach(build(**NEVER, distill_coef=0.0))
    assert not calls
    teach(build(**ALWAYS, distill_coef=1.0, train_experts="open"), 2)
    assert calls


def test_the_distances_by_hand(build):
    stream = toy_stream()
    learner = teach(build(**NEVER, distill_coef=1.0), 1, stream=stream)
    task, images = stream.task(1), images_of(stream)
    teacher = learner._teacher(task)
    with torch.no_grad():
        was = learner.features(images)
        now = was + 0.5
        assert float(learner._distance(now, images, teacher, task)) == pytest.approx(0.25, rel=1e-5)
        object.__setattr__(learner, "cfg", learner.cfg.model_copy(update={"distill_on": "logits"}))
        assert float(learner._distance(was, images, teacher, task)) == pytest.approx(0, abs=1e-6)
        p, q = ((learner.head(f)[:, :2] / 2).softmax(1) for f in (was, now * 3))
        expected = 4 * (p * (p / q).log()).sum(1).mean()
        assert float(learner._distance(now * 3, images, teacher, task)) == pytest.approx(float(expected), rel=1e-4)


# 5: rank --------------------------------------------------------------------------------------------------------------


def test_ranks_of_linear_experts_grow_with_the_function_kept(build):
    stream = toy_stream()
    learner = teach(build(expert_rank_max=7, ffn_num=2, lora_target=("qkv", "fc1")), 1, stream=stream)
    with torch.no_grad():
        before, rank = learner.features(images_of(stream)), learner._ranks()[0][0]
        assert learner._grow_rank(3, "here") == rank + 3 and learner._ranks() == [[rank + 3]] * 2
        torch.testing.assert_close(learner.features(images_of(stream)), before, rtol=0, atol=1e-6)
    expert = learner.backbone.slots["1"].adapters[0]
    for target in ("qkv", "fc1"):
        assert expert[target].up[:, rank:].abs().max() == 0 and (expert[target].down[rank:].abs().amax(dim=1) > 0).all()


def test_rank_growth_keeps_the_function_and_the_parameters_are_counted_once(build):
    stream = toy_stream()
    learner = teach(build(expert_rank_max=7, ffn_num=2), 1, stream=stream)
    with torch.no_grad():
        before, rank = learner.features(images_of(stream)), learner._ranks()[0][0]
        assert learner._grow_rank(3, "here") == rank + 3
        torch.testing.assert_close(learner.features(images_of(stream)), before, rtol=0, atol=1e-6)
    slot = routed.routed_layers(learner.backbone)[0]
    up, down = slot.adapters[0].up_proj.weight, slot.adapters[0].down_proj.weight
    assert up[:, rank:].abs().max() == 0 and (down[rank:].abs().amax(dim=1) > 0).all()  # can learn at once


def test_rank_grows_where_the_held_out_loss_stalls_and_not_otherwise(build):
    keys = {"expert_rank_max": 5, "ffn_num": 2, "rank_growth_step": 2, "rank_growth_epochs": 1, "plateau_epochs": 1}
    stalled = teach(build(**keys, plateau_tolerance=0.99, epochs=2), 1)  # next to nothing counts as improvement
    (grown,) = rows(stalled, "rank")
    assert grown["rank"] == 4 and grown["helped"] is False  # so it ends there
    assert stalled._ranks() == [[4], [4]]
    alive = {id(p) for p in stalled.parameters()}
    assert set(stalled.trained) <= alive
    (held,) = rows(stalled, "held_out")
    assert len(held["samples"]) == 2 and {r["images"] for r in rows(stalled, "epoch")} == {18}
    going = teach(build(**keys, plateau_tolerance=0.0, epochs=1), 1)  # one epoch shows no stall
    assert len(rows(going, "rank")) == 1 and going._ranks() == [[2], [2]]  # the one row from above


def test_the_rank_never_exceeds_its_most(build):
    learner = build(expert_rank_max=5, ffn_num=2, rank_growth_step=4)
    assert learner._room() == 3
    learner._grow_rank(3, "x")
    assert learner._room() == 0


# 6: freezing ---------------------------------------------------------------------------------------------------------


def test_plateau():
    assert not plateau([1.0, 1.0], 2, 0.0)  # too short to tell
    assert plateau([1.0, 1.0], 1, 0.0)
    assert plateau([1.0, 0.995], 1, 0.01) and not plateau([1.0, 0.98], 1, 0.01)
    assert plateau([1.0, 0.5, 0.6, 0.7], 2, 0.0) and not plateau([1.0, 0.5, 0.6, 0.4], 2, 0.0)
    assert plateau([0.0, 0.0], 1, 0.5)


def test_what_converged_is_frozen_for_good(build):
    keys = {"freeze_on_convergence": True, "plateau_epochs": 1, "plateau_tolerance": 0.99}
    learner = teach(build(**ALWAYS, **keys), 1)
    assert learner.experts[0].frozen
    kept = experts_of(learner, 0)
    teach(learner, 3, first=1)
    assert torch.equal(experts_of(learner, 0), kept)
    assert [r["learned"] for r in rows(learner, "freeze")] == [[0], [1], [2]]
    free = teach(build(**ALWAYS, **(keys | {"freeze_on_convergence": False})), 2)
    assert not any(e.frozen for e in free.experts)


def test_a_task_of_a_frozen_expert_trains_the_head_and_column_alone(build):
    keys = {"freeze_on_convergence": True, "plateau_epochs": 1, "plateau_tolerance": 0.99}
    learner = teach(build(**NEVER, **keys), 1)
    teach(learner, 2, first=1)
    assert sum(p.numel() for p in learner.trained.values()) == learner.head.weight.numel() + learner.head.bias.numel()


# 7: merging -----------------------------------------------------------------------------------------------------------


def test_merging_adds_the_weighted_functions_and_drops_the_column(build):
    learner = teach(build(**ALWAYS), 3)
    slots = routed.routed_layers(learner.backbone)
    x = torch.randn(2, 5, 16)
    gates = torch.tensor([[0.1, 0.4, 0.5], [0.2, 0.3, 0.5]])
    first, second = ([slot.adapters[e](x) for slot in slots] for e in (0, 2))
    kept = [r.columns[2].clone() for r in routed.routers_of(learner.backbone)]
    young = [e.steps for e in learner.experts]
    learner._merge(0, 2, gates)
    assert learner.target == 1 and learner.owners == [(0, 1), (0, 1), (1, 0), (1, 0), (2, 1), (2, 1)]
    assert [e.steps for e in learner.experts] == young[1:]
    for i, (slot, router) in enumerate(zip(slots, routed.routers_of(learner.backbone), strict=True)):
        weight = gates[i, 0] / gates[i, 2]
        torch.testing.assert_close(slot.adapters[1](x), second[i] + weight * first[i], rtol=0, atol=1e-5)
        assert len(slot) == len(router) == 2 and torch.equal(router.columns[1], kept[i])
        assert slot.adapters[1].rank == 4


def test_only_experts_that_no_task_used_much_are_merged(build):
    learner = teach(build(**ALWAYS, merge_below=0.0))
    assert rows(learner, "merge") == [] and all(0 < e.peak <= 1 for e in learner.experts)
    merged = teach(build(**ALWAYS, merge_below=1.0), 3)  # everything is low beside 1 but the first, alone in task 1
    assert {r["task"] for r in rows(merged, "merge")} <= {1, 2}
    survivor = [e.peak for e in merged.experts]
    assert 1.0 in survivor  # peaks last: expert 0 had all of task 1


def test_an_expert_added_after_a_merge_has_start_values_of_its_own(build):
    learner = teach(build(**ALWAYS), 2)
    old = experts_of(learner, 1)
    learner._merge(0, 1, torch.full((2, 2), 0.5))
    learner._add_expert()
    assert learner.created == 3
    fresh = routed.routed_layers(learner.backbone)[0].adapters[1].down_proj.weight
    assert not torch.equal(fresh.flatten(), old[: fresh.numel()])


# Restoring ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [None, ("qkv",), ("qkv", "proj", "fc1", "fc2")], ids=str)
def test_grown_merged_and_frozen_experts_are_restored(targets, build):
    keys = {
        **ALWAYS,
        "lora_target": targets,
        "expert_rank_max": 5,
        "freeze_on_convergence": True,
        "plateau_tolerance": 0.99,
    }
    keys |= {"plateau_epochs": 1, "rank_growth_epochs": 1, "top_k_experts": 1}
    stream = toy_stream()
    learner = teach(build(**keys), 2, stream=stream)
    gates = torch.tensor([[0.5, 0.5], [0.0, 1.0]])  # ranks differ between layers from here on
    learner._merge(0, 1, torch.stack([gates[0], gates[1]]))
    assert learner._ranks() == [[10], [5]] and learner.experts[0].frozen
    fresh = build(**keys)
    fresh.restore(json.loads(json.dumps(learner.structure())))
    fresh.load_own_state({k: v.clone() for k, v in learner.own_state().items()})
    assert fresh.structure() == learner.structure()
    for made in (learner, fresh):
        teach(made, 3, first=2, stream=stream)
    with torch.no_grad():
        assert torch.equal(learner.logits(images_of(stream)), fresh.logits(images_of(stream)))
    assert fresh.structure() == learner.structure()
    assert all(torch.equal(v, fresh.own_state()[k]) for k, v in learner.own_state().items())


# Experts on linear layers ---------------------------------------------------------------------------------------------

TARGETS = [("qkv",), ("proj",), ("fc1",), ("fc2",), ("qkv", "proj", "fc1", "fc2")]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_experts_on_linear_layers_learn_as_adapters_do(targets, build):
    stream = toy_stream()
    learner = build(**ALWAYS, lora_target=targets, epochs=4)
    start = experts_of(learner, 0)
    teach(learner, 3, stream=stream)
    assert not torch.equal(experts_of(learner, 0), start) and columns_of(learner, 2).abs().max() > 0
    losses = [r["loss"] for r in rows(learner, "epoch") if r["task"] == 2]
    assert losses[-1] < losses[0]
    assert len(learner.experts) == 3 and learner.adapters_per_layer() == [0, 3, 3]
    sizes = {"qkv": 16 + 48, "proj": 16 + 16, "fc1": 16 + 64, "fc2": 64 + 16}
    expert = 2 * 2 * sum(sizes[target] for target in targets)  # 2 layers, rank 2
    head = learner.head.weight.numel() + learner.head.bias.numel()
    assert build(**ALWAYS, lora_target=targets).planned_parameters() == [
        ("first task: one expert a layer and the head", expert + head),
        ("each added expert with its router columns", expert + 2 * 16),
    ]
    assert not any(m._forward_hooks for m in learner.backbone.vit.modules())
    with torch.no_grad():
        for e in range(3):
            one_hot = torch.eye(3)[e].expand(8, 3)
            alone = learner.backbone(images_of(stream), route=lambda x, g=one_hot: [g] * 2)
            assert (alone - learner.features(images_of(stream))).abs().max() > 1e-4


@pytest.mark.parametrize("scope", ["shared", "layer"])
def test_every_part_works_with_experts_on_linear_layers(scope, build):
    keys = {"lora_target": ("qkv", "fc1"), "router_scope": scope, "expert_rank_max": 5, "merge_below": 0.9}
    keys |= {"top_k_experts": 1, "distill_coef": 1.0, "replay_per_class": 2, "novelty_threshold_mode": "adaptive"}
    learner = teach(build(**ALWAYS | keys, freeze_on_convergence=True, plateau_epochs=1, plateau_tolerance=0.5))
    assert rows(learner, "merge") and rows(learner, "rank") and rows(learner, "routing") and rows(learner, "replay")


def test_the_embeddings_of_linear_experts_are_of_what_the_first_block_reads(build):
    stream = toy_stream()
    learner = build(lora_target=("qkv",))
    images, labels = next(iter(stream.task(0).train.batches(20, augment=False, shuffle=False)))[:2]
    read = []
    hook = learner.backbone.vit.blocks[1].register_forward_pre_hook(lambda m, i: read.append(i[0].mean(dim=1).double()))
    with torch.no_grad():
        learner.backbone(images)
    hook.remove()
    teach(learner, 1, stream=stream)
    expected = torch.stack([read[0][labels == c].mean(0) for c in (0, 1)])
    torch.testing.assert_close(learner.embeddings, expected, rtol=1e-5, atol=1e-6)


# Replay ---------------------------------------------------------------------------------------------------------------


def test_herding_follows_the_mean_and_takes_all_of_a_small_class():
    features = torch.tensor([[0.0], [4.0], [1.0], [7.0], [3.0]])  # mean 3
    assert herd(features, 3) == [4, 1, 0 + 2]  # 3; (3 + 4) / 2 is nearer than (3 + 1) / 2; (3 + 4 + 1) / 3
    assert sorted(herd(features, 9)) == [0, 1, 2, 3, 4] and herd(features, 0) == []
    labels = torch.tensor([1, 0, 1, 0, 1])
    assert herd_classes(features, labels, 1) == [1, 2]


def test_kept_images_are_training_images_of_each_earlier_class_and_reach_the_loss(build):
    stream = toy_stream()
    learner = build(**ALWAYS, replay_per_class=3)
    assert learner.uses_past and not build().uses_past
    shown, original = [], TaskData.batches

    def batches(data, *given, **how):
        if how.get("stream") == "func":
            shown.append(data)
        return original(data, *given, **how)

    TaskData.batches = batches
    try:
        teach(learner, 3, stream=stream)
    finally:
        TaskData.batches = original
    assert len(learner.kept) == 3 * 6
    per_task = [r["rows"] for r in rows(learner, "replay")]
    for index, kept in enumerate(per_task):
        own = stream.task(index).train
        where = np.isin(own.rows, kept)
        assert where.sum() == 6 and own.labels[where].bincount().tolist()[-2:] == [3, 3]
    last = shown[-1]
    assert sorted(last.rows) == sorted([*stream.task(2).train.rows, *per_task[0], *per_task[1]])
    assert {r["images"] for r in rows(learner, "epoch") if r["task"] == 2} == {20 + 12}
    assert sum(r["kept"] for r in rows(learner, "replay")) == 6 + 12 + 18


def test_replayed_images_are_told_apart_among_all_seen_classes(build):
    """The old classes' rows of the head learn too, and those of classes to come do not."""
    stream = toy_stream()

    def rows_moved(**keys):
        learner = teach(build(**NEVER, **keys), 1, stream=stream)
        before = learner.head.weight.clone()
        teach(learner, 2, first=1, stream=stream)
        return (learner.head.weight != before).any(dim=1).tolist()

    assert rows_moved(replay_per_class=2) == [True] * 4 + [False] * 2
    assert rows_moved() == [False] * 2 + [True] * 2 + [False] * 2


def test_replay_lowers_the_loss_of_old_images_among_all_classes(build):
    stream = toy_stream()
    images, labels = next(iter(stream.task(0).train.batches(20, augment=False, shuffle=False)))[:2]

    def loss(count):
        learner = teach(build(**NEVER, replay_per_class=count, epochs=4), 3, stream=stream)
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(learner.logits(images), labels))

    assert loss(10) < 0.9 * loss(0)


def test_replay_off_is_the_same_run_whether_past_data_are_handed_over_or_not(build):
    stream, plain, given = toy_stream(), teach(build(**ALWAYS)), build(**ALWAYS)
    for index in range(3):
        given.begin_task()
        task = stream.task(index, with_past=True)
        given.learn(task)
        given.consolidate(task)
    assert given.kept == [] and not rows(given, "replay")
    assert all(torch.equal(v, given.own_state()[k]) for k, v in plain.own_state().items())


def test_a_resumed_run_replays_the_same_images(build):
    stream, keys = toy_stream(), {**ALWAYS, "replay_per_class": 2}
    whole = teach(build(**keys), 2, stream=stream)
    fresh = build(**keys)
    fresh.restore(json.loads(json.dumps(whole.structure())))
    fresh.load_own_state({k: v.clone() for k, v in whole.own_state().items()})
    assert fresh.kept == whole.kept and fresh.decisions == whole.decisions
    for made in (whole, fresh):
        teach(made, 3, first=2, stream=stream)
    assert all(torch.equal(v, fresh.own_state()[k]) for k, v in whole.own_state().items())
    assert fresh.structure() == whole.structure()


@pytest.mark.parametrize("head", ["ncm", "ridge"])
def test_class_statistics_stay_those_of_each_tasks_own_time(head, build):
    stream = toy_stream()
    learner = build(**NEVER, head=head, replay_per_class=2)
    assert learner.statistics_go_stale
    gathered = []
    for index in range(2):
        teach(learner, index + 1, first=index, stream=stream)
        features, labels = learner.features_of(stream.task(index).train)
        gathered += [features[labels == c].double().mean(dim=0) for c in labels.unique()]
    assert learner.statistics.counts.tolist() == [10] * 4 + [0] * 2  # no image counted twice, none left out
    torch.testing.assert_close(learner.statistics.means()[:4], torch.stack(gathered))


# Keys -----------------------------------------------------------------------------------------------------------------


def test_contradictory_keys_are_refused_and_silent_ones_told():
    def faults(**keys):
        return [text.partition(":")[0] for _, text in toy_settings("dylora_moe", **keys).cross_checks()]

    assert faults() == []
    assert faults(top_k_experts=4) == ["top_k_experts"]
    assert faults(router_temperature_end=3.0) == ["router_temperature_end"]
    assert faults(router_lr=0.001, min_lr=0.01) == ["min_lr"]
    assert faults(expert_rank_max=2) == ["expert_rank_max"]
    assert faults(merge_below=0.1, use_moe_routing=False) == ["merge_below"]
    assert faults(lora_target=()) == faults(lora_target=("qkv", "qkv")) == ["lora_target"]
    assert faults(lora_target=("qkv", "fc2")) == []

    def told(**keys):
        return list(toy_settings("dylora_moe", **keys).remarks())

    assert told() == []
    assert told(novelty_threshold=0.3) == [
        "novelty_threshold acts with novelty_threshold_mode calibrated only while no task had two classes"
    ]
    assert told(plateau_epochs=3) == ["no expert ever freezes: 2 epochs show no plateau over plateau_epochs 3"]
    assert told(**FIXED, novelty_delta=0.2, novelty_quantile=0.2) == [
        "these keys do not act with novelty_threshold_mode fixed: novelty_delta, novelty_quantile"
    ]
    assert "router_lr" in told(use_moe_routing=False, router_lr=0.1)[0]
    assert "distill_on" in told(distill_on="logits")[0]
    assert "rank_growth_step" in told(rank_growth_step=2)[0]
    assert told(replay_per_class=2) == ["replay_per_class 2: training images are kept, the run is not rehearsal-free"]
    assert "no rank ever grows" in told(expert_rank_max=9, epochs=2)[0]


# Fixed instead of grown -----------------------------------------------------------------------------------------------


def test_all_experts_from_the_start_learn_together_and_none_is_added(build):
    learner = build(grow_experts=False, num_experts=3, top_k_experts=2, init_lr=0.2, **ALWAYS)
    assert len(learner.experts) == 3
    before = [experts_of(learner, e) for e in range(3)]
    teach(learner, 1)
    assert all(not torch.equal(experts_of(learner, e), before[e]) for e in range(3))
    teach(learner, 2, first=1)
    assert len(learner.experts) == 3
    assert [d.reason for d in learner.decisions] == ["first", "full"]
    assert all(columns_of(learner, e).any() for e in range(3))


def test_fewer_experts_than_at_the_start_are_restored(build, toy_learner):
    learner = teach(build(grow_experts=False, num_experts=3, merge_below=1.0), 1)
    assert len(learner.experts) < 3
    again = build(grow_experts=False, num_experts=3, merge_below=1.0)
    again.restore(json.loads(json.dumps(learner.structure())))
    again.load_own_state(learner.own_state())
    images = images_of(toy_stream())
    torch.testing.assert_close(again.eval().logits(images), learner.logits(images), rtol=0, atol=0)


# Aimed columns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["token", "sample"])
@pytest.mark.parametrize("scope", ["shared", "layer"])
def test_an_aimed_column_leaves_old_images_to_the_old_expert(build, scope, granularity):
    def share_of_the_new(start):
        where = {
            "router_scope": scope,
            "router_granularity": granularity,
            "maturity_tasks": None,
            "maturity_steps": None,
        }
        learner = build(router_column_start=start, init_lr=1e-4, min_lr=0.0, **where, **ALWAYS)
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
    assert any(text.startswith("router_column_start: prototype tells") for text in texts)


# What is frozen, and what a teacher is ----------------------------------------------------------------------------------


def test_an_expert_frozen_while_young_is_mature(build):
    learner = teach(
        build(
            freeze_on_convergence=True, plateau_epochs=1, plateau_tolerance=0.99, maturity_tasks=3, epochs=3, **ALWAYS
        ),
        2,
    )
    assert [e.frozen for e in learner.experts] == [True, True]
    learner._set_modes()
    assert not any(e.young for e in learner.experts)
    assert [row["expert"] for row in rows(learner, "mature")] == [0, 1]


def test_the_teacher_scores_with_the_head_it_had(build):
    stream = toy_stream()
    learner = teach(build(**NEVER, distill_coef=1.0, distill_on="logits"), 1, stream=stream)
    teacher, images = learner._teacher(stream.task(1)), images_of(stream)
    with torch.no_grad():
        features = learner.features(images)
        assert float(learner._distance(features, images, teacher, stream.task(1))) == pytest.approx(0, abs=1e-6)
        learner.head.weight[:2] *= 0.1
        assert float(learner._distance(features, images, teacher, stream.task(1))) > 1e-4


def test_experts_that_were_there_from_the_start_belong_to_no_task(build):
    assert teach(build(grow_experts=False), 1).task_experts() == {}
    assert teach(build(**ALWAYS), 2).task_experts() == {0: 0, 1: 1}
    faults = [text for _, text in toy_settings("dylora_moe", grow_experts=False, train_experts="target").cross_checks()]
    assert len(faults) == 1 and faults[0].startswith("train_experts: target would train one")
