"""Scores a learner on test data, once a task; measures what the age of class statistics costs and what routing does.

Nothing else reads test data. A learner is anything with the verbs of `models.learner.base.Learner` that are used here.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import torch

from utils.data.tasks import TaskStream
from utils.evaluation import metrics, routing
from utils.process import stopwatch


def evaluate(
    learner: Any,
    stream: TaskStream,
    index: int,
    device: torch.device,
    renewed: Any = None,
    gates: routing.ClassGates | None = None,
) -> tuple[list[metrics.Score], list[metrics.Score]]:
    """Scores of tasks 0..index on their test images, by the last weights: the only place that reads test data.

    With `renewed`, the second list has that head's scores of the same features, from the same pass; else it is empty.
    `gates` receives what the routers chose in it."""
    learner.eval()
    size, sizes = learner.eval_batch_size, stream.sizes[: index + 1]
    found: tuple[list[metrics.Score], list[metrics.Score]] = ([], [])
    watching = nullcontext([]) if gates is None else learner.collecting()

    def scored(images: Any) -> tuple[list[torch.Tensor], list[Any]]:
        with stopwatch.section("evaluation", len(images)):
            if renewed is None:
                scores = [learner.logits(images)]
            else:
                features = learner.features(images)
                scores = [learner.scores(features), renewed(features)[:, : learner.seen]]
        chosen = list(routings)
        routings.clear()
        return scores, chosen

    with torch.inference_mode(), watching as routings:
        for earlier in range(index + 1):
            batches: list[list[torch.Tensor]] = []  # scores of each head, [B, C seen]
            truth = []
            for (scores, chosen), labels in learner.outputs(
                scored, stream.test(earlier), size, augment=False, shuffle=False
            ):
                if gates is not None:
                    gates.add(chosen, labels)
                batches.append([s.float().cpu() for s in scores])
                truth.append(labels)
            if not batches:  # no test image: its place in the list must not go to the next task
                batches, truth = [[torch.empty(0, learner.seen)] * (1 + (renewed is not None))], [torch.empty(0)]
            for results, parts in zip(found, zip(*batches, strict=True), strict=False):
                results.append(metrics.score(torch.cat(parts), torch.cat(truth), spans(sizes)))
    return found


def spans(sizes: list[int]) -> list[range]:
    """Positions of each task's classes in order of arrival."""
    return [range(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
