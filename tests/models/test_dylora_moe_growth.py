"""When dylora_moe adds an expert: what decides, what is logged of it, and what a new expert changes."""

import json
from dataclasses import fields

import pytest
import torch

from backbone.experts import novelty, routed
from backbone.experts.novelty import Decision, replay
from models.families.experts import THRESHOLDS, policy_of
from tests.helpers.dylora import ALWAYS, NEVER, columns_of, experts_of, teach
from tests.helpers.nested import images_of, rows
from tests.helpers.toy import toy_settings, toy_stream


def test_the_thresholds_ends_spawn_always_up_to_the_most_or_never(dylora_moe):
    assert len(teach(dylora_moe(**ALWAYS)).population.experts) == 3
    assert len(teach(dylora_moe(**ALWAYS, num_experts=2)).population.experts) == 2
    assert len(teach(dylora_moe(**NEVER)).population.experts) == 1
    learner = teach(dylora_moe(**ALWAYS, novelty_cooldown=1))
    assert [r["reason"] for r in rows(learner, "novelty")[-3:]] == ["first", "cooldown", "novel"]
    assert [len(r.columns) for r in routed.routers_of(learner.backbone)] == [2, 2]
    assert learner.adapters_per_layer() == [0, 2, 2]


def test_few_images_never_spawn(dylora_moe):
    learner = teach(dylora_moe(**ALWAYS, novelty_min_samples=21))
    assert [r["reason"] for r in rows(learner, "novelty")] == ["first", "few images", "few images"]


def test_decisions_carry_their_numbers_and_can_be_replayed_from_the_results(dylora_moe):
    keys = {"novelty_threshold": 0.3}
    learner = teach(dylora_moe(**keys))
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


def test_the_results_carry_the_decisions_and_the_log_tells_other_thresholds(dylora_moe):
    stream, learner, carried = toy_stream(), dylora_moe(novelty_threshold=0.3), []
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
        again = teach(dylora_moe(novelty_threshold=high + shift), 2)
        assert rows(again, "novelty")[-1]["spawn"] is (shift > 0)


def test_what_no_threshold_would_spawn_is_told_with_the_reason(dylora_moe):
    learner = teach(dylora_moe(**NEVER, novelty_min_samples=21), 2)
    assert (
        "similar, expert 0 goes on; would spawn at no threshold (few images)"
        in (learner.log.folder / "run.log").read_text()
    )


def test_an_estimate_that_is_not_sure_does_not_spawn_unless_confidence_is_off(dylora_moe):
    teach(first := dylora_moe(**NEVER), 2)
    row = rows(first, "novelty")[-1]
    between = {"novelty_threshold": (row["best"] + row["high"]) / 2}
    assert row["best"] < row["high"]
    assert rows(teach(dylora_moe(**between), 2), "novelty")[-1]["reason"] == "uncertain"
    assert rows(teach(dylora_moe(**between, novelty_confidence=0.0), 2), "novelty")[-1]["reason"] == "novel"


def test_embeddings_are_the_class_means_of_the_prefix_and_training_does_not_move_them(dylora_moe):
    stream = toy_stream()
    learner = dylora_moe(**ALWAYS)
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
    assert learner.population.owners == [(0, 0), (0, 0), (1, 1), (1, 1), (2, 2), (2, 2)]
    assert learner.task_experts() == {0: 0, 1: 1, 2: 2}


def test_confidence_zero_uses_the_estimate_alone(dylora_moe):
    for row in rows(teach(dylora_moe(novelty_confidence=0.0)), "novelty")[1:]:
        assert row["low"] == row["best"] == row["high"]


def test_calibration_and_median_reach_the_decision(dylora_moe):
    learner = teach(dylora_moe(novelty_threshold_mode="calibrated", novelty_similarity="median", novelty_quantile=1.0))
    for row in rows(learner, "novelty")[1:]:
        assert row["threshold"] == row["calibrated"] != 0.5
    adaptive = teach(dylora_moe(novelty_threshold_mode="adaptive", novelty_delta=0.1, **{"novelty_threshold": 2.0}), 2)
    assert rows(adaptive, "novelty")[-1]["threshold"] == pytest.approx(2 - 0.1 * 0.6931472)


def test_spawning_alone_scales_the_old_experts_and_adds_nothing_of_its_own(dylora_moe):
    """The new column opens at the gate of the others; with its logit far below, everything is as it was."""
    stream = toy_stream()
    learner = teach(dylora_moe(**ALWAYS), 1, stream=stream)
    with torch.no_grad():
        before = learner.features(images_of(stream))
        learner._spawn(stream.task(1))
        learner.population.set_routers()
        for router in routed.routers_of(learner.backbone):
            assert router.offset.tolist() == [0, 0]
            assert torch.equal(router(torch.randn(2, 5, 16)).gates, torch.full((2, 5, 2), 0.5))
            router.set_offset(1, -1e4)
        torch.testing.assert_close(learner.features(images_of(stream)), before, rtol=0, atol=1e-6)


# All experts from the start -------------------------------------------------------------------------------------------


def test_all_experts_from_the_start_learn_together_and_none_is_added(dylora_moe):
    learner = dylora_moe(grow_experts=False, num_experts=3, top_k_experts=2, init_lr=0.2, **ALWAYS)
    assert len(learner.population.experts) == 3
    before = [experts_of(learner, e) for e in range(3)]
    teach(learner, 1)
    assert all(not torch.equal(experts_of(learner, e), before[e]) for e in range(3))
    teach(learner, 2, first=1)
    assert len(learner.population.experts) == 3
    assert [d.reason for d in learner.decisions] == ["first", "full"]
    assert all(columns_of(learner, e).any() for e in range(3))


def test_fewer_experts_than_at_the_start_are_restored(dylora_moe, toy_learner):
    learner = teach(dylora_moe(grow_experts=False, num_experts=3, merge_below=1.0), 1)
    assert len(learner.population.experts) < 3
    again = dylora_moe(grow_experts=False, num_experts=3, merge_below=1.0)
    again.restore(json.loads(json.dumps(learner.structure())))
    again.load_own_state(learner.own_state())
    images = images_of(toy_stream())
    torch.testing.assert_close(again.eval().logits(images), learner.logits(images), rtol=0, atol=0)


def test_experts_that_were_there_from_the_start_belong_to_no_task(dylora_moe):
    assert teach(dylora_moe(grow_experts=False), 1).task_experts() == {}
    assert teach(dylora_moe(**ALWAYS), 2).task_experts() == {0: 0, 1: 1}
    faults = [text for _, text in toy_settings("dylora_moe", grow_experts=False, train_experts="target").cross_checks()]
    assert len(faults) == 1 and faults[0].startswith("train_experts: with grow_experts false")
