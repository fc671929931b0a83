"""Novelty: similarities by hand, thresholds by formula, the bootstrap against a loop, and decisions that can be replayed."""

import math
from dataclasses import replace

import pytest
import torch

from backbone.experts import novelty
from backbone.experts.novelty import Policy, decide, replay

AXES = torch.eye(4, dtype=torch.float64)


def test_class_means_and_counts():
    tokens = torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 5.0]])
    means, counts = novelty.class_means(tokens, torch.tensor([7, 7, 3]))
    assert means.tolist() == [[5, 5], [2, 1]] and counts.tolist() == [1, 2]
    assert means.dtype == torch.float64


def test_the_centre_is_the_mean_over_images_and_absent_for_a_lone_embedding():
    stored = torch.tensor([[0.0, 0.0], [4.0, 8.0]])
    assert novelty.centre(stored, torch.tensor([3, 1])).tolist() == [1, 2]
    assert novelty.centre(stored[1:], torch.tensor([5])).tolist() == [0, 0]


def test_similarity_is_a_cosine_around_the_centre_the_largest_or_the_median_of_a_skill_and_the_mean_over_classes():
    middle = torch.tensor([1.0, 1.0, 1.0, 1.0])
    stored = middle + torch.stack([AXES[0], -AXES[0], AXES[1], AXES[2]])
    new = middle + torch.stack([5 * AXES[0], AXES[0] + AXES[1]])  # cosines 1 -1 0 0 and s -s s 0, s = 1 / sqrt 2
    s = 0.5**0.5
    largest = novelty.similarities(new, stored, [0, 0, 0, 1], middle, "max")
    assert largest.tolist() == pytest.approx([(1 + s) / 2, 0])
    median = novelty.similarities(new, stored, [0, 0, 0, 1], middle, "median")
    assert median.tolist() == pytest.approx([s / 2, 0])
    assert novelty.similarities(middle[None], stored, [0] * 4, middle, "max").tolist() == [
        0
    ]  # no direction, no likeness


def test_calibration_compares_classes_with_the_others_of_their_task():
    stored = torch.stack([AXES[0], AXES[0] + AXES[1], AXES[2], AXES[3]])
    s, none = 0.5**0.5, torch.zeros(4)
    # task 0: each class finds its sibling at s; task 1: 0 and 0; a task of one class says nothing
    assert novelty.calibrate(stored, [0, 0, 1, 1], none, "max", 0.0) == 0
    assert novelty.calibrate(stored, [0, 0, 1, 1], none, "max", 0.5) == pytest.approx(s / 2)
    assert novelty.calibrate(stored, [0, 0, 1, 2], none, "max", 0.5) == pytest.approx(s)
    assert novelty.calibrate(stored[:2], [0, 1], none, "max", 0.5) is None


def test_the_interval_is_that_of_a_loop_over_resamples():
    torch.manual_seed(0)
    tokens, labels = torch.randn(12, 4) + AXES[0], torch.tensor([0] * 5 + [1] * 7)
    known = AXES[:3], [0, 1, 1], torch.zeros(4), "max"
    low, high = novelty.interval(
        tokens, labels, *known, confidence=0.8, resamples=50, generator=torch.Generator().manual_seed(3)
    )
    generator, rows = torch.Generator().manual_seed(3), []
    for own in (tokens[:5], tokens[5:]):
        rows.append(
            [own[pick].double().mean(0) for pick in torch.randint(len(own), (50, len(own)), generator=generator)]
        )
    drawn = torch.stack([novelty.similarities(torch.stack(pair), *known).max() for pair in zip(*rows, strict=True)])
    estimate = novelty.similarities(novelty.class_means(tokens, labels)[0], *known).max()
    assert low == pytest.approx(min(drawn.quantile(0.1), estimate)) and high == pytest.approx(
        max(drawn.quantile(0.9), estimate)
    )
    assert low < high


def test_identical_images_leave_no_doubt():
    tokens, labels = AXES[:1].expand(6, 4), torch.zeros(6, dtype=torch.long)
    known = AXES[:2], [0, 1], torch.zeros(4), "max"
    generator = torch.Generator().manual_seed(0)
    bounds = novelty.interval(tokens, labels, *known, confidence=0.95, resamples=20, generator=generator)
    assert bounds == pytest.approx((1, 1))


def test_thresholds():
    assert Policy(0.5).threshold_at(3, 0.9) == 0.5
    assert Policy(0.5, "adaptive", delta=0.1).threshold_at(3) == pytest.approx(0.5 - 0.1 * math.log(4))
    assert Policy(0.5, "calibrated").threshold_at(3, 0.9) == 0.9
    assert Policy(0.5, "calibrated").threshold_at(3, None) == 0.5


POLICY = Policy(0.5, min_samples=10, cooldown=1, max_experts=4)


@pytest.mark.parametrize(
    ("given", "spawn", "skill", "reason"),
    [
        ({"similar": ()}, True, 0, "first"),
        ({}, True, 2, "novel"),
        ({"similar": (0.5, 0.2)}, False, 0, "similar"),
        ({"similar": (0.6, 0.6)}, False, 0, "similar"),
        ({"bounds": (0.3, 0.5)}, False, 1, "uncertain"),
        ({"bounds": (0.3, 0.49)}, True, 2, "novel"),
        ({"images": 9}, False, 1, "few images"),
        ({"last_spawn": 4}, False, 1, "cooldown"),
        ({"last_spawn": 3}, True, 2, "novel"),
        ({"similar": (0.1, 0.2, 0.3, 0.4)}, False, 3, "full"),
    ],
)
def test_decisions_and_their_reasons(given, spawn, skill, reason):
    made = decide(POLICY, **({"task": 5, "images": 10, "similar": (0.1, 0.4)} | given))
    assert (made.spawn, made.skill, made.reason) == (spawn, skill, reason)
    if reason != "first":
        assert made.threshold == 0.5 and made.best == max(made.similarities) and made.low <= made.best <= made.high


def logged(policy, best, images=10):
    """The decisions of a run whose similarity to its last skill is `best[t]` at task t."""
    decisions, last, experts = [], 0, 1
    for task, value in enumerate(best):
        similar = [] if value is None else [value - 0.1] * (experts - 1) + [value]
        made = decide(policy, task=task, images=images, similar=similar, last_spawn=last)
        last, experts = (task, experts + (task > 0)) if made.spawn else (last, experts)
        decisions.append(made)
    return decisions


BEST = [None, 0.3, 0.45, 0.2, 0.6, 0.45]


@pytest.mark.parametrize("policy", [Policy(0.5), Policy(0.5, "adaptive", 0.1), replace(POLICY, threshold=0.7)])
def test_replay_at_the_same_policy_gives_the_same_tasks(policy):
    decisions = logged(policy, BEST)
    assert replay(decisions, policy) == [d.task for d in decisions if d.spawn]


def test_replay_at_other_policies():
    decisions = logged(Policy(0.5), BEST)
    assert replay(decisions, Policy(0.25)) == [0, 3]
    assert replay(decisions, Policy(-2)) == [0]
    assert replay(decisions, Policy(2)) == [0, 1, 2, 3, 4, 5]
    assert replay(decisions, Policy(2, cooldown=1)) == [0, 2, 4]
    assert replay(decisions, Policy(2, max_experts=3)) == [0, 1, 2]
    assert replay(decisions, Policy(2, min_samples=11)) == [0]
    # its own experts count: thresholds 0.5 - 0.3 log(1 + k) are 0.29, 0.29, 0.29, ... until one is spawned at task 3
    assert replay(decisions, Policy(0.5, "adaptive", 0.3)) == [0, 3]
