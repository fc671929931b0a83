"""How much worse a method learns new tasks than joint training does, for a comparison that has runs of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from utils.compare.rows import Arm
from utils.evaluation import metrics
from utils.report.html import Block, Note, Table
from utils.text import number

REFERENCE = "joint"  # the method that trains on all data so far
ABOUT = (
    "The mean over tasks of joint training's accuracy on a task right after it came, minus the method's (Chaudhry et al. 2018, "
    "in points): what a method gives up of a new task to keep old ones. It can be negative. Over seeds that both have, with "
    "equal tasks and class order."
)


def of_pair(newest: Sequence[float | None], reference: Sequence[float | None]) -> float | None:
    """`1/T sum_k (a*_k - a[k][k])` (Chaudhry et al., ECCV 2018, "Riemannian Walk": I_k, averaged over tasks), in the
    unit of its arguments.

    `newest[k]` is a[k][k], the accuracy on task k right after it, over all classes seen then; `reference[k]` the same of a
    model trained on the data of tasks 0..k together. Tasks without a value in one of them are left out."""
    pairs = zip(newest, reference, strict=True)
    return metrics.mean(b - a for a, b in pairs if a is not None and b is not None)


def _key(results: Mapping[str, Any]) -> tuple[Any, ...]:
    return results["dataset"], results["sizes"], results["order"]


def table(rows: Sequence[tuple[int, Arm]]) -> list[Block]:
    """A line for each of the numbered rows that is set against joint training; empty without a run of it.

    Of several rows of joint training the first with equal tasks counts."""
    references: dict[tuple[Any, ...], Sequence[float | None]] = {}
    for _, row in rows:
        for seed, run in row.runs.items():
            if run.results["model_name"] == REFERENCE:
                references.setdefault((seed, *_key(run.results)), run.results["newest"])
    body = []
    for n, row in rows:
        values = [
            of_pair(run.results["newest"], references[key])
            for seed, run in row.runs.items()
            if (key := (seed, *_key(run.results))) in references and run.results["model_name"] != REFERENCE
        ]
        summary = metrics.summarise(values)
        if summary.n:
            spread = "" if summary.std is None else f" ± {number(summary.std)}"
            body.append([f"{n}: {row.label}", number(summary.mean) + spread, summary.n])
    return [Note(ABOUT), Table(["row", "intransigence", "seeds"], body, "rows")] if body else []
