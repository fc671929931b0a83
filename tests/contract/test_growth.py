"""Nothing piles up from task to task but the model itself, for every method; and the arithmetic of benchmarks/growth.py."""

import gc

import pytest
import torch
from torch import nn

from benchmarks.growth import EARLY, SETTLED, line, memory_of, slope, trend, window
from tests.helpers.methods import METHODS
from tests.helpers.toy import toy_dataset, toy_stream

EAGER = {"exp_threshold": 0.0, "novelty_threshold_mode": "fixed", "novelty_threshold": 2.0}  # grow as often as may be


@pytest.fixture
def only_new_objects():
    """Whatever exists before the test is invisible to the garbage collector, whose walk over all objects takes a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("method", METHODS)
def test_between_tasks_only_the_model_is_in_memory(method, toy_learner, only_new_objects):
    """Tensors alive beyond the model are as many bytes after every task: no gradient, optimizer, graph or batch is left.

    The prefix cache is off: it keeps what it may, up to its limit, until the run ends."""
    stream = toy_stream(toy_dataset(train=6), init_cls=1, increment=1)
    learner = toy_learner(method, epochs=1, func_epoch=1, rd_epoch=1, prefix_cache="off", **EAGER)
    beyond = []
    for index in range(6):
        task = stream.task(index, with_past=learner.uses_past)
        learner.learn(task)
        learner.consolidate(task)
        del task
        learner.begin_task()  # until then `trained` holds what a merge replaced
        found = memory_of(learner)
        beyond.append(found["tensors"] - found["model"])
    assert beyond[2:] == [beyond[1]] * 4
    assert all(parameter.grad is None for parameter in learner.parameters())


def test_memory_counts_each_storage_once_and_gradients_too(only_new_objects):
    module = nn.Linear(64, 1, bias=False)
    before = memory_of(module)
    assert before["model"] == 64 * 4
    kept = torch.zeros(1000)
    views = [kept[:10], kept.view(10, 100)]
    assert memory_of(module)["tensors"] - before["tensors"] == 4000
    del views, kept
    module(torch.ones(1, 64)).sum().backward()
    assert memory_of(module)["tensors"] - before["tensors"] == 64 * 4
    module.zero_grad()
    assert memory_of(module)["tensors"] == before["tensors"]


def test_a_row_has_slopes_from_the_tenth_task_on_and_ratios_of_medians_of_five_tasks():
    tasks = 20
    learn = [1.0] * tasks
    learn[EARLY] = 100.0  # one disturbed task of five does not count
    learn[-5:] = [1.5, 1.5, 1.5, 9.0, 0.0]
    memory = [{"resident": 10**9 - 10**8 * t, "tensors": 0, "model": 0} for t in range(SETTLED)]
    memory += [{"resident": 2048 * t, "tensors": 1024 * t, "model": 0} for t in range(tasks - SETTLED)]
    found = {"learn": learn, "whole": learn, "step": [None] * tasks, "memory": memory, "adapters": list(range(tasks))}
    assert line("x", found) == (
        "| x | 4 to 19 | +0.0 | +1.0 | +2.0 | - | - | 1000.0 to 1500.0 | 1.50 | 1.00 | 1000.0 to 1500.0 | 1.50 |"
    )
    assert trend([9.0, 9.0, 0.0, 3.0, *(1.0 + 0.1 * t for t in range(10)), 70.0], 15) == pytest.approx(2.0)
    assert slope([5.0, 3.0, 1.0]) == pytest.approx(-2.0)
    assert window([1.0, 2.0, 3.0], 3) == 2.0 and window([None], 1) is None
