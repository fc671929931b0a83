"""Every method with every head it takes, and a learner that has learned all toy tasks."""

from typing import get_args

import pytest

import models

METHODS = models.available()
# these methods stand for all in tests that run each head alone; tests/contract/test_heads.py has all heads of every method
STAND_FOR_ALL = {"lda": ("simplecil", "nested_lora"), "aligned": ("finetune", "sema")}


def _heads(method):
    """The method with each head it takes; all but its default head are slow, as repetitions of the same test."""
    field = models.settings_of(method).model_fields["head"]
    for head in get_args(field.annotation):
        if method not in STAND_FOR_ALL.get(head, (method,)):
            continue
        yield pytest.param(method, head, marks=() if head == field.default else pytest.mark.slow)


HEADS = [case for method in METHODS for case in _heads(method)]


def run(learner, stream, tasks=None, first=0):
    """The learner after the tasks from `first` to before `tasks` (default: all), hooks called in the order of a run."""
    for index in range(first, len(stream) if tasks is None else tasks):
        learner.begin_task()
        task = stream.task(index, with_past=learner.uses_past)
        learner.remember_features(task)
        learner.learn(task)
        learner.consolidate(task)
    learner.eval()
    return learner


def images_of(stream, task=0):
    return next(iter(stream.test(task).batches(100, augment=False, shuffle=False)))[0]
