"""utils/data/batches.py: published class orders, ragged tasks, and batches that depend on seeds alone."""

import numpy as np
import pytest
import torch

from tests.helpers.batches import gather, stream, toy
from utils.data.dataset import Dataset
from utils.data.images import ImageArray, ImageFiles
from utils.data.tasks import drawn_order, task_sizes


def by_index(batches):
    images, labels, index = gather(batches)
    back = index.argsort()
    return images[back], labels[back]


def test_class_orders_are_the_published_ones():
    assert drawn_order(100, 1993)[:10] == [68, 56, 78, 8, 23, 84, 90, 65, 74, 76]
    assert sorted(drawn_order(100, 1993)) == list(range(100))
    np.random.seed(7)
    assert drawn_order(200, 7) == np.random.permutation(200).tolist()
    assert drawn_order(4, 1993, shuffle=False) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"must lie in 0\.\.4294967295, got -1"):
        drawn_order(4, -1)


def test_class_order_seed_separates_order_and_run():
    assert stream(seed=1, class_order_seed=9).order == stream(seed=2, class_order_seed=9).order == drawn_order(5, 9)
    assert stream(seed=1).order == drawn_order(5, 1)
    assert stream(shuffle=False).order == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ((100, 10, 10), [10] * 10),
        ((10, 2, 3), [2, 3, 3, 2]),
        ((100, 50, 30), [50, 30, 20]),
        ((3, 1, 1), [1, 1, 1]),
        ((5, 5, 2), [5]),
        ((5, 4, 9), [4, 1]),
        ((1, 1, 1), [1]),
    ],
)
def test_task_sizes(arguments, sizes):
    assert task_sizes(*arguments) == sizes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 11, 1), "asks for 11 classes in the first task, but there are only 10"),
        ((10, 0, 1), "at least 1, got 0 and 1"),
        ((10, 2, 0), "at least 1, got 2 and 0"),
        ((0, 1, 1), "there are only 0"),
    ],
)
def test_impossible_splits(arguments, message):
    with pytest.raises(ValueError, match=message):
        task_sizes(*arguments)


def test_tasks_hold_their_classes_renumbered():
    data = toy()
    tasks = stream(data)
    assert len(tasks) == 3 and tasks.sizes == [2, 2, 1]
    assert tasks.class_names == [f"c{k}" for k in tasks.order]
    seen = []
    for t in range(3):
        task = tasks.task(t)
        assert (task.index, task.first, task.total) == (t, 2 * t, min(2 * t + 2, 5)) and task.past == ()
        assert list(task.class_ids) == tasks.order[task.first : task.total]
        for part, source in ((task.train, data.train), (tasks.test(t), data.test)):
            assert part.labels.dtype == torch.int64
            assert [tasks.order[k] for k in part.labels.tolist()] == source.labels[part.rows].tolist()
            assert (np.diff(part.rows) > 0).all()
            images, labels, index = gather(part.batches(4, augment=False, shuffle=False))
            assert torch.equal(images, source.images[torch.from_numpy(part.rows)].float() / 255)
            assert torch.equal(labels, part.labels) and index.tolist() == list(range(len(part)))
        seen += task.train.rows.tolist()
    assert sorted(seen) == list(range(30))
    with pytest.raises(IndexError):
        tasks.task(3)


def test_past_only_on_request():
    tasks = stream()
    past = tasks.task(2, with_past=True).past
    assert [sorted(set(part.labels.tolist())) for part in past] == [[0, 1], [2, 3]]
    joined = tasks.task(2).train.join(*past)
    assert len(joined) == 30 and sorted(joined.rows.tolist()) == list(range(30))
    # replayed samples are drawn anew, not as they were in their own task
    old, new = tasks.task(0).train, past[0]
    assert not torch.equal(by_index(old.batches(4))[0], by_index(new.batches(4))[0])


