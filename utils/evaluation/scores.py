"""Scores a learner on the test data of every task so far, once a task. Nothing else reads test data.

A learner is any object with the verbs of `models.learner.base.Learner` that are used here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import torch

from utils.data.tasks import TaskStream
from utils.evaluation import metrics, routing
from utils.evaluation.by_image import ByImage
from utils.process import stopwatch


def evaluate(
    learner: Any,
    stream: TaskStream,
    index: int,
    device: torch.device,
    heads: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = MappingProxyType({}),
    gates: routing.ClassGates | None = None,
    images: ByImage | None = None,
) -> tuple[list[metrics.Score], dict[str, list[metrics.Score]]]:
    """Scores of tasks 0..index on their test images, with the present weights; and by name those of other `heads`, each from
    features [B, D] to scores [B, C], on the same features.

    `gates` collects the routers' choices of the same pass, `images` what the learner takes each image for."""
    learner.eval()
    size, sizes = learner.eval_batch_size, stream.sizes[: index + 1]
    of_heads: list[list[metrics.Score]] = [[] for _ in range(1 + len(heads))]
    collecting = nullcontext([]) if gates is None else learner.collecting()

    def scored(images: Any) -> tuple[list[torch.Tensor], list[Any]]:
        with stopwatch.section("evaluation", len(images)):
            if not heads:
                scores = [learner.logits(images)]
            else:
                features = learner.features(images)
                scores = [learner.scores(features), *(head(features)[:, : learner.seen] for head in heads.values())]
        chosen = list(routings)
        routings.clear()
        return scores, chosen

    with torch.inference_mode(), collecting as routings:
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
            if (
                not batches
            ):  # without test images the task has an empty score, so that later scores stay with their task
                batches, truth = [[torch.empty(0, learner.seen)] * (1 + len(heads))], [torch.empty(0)]
            whole = [torch.cat(tables) for tables in zip(*batches, strict=True)]
            for of_head, table in zip(of_heads, whole, strict=True):
                of_head.append(metrics.score(table, torch.cat(truth), spans(sizes)))
            if images is not None:
                images.add(whole[0], torch.cat(truth))
    return of_heads[0], dict(zip(heads, of_heads[1:], strict=True))


def spans(sizes: list[int]) -> list[range]:
    """For each task the numbers of its classes in order of arrival."""
    return [range(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
