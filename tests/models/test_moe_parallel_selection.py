"""Which expert of moe_parallel wins a task: on which images, by which accuracy, and what breaks a tie."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers.nested import learn, rows
from tests.helpers.toy import toy_dataset, toy_stream
from utils.data.batches import TaskData


def voting(learner, votes):
    """Expert k gives class votes[k][0] the score votes[k][1] and all others 0, whatever the image."""

    def scores(images, count):
        made = torch.zeros(count, len(images), learner.num_classes, dtype=torch.float64)
        for k, (label, score) in enumerate(votes):
            made[k, :, label] = score
        return made

    learner._branch_scores = scores
    return learner


@pytest.mark.parametrize(
    ("votes", "winner", "accuracies", "margin"),
    [
        ([(0, 9.0), (2, 1.0), (1, 1.0)], 1, [0, 50, 0], 50),  # 0 and 1 are old classes: these are never right
        ([(2, 3.0), (3, 1.0), (0, 9.0)], 1, [50, 50, 0], 0),  # as right as expert 0, but less sure of what is wrong
        ([(0, 9.0), (2, 1.0), (2, 1.0)], 1, [0, 50, 50], 0),  # alike in everything: the lowest index
        (
            [(2, 9.0), (2, 2.0), (5, 99.0)],
            1,
            [50, 50, 0],
            0,
        ),  # 5 is not seen yet: 2 then says nothing, class 0 comes first
    ],
)
def test_the_highest_accuracy_wins_then_the_lowest_loss_then_the_lowest_index(
    votes, winner, accuracies, margin, contest
):
    learner = voting(contest(epochs=0), votes)
    learner.learn(toy_stream().task(1))
    (facts,) = learner.selections()
    assert (facts["winner"], learner.winner) == (winner, winner)
    assert facts["accuracies"] == accuracies and facts["margin"] == margin
    assert (facts["task"], facts["split"], facts["samples"]) == (1, "validation", 2)
    label, score = votes[winner]
    table = torch.zeros(4, dtype=torch.float64)
    table[label] = score
    assert facts["losses"][winner] == pytest.approx((table.logsumexp(0) - score / 2).item())  # right for every second
    (row,) = rows(learner, "selection")
    assert {k: row[k] for k in facts} == facts
    text = (Path(learner.log.folder) / "run.log").read_text()
    assert f"expert {winner} wins on 2 validation images" in text and f"margin {margin:.1f}" in text


def trained_rows(monkeypatch):
    """Rows of the data set that training batches were drawn from, task by task."""
    seen, real = [], TaskData.batches

    def watched(self, *args, **other):
        if other.get("draw") == "func":
            seen.append(self.rows.tolist())
        return real(self, *args, **other)

    monkeypatch.setattr(TaskData, "batches", watched)
    return seen


def test_held_out_samples_are_stratified_seeded_logged_and_never_trained_on(contest, monkeypatch):
    seen = trained_rows(monkeypatch)
    dataset = toy_dataset()

    def held_of(seed):
        stream = toy_stream(dataset, seed=seed, class_order_seed=1)
        learner = learn(contest(moe_val_ratio=0.3, epochs=1), stream, 2)
        return stream, [r["samples"] for r in rows(learner, "held_out")][-2:]

    stream, held = held_of(1)
    for index in range(2):
        everything = stream.task(index).train
        assert sorted(held[index] + seen[index]) == everything.rows.tolist()
        labels = dataset.train.labels[held[index]]
        assert sorted(labels.tolist()) == sorted(stream.task(index).class_ids * 3)  # 3 of 10 each
    assert held_of(1)[1] == held and held_of(2)[1] != held


def test_selection_is_the_accuracy_of_each_branch_on_the_held_out_images(contest):
    learner = contest(moe_val_ratio=0.5, moe_heads="per_expert", eval_batch_size=7, epochs=6)
    kept = {}
    learner._keep_winners_head = lambda task: None  # so that the heads can be looked at
    learner.learn(toy_stream().task(0))
    _, held = toy_stream().task(0).train.split(0.5, draw="selection")
    images, labels, _ = next(iter(held.batches(100, augment=False, shuffle=False)))
    learner.eval()
    for k, head in enumerate(learner.heads()):
        for nested in learner.backbone.slots.values():
            nested.use("combined", [k])
        with torch.no_grad():
            scores = head(learner.backbone(images))[:, :2]
        kept[k] = (
            100 * (scores.argmax(1) == labels).double().mean().item(),
            nn.functional.cross_entropy(scores, labels),
        )
    (facts,) = learner.selections()
    assert facts["samples"] == 10 and facts["accuracies"] == pytest.approx([kept[k][0] for k in range(3)])
    assert facts["losses"] == pytest.approx([kept[k][1].item() for k in range(3)], abs=1e-9)


def test_selection_on_test_data_is_asked_for_warned_about_and_told(contest):
    plain = contest()
    assert not plain.uses_test and toy_stream().task(1).test is None
    learner = contest(selection_split="test")
    assert learner.uses_test
    task = toy_stream().task(1, with_test=learner.uses_test)
    learner.learn(task)
    (facts,) = learner.selections()
    assert (facts["split"], facts["samples"]) == ("test", 16)  # all test images of both tasks
    assert "selected on TEST data" in (Path(learner.log.folder) / "run.log").read_text()
    assert rows(learner, "held_out") == []
    with pytest.raises(AssertionError, match="the runner gives the test data"):
        learner.learn(toy_stream().task(1))


@pytest.mark.parametrize(("head", "own_classes"), [("linear", False), ("ncm", True)])
def test_where_statistics_predict_the_linear_head_judges_among_the_tasks_classes(head, own_classes, contest):
    """In the second task the heads' scores are rigged: old classes above all, expert 1 alone right among the new ones."""
    stream = toy_stream()
    learner = contest(head=head, moe_val_ratio=0.5, epochs=0)
    learner.learn(stream.task(0))
    task = stream.task(1)
    _, held = task.train.split(0.5, draw="selection")
    labels = held.labels

    def scores(images, count):
        made = torch.zeros(count, len(images), 6, dtype=torch.float64)
        made[:, :, 0] = 9.0
        for k in range(count):
            made[k].scatter_(1, (labels if k == 1 else 5 - labels)[:, None], 1.0)
        return made

    learner._branch_scores = scores
    learner.learn(task)
    (facts,) = learner.selections()
    assert facts["accuracies"] == ([0.0, 100.0, 0.0] if own_classes else [0.0, 0.0, 0.0])
