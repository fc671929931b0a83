"""Signs that something in a run does not work, read from what was measured anyway: warned of once, when they show.

`tell` is called after each task. It writes the norms of the head's rows (`head_norms`), and for every sign a `warning` row,
which the report shows; all signs are functions of the rows of metrics.jsonl. docs/checks.md has a table of them.
Shapes: C classes seen, L routed layers, E experts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.evaluation import routing
from utils.process import parallel
from utils.text import number

Row = Mapping[str, Any]

# A mean loss below it says that nothing is learned: float32 cannot tell a probability of 1 - 6e-8 from 1.
ZERO_LOSS = 1e-7
# Part of log E from which on a router counts as undecided: the gates of two experts then differ by less than 0.56 to 0.44,
# those of eight by a fifth of an equal share.
UNDECIDED = 0.99
# Part to which the sum of gates must fall. Top-1 gates add up to the chosen probability: 1/E, at most a half, where the router
# is undecided, and over nine tenths where it is sure. It lies in the middle of 1/2 and 1.
FALLEN = 0.75
# Ratio between the mean row norms of two tasks. At 1.5 a class outscores one of the other task although its angle to the
# features is 48 degrees and the other's is 0 (score = norm x length x cosine).
UNEQUAL = 1.5

READ = ("warning", "epoch", "gates", "novelty", "detect", "expand", "head_norms", "mature", "experts")
FIRST_EPOCH_ONLY = ("epoch", "experts")  # of these kinds, of which there are many


def tell(learner: Any, sizes: Sequence[int], task: int) -> None:
    """Writes the `head_norms` row of `task` (from 0; tasks have `sizes` classes) and warns of every sign not told before."""
    if (norms := head_norms(learner, sizes[: task + 1])) is not None:
        learner.log.row("head_norms", task=task, norms=norms)
    if not parallel.is_first():
        return
    rows = recall(learner.log.folder / "metrics.jsonl")
    told = {row["about"] for row in rows if row["kind"] == "warning"}
    for about, text in signs(rows, task, last=task == len(sizes) - 1, classes=sizes[task]):
        if about not in told and not (about == "zero_loss" and _foreseen(learner.cfg, sizes, task)):
            told.add(about)
            learner.log.row("warning", task=task, about=about, text=text)
            learner.log.warn(text)


def signs(rows: Sequence[Row], task: int, last: bool, classes: int) -> Iterator[tuple[str, str]]:
    """(what it is about, a sentence with what was measured, why it matters and what to change) of each sign after `task`.

    `last`: the run is over. `classes` of the task."""
    checks: dict[str, Callable[[], str | None]] = {
        "zero_loss": lambda: zero_loss(rows, task, classes),
        "fallen_gates": lambda: fallen_gates(rows, task),
    }
    if last:
        checks["no_expert_added"] = lambda: no_expert_added(rows)
        checks["no_adapter_added"] = lambda: no_adapter_added(rows)
        checks["undecided_routers"] = lambda: undecided_routers(rows)
        checks["unequal_rows"] = lambda: unequal_rows(rows)
    for about, check in checks.items():
        if (text := check()) is not None:
            yield about, text


def head_norms(learner: Any, sizes: Sequence[int]) -> list[float] | None:
    """Mean Euclidean norm of the linear head's rows of each task; None where the linear head does not predict."""
    weight = getattr(getattr(learner, "head", None), "weight", None)
    if learner.statistics is not None or weight is None:
        return None
    norms = weight.detach().float()[: sum(sizes)].norm(dim=1).split(list(sizes))
    return [float(of_task.mean()) for of_task in norms]


