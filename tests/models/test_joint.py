"""Joint training in rounds: when they end, on which images, and that one round is what it was."""

import json

import pytest
import torch

from models import joint
from tests.helpers.toy import toy_stream


def rows(learner, kind):
    lines = (learner.log.folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def phases(learner):
    return [row["phase"] for row in rows(learner, "epoch")]


@pytest.mark.parametrize(
    ("accuracies", "rounds"), [([0.5, 0.7, 0.7, 0.9], 3), ([0.0, 0.9], 1), ([0.1, 0.2, 0.3, 0.4], 4)]
)
def test_rounds_end_when_held_out_images_score_no_better(accuracies, rounds, toy_learner, monkeypatch):
    scores = iter(accuracies)
    monkeypatch.setattr(joint, "held_out_score", lambda *_: (1.0, next(scores)))
    learner = toy_learner("joint", epochs=1, max_rounds=4)
    learner.learn(toy_stream().task(0))
    assert phases(learner) == [*(f"joint {n}" for n in range(1, rounds + 1)), "joint all"]
    assert [row["accuracy"] for row in rows(learner, "round")] == [100 * a for a in accuracies[:rounds]]


def test_the_judging_images_are_trained_on_in_the_last_round_alone(toy_learner):
    learner, stream = toy_learner("joint", epochs=1, max_rounds=2, held_out_ratio=0.25), toy_stream()
    task = stream.task(0)
    everything = len(task.train)
    learner.learn(task)
    (held,) = rows(learner, "held_out")
    images = {row["phase"]: row["images"] for row in rows(learner, "epoch")}
    assert set(held["samples"]) < set(task.train.rows.tolist())
    assert images["joint 1"] == everything - len(held["samples"]) and images["joint all"] == everything


def test_held_out_score_is_that_of_the_linear_head(toy_learner):
    learner, task = toy_learner("joint", epochs=1), toy_stream().task(0)
    learner.learn(task)
    loss, accuracy = joint.held_out_score(learner, task.train, 0, task.total)
    assert learner.training
    learner.eval()
    with torch.no_grad():
        batches = list(
            learner.outputs(lambda x: learner.head(learner.backbone(x)), task.train, 7, augment=False, shuffle=False)
        )
    scores, labels = torch.cat([s for s, _ in batches])[:, : task.total], torch.cat([y for _, y in batches])
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(scores, labels).item(), rel=1e-5)
    assert accuracy == (scores.argmax(1) == labels).float().mean().item()


def test_one_round_is_one_phase(toy_learner):
    learner = toy_learner("joint", epochs=2)
    learner.learn(toy_stream().task(0))
    assert phases(learner) == ["joint", "joint"] and not rows(learner, "round")
