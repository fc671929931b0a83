"""The cost of stale class statistics: the same head with statistics gathered anew, and without the repair.

A learner is any object with the attributes of `models.learner.statistics.ClassStatistics` that are used here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from utils.data.tasks import TaskStream
from utils.evaluation import metrics

RENEWED, UNREPAIRED = "statistics gathered anew", "statistics never repaired"  # no names of heads


def renewed_statistics(learner: Any, stream: TaskStream, index: int) -> Any:
    """The class statistics of tasks 0..index, gathered again with the present features; None if they cannot be stale.

    This is a measurement: it reads training images of earlier tasks, which the learner never does, and its result is used
    for nothing but scores. An aligned head is aligned again, on the same random numbers."""
    if index == 0 or not learner.cfg.head_drift or not learner.statistics_go_stale:
        return None
    assert learner.statistics is not None
    renewed = learner.statistics.emptied()
    for earlier in range(index + 1):
        renewed.add(*learner.features_of(stream.task(earlier).train))
    renewed.solve()
    return renewed


def heads_of(learner: Any, renewed: Any) -> dict[str, Any]:
    """What else the test images are scored with, by name."""
    unrepaired = None if renewed is None else learner.unrepaired
    heads = {RENEWED: renewed, UNREPAIRED: unrepaired}
    return {name: head for name, head in heads.items() if head is not None}


def drift_of(
    learner: Any,
    stream: TaskStream,
    index: int,
    renewed: Any,
    scores: list[metrics.Score],
    by_head: Mapping[str, list[metrics.Score]],
    seconds: float,
) -> dict[str, Any] | None:
    """Logs and returns the accuracies over all test images so far with the stale and the renewed statistics, as fractions;
    with `head_drift_repair` also with the repaired ones, which then are those that predict.

    `cosine`: the cosine between a class's mean, as it predicts, and its renewed mean, averaged over the classes of earlier
    tasks. `seconds`: the time that gathering took. None if there is nothing to compare."""
    if renewed is None or learner.statistics is None:
        return None
    if not any(s.samples for s in scores):
        return None
    repaired = {"repaired": metrics.share(scores)} if UNREPAIRED in by_head else {}
    stale, recomputed = metrics.share(by_head.get(UNREPAIRED, scores)), metrics.share(by_head[RENEWED])
    cosine = learner.statistics.cosine(renewed, classes=sum(stream.sizes[:index]))
    facts = {"task": index, "stale": stale, **repaired, "recomputed": recomputed, "cosine": cosine}
    learner.log.row("drift", **facts, seconds=seconds)
    learner.log.info(
        f"class statistics as gathered {100 * stale:.2f} %, "
        + (f"repaired {100 * repaired['repaired']:.2f} %, " if repaired else "")
        + f"recomputed {100 * recomputed:.2f} %, mean cosine of old class means {cosine:.4f}"
    )
    return facts