def recall(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl that the signs are read from, in order. Other lines are not even parsed."""
    starts = {kind: f'{{"kind": "{kind}",'.encode() for kind in READ}
    rows = []
    with open(path, "rb") as file:
        for line in file:
            kind = next((kind for kind, start in starts.items() if line.startswith(start)), None)
            if kind is None or not line.endswith(b"\n"):
                continue
            if kind not in FIRST_EPOCH_ONLY or b'"epoch": 1,' in line:
                rows.append(json.loads(line))
    return rows


def _foreseen(cfg: Any, sizes: Sequence[int], task: int) -> bool:
    """Whether the settings said before the run that this task's cross-entropy would be among one class."""
    return sizes[task] == 1 and 1 in cfg.classes_in_loss(sizes) if hasattr(cfg, "classes_in_loss") else False


# Signs -------------------------------------------------------------------------------------------------------------


def zero_loss(rows: Sequence[Row], task: int, classes: int) -> str | None:
    """A loss, or of several terms the `task_loss`, that is 0 in the first epoch of a phase."""
    for row in rows:
        if row["kind"] == "epoch" and row["task"] == task and abs(row.get("task_loss", row["loss"])) <= ZERO_LOSS:
            name = "task_loss" if "task_loss" in row else "loss"
            why = "task has one class, and a cross-entropy among one class is 0" if classes == 1 else ""
            cause = (
                f"the {why}: take larger init_cls and increment" if why else "look at the labels and at what is masked"
            )
            return (
                f"task {task + 1}, phase {row['phase']}: the {name} is 0 in the first epoch, so nothing is learned from it; "
                f'{cause}, or set head to "ncm" or "ridge"'
            )
    return None


def fallen_gates(rows: Sequence[Row], task: int) -> str | None:
    """The gates of a layer that add up to much less than before, once experts are mature."""
    if not any(row["kind"] == "mature" for row in rows):
        return None
    now = routing.of_task(rows, "gates", task)
    for place, layer in enumerate(now[-1]["layers"] if now else ()):
        before = [_gate_sum(row, place) for row in rows if row["kind"] == "gates" and row["task"] < task]
        before += [sum(row["gate"]) for row in rows if row["kind"] == "experts" and row["layer"] == layer]
        sums = _gate_sum(now[-1], place)
        if before and sums <= FALLEN * max(before):
            return (
                f"after task {task + 1} the gates of layer {layer} add up to {sums:.2f}, and to {max(before):.2f} before: the "
                f"adapters' output fell as much when experts matured. A single chosen expert is multiplied by its "
                f"probability, about 1 / {len(now[-1]['experts'])} where the router is undecided; set top_k_experts to 2 or "
                "more, whose gates add up to 1"
            )
    return None


def _gate_sum(row: Row, place: int) -> float:
    """Sum of the mean gates of one layer, the mean over classes."""
    sums = [sum(gates[place]) for gates in row["gate"]]
    return sum(sums) / len(sums)


def no_expert_added(rows: Sequence[Row]) -> str | None:
    """A whole run of decisions on novelty, none of which added an expert although there was room."""
    asked = [row for row in rows if row["kind"] == "novelty" and row.get("best") is not None]
    if not asked or any(row["spawn"] for row in asked) or all(row["reason"] == "full" for row in asked):
        return None
    near = min(asked, key=lambda row: row["best"] - row["threshold"])
    reasons = sorted({row["reason"] for row in asked})
    return (
        f"no expert was added in {len(asked)} task{'s' * (len(asked) > 1)} after the first (decided by "
        f"{', '.join(reasons)}), so there was nothing to route. Nearest was task {near['task'] + 1}: similarity "
        f"{number(near['best'], 3)}, threshold {number(near['threshold'], 3)}. To add experts, raise novelty_quantile "
        "(calibrated) or novelty_threshold (fixed, adaptive), or lower novelty_confidence"
    )


def no_adapter_added(rows: Sequence[Row]) -> str | None:
    """A whole run of scans for a distribution shift, none of which added an adapter."""
    scans = [row for row in rows if row["kind"] == "detect" and row.get("scores")]
    if not scans or any(row["kind"] == "expand" for row in rows):
        return None

    def lowest(row: Row) -> float:
        return min((score for score in row["scores"] if score is not None), default=-math.inf)

    near = max(scans, key=lowest)
    return (
        f"no layer added an adapter in the whole run, so all tasks share those of the first. Nearest was layer "
        f"{near['layer']} in task {near['task'] + 1}: score {number(lowest(near))}, threshold {number(near['threshold'])}. "
        "To add adapters, lower exp_threshold or train the descriptors longer (rd_epoch)"
    )


def undecided_routers(rows: Sequence[Row]) -> str | None:
    """Routers whose softmax was all but uniform in every layer after every task with several experts."""
    parts = []
    for row in rows:
        if row["kind"] == "gates" and len(row["experts"]) > 1:
            images = max(sum(row["samples"]), 1)
            for place in range(len(row["layers"])):
                entropy = sum(n * of_class[place] for n, of_class in zip(row["samples"], row["entropy"], strict=True))
                parts.append(entropy / images / math.log(len(row["experts"])))
    if not parts or min(parts) < UNDECIDED:
        return None
    return (
        f"the routers were undecided through the whole run: after every task, in every layer, the entropy of their softmax "
        f"was at least {number(100 * min(parts), 1)} % of log E, so experts got about equal shares of every image and none "
        "specialised. Raise router_lr or epochs, or lower router_entropy_coef, router_aux_loss_coef or "
        "router_temperature_end"
    )


def unequal_rows(rows: Sequence[Row]) -> str | None:
    """Rows of the linear head that are much longer for the newest task than for the oldest, or the reverse."""
    measured = [row["norms"] for row in rows if row["kind"] == "head_norms"]
    if not measured or len(measured[-1]) < 2 or min(measured[-1]) <= 0:
        return None
    oldest, newest = measured[-1][0], measured[-1][-1]
    if 1 / UNEQUAL < newest / oldest < UNEQUAL:
        return None
    longer = "newest" if newest > oldest else "oldest"
    return (
        f"the head's rows have unequal norms: {number(oldest)} on average for the classes of the first task, {number(newest)} "
        f"for those of the last. Scores grow with the norm, so images are taken for classes of the {longer} task. Set head "
        'to "ncm" or "ridge"; or train tasks alike: rates, epochs and classes a task, the cross-entropy among the classes of '
        "the task alone, decay_other_rows false"
    )
