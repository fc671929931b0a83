"""What is known of the tasks before a run: steps of each, the words for some of them, and the counts of a stream."""

import pytest

from tests.helpers.toy import toy_dataset, toy_stream
from utils.config.split import Split, named


@pytest.mark.parametrize(
    "tasks, count, text",
    [
        ([4], 5, "task 5"),
        ([0, 2], 5, "tasks 1 and 3"),
        ([0, 2, 3, 4], 5, "tasks 1 and 3 to 5"),
        ([0, 1, 4], 6, "tasks 1, 2 and 5"),
        ([0, 1, 2], 3, "every task"),
        ([0], 1, "task 1"),
    ],
)
def test_tasks_are_named_as_people_do(tasks, count, text):
    assert named(tasks, count) == text


def test_steps_of_each_task():
    split = Split((2, 3, 1), (20, 31, 7))
    assert split.steps(3, 10) == [6, 12, 3]
    assert split.steps(1, 10, held_out=0.1) == [2, 3, 1]  # 18, 28 and 6 images are left: at least one a class is not
    assert Split((2, 3, 1)).steps(3, 10) is None


def test_a_stream_counts_its_training_images_by_task():
    stream = toy_stream(toy_dataset(classes=5, train=7))
    assert stream.sizes == [2, 2, 1] and stream.train_images() == [14, 14, 7]
    assert [len(stream.task(t).train) for t in range(3)] == [14, 14, 7]
