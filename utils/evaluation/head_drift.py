"""The cost of stale class statistics: the same head with statistics gathered anew."""

from __future__ import annotations

from typing import Any

from utils.data.tasks import TaskStream
from utils.evaluation import metrics

# What the age of class statistics costs ------------------------------------------------------------------------------


def renewed_statistics(learner: Any, stream: TaskStream, index: int) -> Any:
    """The class statistics of tasks 0..index gathered anew with today's features; None where they cannot have aged.

    A measurement: it reads training images of earlier tasks, which the learner itself never sees, and throws all away."""
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
    """Logs and returns accuracies over all test images so far with the statistics as they are and renewed, as fractions.

    `cosine`: mean over the classes of earlier tasks of the cosine between their mean as it is and renewed."""
    if renewed is None or learner.statistics is None:
        return None
    if not any(s.samples for s in scores):
        return None
    stale, fresh = (sum(s.correct for s in part) / sum(s.samples for s in part) for part in (scores, by_renewed))
    cosine = learner.statistics.cosine(renewed, classes=sum(stream.sizes[:index]))
    learner.log.row("drift", task=index, stale=stale, recomputed=fresh, cosine=cosine, seconds=seconds)
    learner.log.info(
        f"class statistics as gathered {100 * stale:.2f} %, recomputed {100 * fresh:.2f} %, "
        f"mean cosine of old class means {cosine:.4f}"
    )
    return {"task": index, "stale": stale, "recomputed": fresh, "cosine": cosine}
