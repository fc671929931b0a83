"""InfLoRA: its updates stay out of what old tasks rely on, and its schedule."""

import json
import math

import pytest
import torch

from models.inflora import falling
from tests.helpers.toy import toy_backbone, toy_stream


def learned(learner, stream, tasks):
    for index in range(tasks):
        task = stream.task(index)
        learner.learn(task)
        learner.consolidate(task)
    return learner


def test_the_cosine_and_the_late_one():
    def at(step):
        return math.cos(0.99 * math.pi / 2 * step / 3)

    assert [falling(epoch, 4, late=False) for epoch in range(4)] == [at(0), at(1), at(2), at(3)]
    assert [falling(epoch, 4, late=True) for epoch in range(4)] == [at(0), at(0), at(1), at(2)]
    assert falling(0, 1, late=True) == 1


def test_a_new_update_reads_nothing_that_the_memory_holds(toy_learner):
    learner = toy_learner("inflora", backbone=toy_backbone().double(), rank=3, lamb=0.8, lame=0.9)
    stream = toy_stream()
    learned(learner, stream, 1)
    held = [memory.projector.clone() for memory in learner.memories]
    assert not any(memory.retains for memory in learner.memories) and all(p.any() for p in held)
    task = stream.task(1)
    learner.learn(task)
    for slot, projector in zip(learner.slots(), held, strict=True):
        first, second = slot.of("kv")
        assert (second.down @ projector).abs().max() < 1e-12 < (first.down @ projector).abs().max()
        torch.testing.assert_close(second.down @ second.down.T, torch.eye(3).double() / 3)
        assert second.up.any() and first.up.any()


def test_only_the_new_update_and_the_tasks_rows_move(toy_learner):
    learner, stream = toy_learner("inflora", weight_decay=0.1), toy_stream()
    learned(learner, stream, 1)
    before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    learned_rows = learner.head.weight[:2].clone()
    learner.begin_task()
    learner.learn(stream.task(1))
    after = learner.state_dict()
    same = [n for n in before if not n.startswith(("head.", "memories."))]
    assert all(torch.equal(before[n], after[n]) for n in same)
    assert (
        torch.equal(learner.head.weight[:2], learned_rows)
        and learner.head.weight[2:4].ne(before["head.weight"][2:4]).all()
    )
    assert sum(p.numel() for p in learner.trained.values()) == learner.planned_parameters()[0][1]


def test_thresholds_rise_and_are_logged(toy_learner):
    learner = learned(toy_learner("inflora", lamb=0.6, lame=0.9), toy_stream(), 3)
    rows = [json.loads(line) for line in (learner.log.folder / "metrics.jsonl").read_text().splitlines()]
    found = [row["threshold"] for row in rows if row["kind"] == "memory" and row["layer"] == 0]
    assert found == pytest.approx([0.6, 0.7, 0.8])  # 0.9 would come with a fourth task


def test_a_rank_above_the_width_is_refused(toy_learner):
    with pytest.raises(ValueError, match="rank: 17 directions do not exist, the backbone's width is 16"):
        toy_learner("inflora", rank=17)
