"""The cost of stale class statistics: the same head with statistics gathered anew."""

from __future__ import annotations

from typing import Any

from utils.data.tasks import TaskStream
from utils.evaluation import metrics


def renewed_statistics(learner: Any, stream: TaskStream, index: int) -> Any:
    """The class statistics of tasks 0..index, gathered again with the present features; None if they cannot be stale.

    This is a measurement: it reads training images of earlier tasks, which the learner never does, and its result is used
    for nothing but scores."""
    if index == 0 or not learner.cfg.head_drift or not learner.statistics_go_stale:
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
    """Logs and returns the accuracies over all test images so far with the stale and the renewed statistics, as fractions.

    `cosine`: the cosine between a class's stale and renewed mean, averaged over the classes of earlier tasks. `seconds`: the
    time that gathering took. None if there is nothing to compare."""
    if renewed is None or learner.statistics is None:
        return None
    if not any(s.samples for s in scores):
        return None
    stale, recomputed = (sum(s.correct for s in of) / sum(s.samples for s in of) for of in (scores, by_renewed))
    cosine = learner.statistics.cosine(renewed, classes=sum(stream.sizes[:index]))
    learner.log.row("drift", task=index, stale=stale, recomputed=recomputed, cosine=cosine, seconds=seconds)
    learner.log.info(
        f"class statistics as gathered {100 * stale:.2f} %, recomputed {100 * recomputed:.2f} %, "
        f"mean cosine of old class means {cosine:.4f}"
    )
    return {"task": index, "stale": stale, "recomputed": recomputed, "cosine": cosine}
