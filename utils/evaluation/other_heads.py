"""What another head would have scored on the same features, from the one pass over the test images (`compare_heads`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from utils.evaluation import metrics


def tell(
    learner: Any, index: int, scores: list[metrics.Score], by_head: Mapping[str, list[metrics.Score]]
) -> dict[str, float] | None:
    """Logs and returns the accuracy of every head over all test images so far as a fraction: first the one that predicts,
    then the others in their order. None without others, or without test images."""
    if not by_head or not any(s.samples for s in scores):
        return None
    heads = {learner.cfg.head: metrics.share(scores)} | {name: metrics.share(of) for name, of in by_head.items()}
    learner.log.row("heads", task=index, predicts=learner.cfg.head, accuracy=heads)
    shown = ", ".join(f"{name} {100 * accuracy:.2f}" for name, accuracy in heads.items())
    learner.log.info(f"accuracy in percent by head on the same features: {shown} (the first one predicts)")
    return heads
