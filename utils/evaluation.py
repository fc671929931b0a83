"""Scores a learner on test data, once a task; measures what the age of class statistics costs and what routing does.

Nothing else reads test data. A learner is anything with the verbs of `models.base.Learner` that are used here.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import torch

from utils import metrics, parallel, profile, routing
from utils.report import WIDTH, number
from utils.runtime import named_seed
from utils.tasks import TaskStream


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
        with profile.part("evaluation", len(images)):
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


# What the routers chose, and what other choices would score ----------------------------------------------------------


def gates_of(learner: Any, stream: TaskStream, index: int) -> routing.ClassGates | None:
    """What `evaluate` fills with the gates of tasks 0..index; None for a method without a learned router."""
    layers = learner.routed_layers()
    return routing.ClassGates(layers, sum(stream.sizes[: index + 1])) if layers else None


def tell_routing(
    learner: Any,
    stream: TaskStream,
    index: int,
    device: torch.device,
    gates: routing.ClassGates | None,
    scores: list[metrics.Score],
    seed: int,
) -> int:
    """Logs a `gates` row, from the second task on a `routing_drift` row, and after the last task what `routing_controls` does.
    Returns how many more passes over the test images that took.

    The task before is read back from metrics.jsonl, which a resumed run cuts back to its checkpoint."""
    last = index == len(stream) - 1
    if gates is None:
        if last and getattr(learner.cfg, "routing_controls", False):
            learner.log.info("no routing to show and no controls: no router was learned")
        return 0
    path, fields = learner.log.folder / "metrics.jsonl", gates.row()
    rows, _ = parallel.from_first(lambda: (routing.recall(path, index), {}))
    experts, joined = routing.numbered(rows, index, count=len(fields["gate"][0][0]))
    after = learner.log.row("gates", task=index, experts=experts, **fields)
    if before := routing.of_task(rows, "gates", index - 1):
        moved = learner.log.row("routing_drift", task=index, **routing.drift(before[-1], after, joined))
        learner.log.info(routing.in_words(moved))
    elif index:
        learner.log.warn(f"no routing drift of task {index + 1}: metrics.jsonl lost the `gates` row of the task before")
    return routing_controls(learner, stream, experts, device, scores, seed) if last else 0


def routing_controls(
    learner: Any, stream: TaskStream, experts: list[int], device: torch.device, learned: list[metrics.Score], seed: int
) -> int:
    """Scores the finished model again without its routers' choice; logs a `routing_controls` row and a table.

    Fields: `accuracy`, by routing the fractions right of each task's test images [T]; `single` [E, T], each expert alone for
    everything; `oracle` [T], for each task the expert that alone does best on its test images. That choice reads test
    labels: its accuracy is an upper bound for giving each task to one of these experts, not a result. `own`, where
    the method gives tasks to experts: each task by its own one, so the task is known. Class statistics stay as they were
    gathered under the learned routing. Returns the passes it took: E + 2, or 0 where there is nothing to compare."""
    if not learner.cfg.routing_controls:
        return 0
    if len(experts) == 1:
        learner.log.info("no routing controls: with one expert a layer every routing is the same")
        return 0
    start, tasks = time.perf_counter(), range(len(stream))
    draws = named_seed(seed, *own) if (own := parallel.own_seed()) else seed

    def scored(how: Any) -> list[float]:
        with learner.forced(how, draws):
            return _accuracies(evaluate(learner, stream, tasks[-1], device)[0])

    accuracy = {"learned": _accuracies(learned), "uniform": scored("uniform"), "random": scored("random")}
    single = [scored(e) for e in range(len(experts))]
    if given := learner.task_experts():
        accuracy["own"] = [single[given[t]][t] for t in tasks]
    best = [max(range(len(experts)), key=lambda e: single[e][t]) for t in tasks]
    accuracy["oracle"] = [single[e][t] for t, e in enumerate(best)]
    row = learner.log.row(
        "routing_controls",
        task=tasks[-1],
        experts=experts,
        samples=[score.samples for score in learned],
        accuracy=accuracy,
        single=single,
        oracle=[experts[e] for e in best],
        seconds=time.perf_counter() - start,
    )
    learner.log.info(_controls_table(row))
    return len(experts) + 2


def _accuracies(scores: list[metrics.Score]) -> list[float]:
    return [score.correct / max(score.samples, 1) for score in scores]


def _controls_table(row: dict[str, Any]) -> str:
    """A line a routing: percent over all test images, then, where they fit, of each task."""
    lines, fits = ["the same model under other routing (percent)"], (WIDTH - 29) // 7
    tasks = range(len(row["samples"])) if len(row["samples"]) <= fits else range(0)
    lines.append(f"{'':<22}{'all':>7}" + "".join(f"{t + 1:>7}" for t in tasks))
    for name, values in routing.controls(row):
        every = routing.overall(values, row["samples"])
        lines.append(f"  {name:<20}" + "".join(f"{number(100 * v):>7}" for v in [every, *(values[t] for t in tasks)]))
    return "\n".join(lines)


def spans(sizes: list[int]) -> list[range]:
    """Positions of each task's classes in order of arrival."""
    return [range(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
