"""Scores a learner on test data, once a task, and measures what the age of class statistics costs.

Nothing else reads test data. A learner is anything with the verbs of `models.base.Learner` that are used here.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch

from utils import metrics
from utils.tasks import TaskStream


def evaluate(
    learner: Any, stream: TaskStream, index: int, device: torch.device, renewed: Any = None
) -> tuple[list[metrics.Score], list[metrics.Score]]:
    """Scores of tasks 0..index on their test images, by the last weights: the only place that reads test data.

    With `renewed`, the second list has that head's scores of the same features, from the same pass; else it is empty."""
    learner.eval()
    size, sizes = learner.cfg.eval_batch_size, stream.sizes[: index + 1]
    found: tuple[list[metrics.Score], list[metrics.Score]] = ([], [])
    with torch.inference_mode():
        for earlier in range(index + 1):
            batches: list[list[torch.Tensor]] = []  # scores of each head, [B, C seen]
            truth = []
            for images, labels, *_ in stream.test(earlier).batches(size, augment=False, shuffle=False):
                if renewed is None:
                    scores = [learner.logits(images.to(device))]
                else:
                    features = learner.features(images.to(device))
                    scores = [learner.scores(features), renewed(features)[:, : learner.seen]]
                batches.append([s.float().cpu() for s in scores])
                truth.append(labels)
            for results, parts in zip(found, zip(*batches, strict=True), strict=False):
                results.append(metrics.score(torch.cat(parts), torch.cat(truth), spans(sizes)))
    return found


# What the age of class statistics costs ------------------------------------------------------------------------------


def renewed_statistics(learner: Any, stream: TaskStream, index: int) -> Any:
    """The class statistics of tasks 0..index gathered anew with today's features; None where they cannot have aged.

    A measurement: it reads training images of earlier tasks, which the learner itself never sees, and throws all away."""
    if index == 0 or not learner.cfg.head_drift or not learner.statistics_age:
        return None
    assert learner.statistics is not None
    renewed = learner.statistics.emptied()
    for earlier in range(index + 1):
        renewed.add(*learner.features_of(stream.task(earlier).train))
    renewed.solve()
    return renewed


def drift_of(
    learner: Any,
    stream: TaskStream,
    index: int,
    renewed: Any,
    scores: list[metrics.Score],
    by_renewed: list[metrics.Score],
    seconds: float,
) -> dict[str, Any] | None:
    """Logs and returns accuracies over all test images so far with the statistics as they are and renewed, as fractions.

    `cosine`: mean over the classes of earlier tasks of the cosine between their mean as it is and renewed."""
    if renewed is None or learner.statistics is None:
        return None
    stale, fresh = (sum(s.correct for s in part) / sum(s.samples for s in part) for part in (scores, by_renewed))
    cosine = learner.statistics.cosine(renewed, classes=sum(stream.sizes[:index]))
    learner.log.row("drift", task=index, stale=stale, recomputed=fresh, cosine=cosine, seconds=seconds)
    learner.log.info(
        f"class statistics as gathered {100 * stale:.2f} %, recomputed {100 * fresh:.2f} %, "
        f"mean cosine of old class means {cosine:.4f}"
    )
    return {"task": index, "stale": stale, "recomputed": fresh, "cosine": cosine}


def spans(sizes: list[int]) -> list[range]:
    """Positions of each task's classes in order of arrival."""
    return [range(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
