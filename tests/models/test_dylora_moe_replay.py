"""Replay in dylora_moe: which images are kept, that they reach the loss, and that class statistics count none twice."""

import json

import numpy as np
import pytest
import torch

from models.families.replay import herd, herd_classes
from tests.helpers.dylora import ALWAYS, NEVER, teach
from tests.helpers.nested import rows
from tests.helpers.toy import toy_stream
from utils.data.batches import TaskData


def test_herding_follows_the_mean_and_takes_all_of_a_small_class():
    features = torch.tensor([[0.0], [4.0], [1.0], [7.0], [3.0]])  # mean 3
    assert herd(features, 3) == [4, 1, 0 + 2]  # 3; (3 + 4) / 2 is nearer than (3 + 1) / 2; (3 + 4 + 1) / 3
    assert sorted(herd(features, 9)) == [0, 1, 2, 3, 4] and herd(features, 0) == []
    labels = torch.tensor([1, 0, 1, 0, 1])
    assert herd_classes(features, labels, 1) == [1, 2]


def test_kept_images_are_training_images_of_each_earlier_class_and_reach_the_loss(dylora_moe):
    stream = toy_stream()
    learner = dylora_moe(**ALWAYS, replay_per_class=3)
    assert learner.uses_past and not dylora_moe().uses_past
    shown, original = [], TaskData.batches

    def batches(data, *given, **how):
        if how.get("draw") == "func":
            shown.append(data)
        return original(data, *given, **how)

    TaskData.batches = batches
    try:
        teach(learner, 3, stream=stream)
    finally:
        TaskData.batches = original
    assert len(learner.replay_rows) == 3 * 6
    per_task = [r["rows"] for r in rows(learner, "replay")]
    for index, kept in enumerate(per_task):
        own = stream.task(index).train
        where = np.isin(own.rows, kept)
        assert where.sum() == 6 and own.labels[where].bincount().tolist()[-2:] == [3, 3]
    last = shown[-1]
    assert sorted(last.rows) == sorted([*stream.task(2).train.rows, *per_task[0], *per_task[1]])
    assert {r["images"] for r in rows(learner, "epoch") if r["task"] == 2} == {20 + 12}
    assert sum(r["kept"] for r in rows(learner, "replay")) == 6 + 12 + 18


def test_replayed_images_are_told_apart_among_all_seen_classes(dylora_moe):
    """The old classes' rows of the head learn too, and those of classes to come do not."""
    stream = toy_stream()

    def rows_moved(**keys):
        learner = teach(dylora_moe(**NEVER, **keys), 1, stream=stream)
        before = learner.head.weight.clone()
        teach(learner, 2, first=1, stream=stream)
        return (learner.head.weight != before).any(dim=1).tolist()

    assert rows_moved(replay_per_class=2) == [True] * 4 + [False] * 2
    assert rows_moved() == [False] * 2 + [True] * 2 + [False] * 2


def test_replay_lowers_the_loss_of_old_images_among_all_classes(dylora_moe):
    stream = toy_stream()
    images, labels = next(iter(stream.task(0).train.batches(20, augment=False, shuffle=False)))[:2]

    def loss(count):
        learner = teach(dylora_moe(**NEVER, replay_per_class=count, epochs=4), 3, stream=stream)
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(learner.logits(images), labels))

    assert loss(10) < 0.9 * loss(0)


def test_replay_off_is_the_same_run_whether_past_data_are_handed_over_or_not(dylora_moe):
    stream, plain, given = toy_stream(), teach(dylora_moe(**ALWAYS)), dylora_moe(**ALWAYS)
    for index in range(3):
        given.begin_task()
        task = stream.task(index, with_past=True)
        given.learn(task)
        given.consolidate(task)
    assert given.replay_rows == [] and not rows(given, "replay")
    assert all(torch.equal(v, given.own_state()[k]) for k, v in plain.own_state().items())


def test_a_resumed_run_replays_the_same_images(dylora_moe):
    stream, keys = toy_stream(), {**ALWAYS, "replay_per_class": 2}
    whole = teach(dylora_moe(**keys), 2, stream=stream)
    fresh = dylora_moe(**keys)
    fresh.restore(json.loads(json.dumps(whole.structure())))
    fresh.load_own_state({k: v.clone() for k, v in whole.own_state().items()})
    assert fresh.replay_rows == whole.replay_rows and fresh.decisions == whole.decisions
    for made in (whole, fresh):
        teach(made, 3, first=2, stream=stream)
    assert all(torch.equal(v, fresh.own_state()[k]) for k, v in whole.own_state().items())
    assert fresh.structure() == whole.structure()


@pytest.mark.parametrize("head", ["ncm", "ridge"])
def test_class_statistics_stay_those_of_each_tasks_own_time(head, dylora_moe):
    stream = toy_stream()
    learner = dylora_moe(**NEVER, head=head, replay_per_class=2)
    assert learner.statistics_go_stale
    gathered = []
    for index in range(2):
        teach(learner, index + 1, first=index, stream=stream)
        features, labels = learner.features_of(stream.task(index).train)
        gathered += [features[labels == c].double().mean(dim=0) for c in labels.unique()]
    assert learner.statistics.counts.tolist() == [10] * 4 + [0] * 2  # no image counted twice, none left out
    torch.testing.assert_close(learner.statistics.means()[:4], torch.stack(gathered))