@pytest.mark.parametrize("kind", ["small", "cifar", "imagenet"])
def test_augmentation_is_independent_of_the_batch_size(kind):
    train = stream(toy(kind=kind)).task(0).train
    images, labels = by_index(train.batches(1))
    for size in (5, 12, 100):
        batches = train.batches(size)
        assert len(batches) == -(-12 // size)
        assert [len(b[0]) for b in batches] == [size] * (12 // size) + [12 % size] * (12 % size > 0)
        again, same = by_index(batches)
        assert torch.equal(images, again) and torch.equal(labels, same)


def test_draws_follow_seed_task_stream_and_epoch():
    train = stream().task(0).train
    reference = gather(train.batches(4))
    assert all(torch.equal(a, b) for a, b in zip(reference, gather(train.batches(4)), strict=True))
    others = [
        train.batches(4, epoch=1),
        train.batches(4, draw="rd"),
        stream(seed=1994, class_order_seed=1993).task(0).train.batches(4),
    ]
    for other in others:
        assert by_index(other)[0].shape == (12, 3, 32, 32)
        assert not torch.equal(gather(other)[2], reference[2])
        assert not torch.equal(by_index(other)[0], by_index(train.batches(4))[0])
    batches = train.batches(4)
    assert all(torch.equal(a, b) for a, b in zip(gather(batches), gather(batches), strict=True))


def test_global_generators_are_left_alone(on_disk):
    before = torch.get_rng_state()
    for workers in (0, 1):
        gather(stream(on_disk, num_workers=workers).task(0).train.batches(4))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("augment", [True, False])
def test_files_give_the_same_with_and_without_workers(on_disk, augment):
    runs = [stream(on_disk, num_workers=w).task(0).train.batches(4, epoch=3, augment=augment) for w in (0, 1, 2)]
    alone, *others = [gather(run) for run in runs]
    assert alone[0].shape == (11, 3, 32, 32)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(alone, other, strict=True))


@pytest.mark.parametrize("kind", ["small", "imagenet"])
def test_memory_gives_the_same_with_and_without_workers(kind):
    runs = [gather(stream(toy(kind=kind), num_workers=w).task(0).train.batches(5)) for w in (0, 2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_is_one_plain_error(tmp_path, workers):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"nothing")
    images = ImageFiles([bad, bad], [0, 0])
    data = Dataset("bad", ["a"], images, images, "imagenet")
    with pytest.raises(ValueError, match="is not a readable image") as caught:
        list(stream(data, init_cls=1, increment=1, num_workers=workers).test(0).batches(1))
    assert str(bad) in str(caught.value) and "Traceback" not in str(caught.value)


def test_split_is_stratified_seeded_and_complete():
    train = stream(toy(per_class=10)).task(0).train
    kept, held = train.split(0.25, "a")
    assert held.labels.bincount().tolist() == [2, 2] and kept.labels.bincount().tolist() == [8, 8]
    assert sorted([*kept.rows, *held.rows]) == train.rows.tolist()
    assert train.split(0.25, "a")[1].rows.tolist() == held.rows.tolist()
    assert train.split(0.25, "b")[1].rows.tolist() != held.rows.tolist()
    other = stream(toy(per_class=10), seed=9, class_order_seed=1).task(0).train
    assert other.split(0.25, "a")[1].rows.tolist() != held.rows.tolist()
    # a sample keeps its augmentation whatever it is grouped with
    where = np.searchsorted(train.rows, kept.rows)
    assert torch.equal(by_index(kept.batches(3))[0], by_index(train.batches(3))[0][where])


def test_split_keeps_one_on_each_side():
    train = stream(toy(per_class=2)).task(0).train
    for ratio in (0.01, 0.99):
        kept, held = train.split(ratio, "a")
        assert kept.labels.bincount().tolist() == held.labels.bincount().tolist() == [1, 1]
    with pytest.raises(ValueError, match="class 0 of task 0 has 1 sample, too few"):
        kept.split(0.5, "a")
    with pytest.raises(ValueError, match="between 0 and 1, got 1"):
        train.split(1, "a")


def test_one_class_at_a_time():
    tasks = stream(toy(classes=3), init_cls=1, increment=1)
    assert [tasks.task(t).train.labels.unique().tolist() for t in range(3)] == [[0], [1], [2]]


def test_a_class_without_images_is_named():
    data = toy()
    short = ImageArray(data.test.images[:3], data.test.labels[:3])
    with pytest.raises(ValueError, match=r"dataset toy: no test images for 2 of 5 classes: c3, c4"):
        stream(Dataset("toy", data.class_names, data.train, short, "small"))


def test_batch_size_below_one():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        stream().task(0).train.batches(0)
