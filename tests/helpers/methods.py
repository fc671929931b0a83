"""Every method with every head it takes, and a learner that has learned all toy tasks."""

from typing import get_args

import models

METHODS = models.available()
HEADS = [(m, h) for m in METHODS for h in get_args(models.settings_of(m).model_fields["head"].annotation)]


def run(learner, stream, tasks=None, first=0):
    """The learner after the tasks from `first` to before `tasks` (default: all), hooks called in the order of a run."""
    for index in range(first, len(stream) if tasks is None else tasks):
        learner.begin_task()
        task = stream.task(index, with_past=learner.uses_past)
        learner.learn(task)
        learner.consolidate(task)
    learner.eval()
    return learner


def images_of(stream, task=0):
    return next(iter(stream.test(task).batches(100, augment=False, shuffle=False)))[0]
