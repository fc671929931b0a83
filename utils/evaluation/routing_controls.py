"""Routing after each task: the gates of every test class, and the model under uniform, random and single-expert routing."""

from __future__ import annotations

import time
from typing import Any

import torch

from utils.data.tasks import TaskStream
from utils.evaluation import metrics, routing
from utils.evaluation.scores import evaluate
from utils.process import parallel
from utils.process.seeds import named_seed
from utils.text import WIDTH, number


def gates_of(learner: Any, stream: TaskStream, index: int) -> routing.ClassGates | None:
    """An empty collection for `evaluate` to fill with the gates of tasks 0..index; None if the method learns no router."""
    layers = learner.routed_layers()
    return routing.ClassGates(layers, sum(stream.sizes[: index + 1])) if layers else None


def log_routing(
    learner: Any,
    stream: TaskStream,
    index: int,
    device: torch.device,
    gates: routing.ClassGates | None,
    scores: list[metrics.Score],
    seed: int,
) -> int:
    """Logs a `gates` row, from the second task on a `routing_drift` row, and after the last task the `routing_controls`.
    Returns the number of additional passes over the test images.

    The gates of the task before are read from metrics.jsonl, which a resumed run cuts back to its checkpoint."""
    last = index == len(stream) - 1
    if gates is None:
        if last and getattr(learner.cfg, "routing_controls", False):
            learner.log.info("no routing tables and no routing controls: the method learned no router")
        return 0
    path, fields = learner.log.folder / "metrics.jsonl", gates.row()
    rows, _ = parallel.broadcast_from_first(lambda: (routing.recall(path, index), {}))
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
    """Scores the finished model again under other routing; logs a `routing_controls` row and a table.

    Fields: `accuracy`, for each routing the accuracy on each task's test images [T], as fractions; `single` [E, T], each
    expert alone on everything; `oracle` [T], for each task the expert that alone scores best on its test images. That choice
    reads test labels: its accuracy is an upper bound of assigning each task to one expert, not a result. `accuracy["own"]`,
    if the method assigns tasks to experts: each task by its expert, which assumes that the task is known. Class statistics
    remain those gathered under the learned routing. Returns the number of passes: E + 2, or 0 if there is nothing to
    compare."""
    if not learner.cfg.routing_controls:
        return 0
    if len(experts) == 1:
        learner.log.info("no routing controls: with one expert a layer every routing is the same")
        return 0
    start, tasks = time.perf_counter(), range(len(stream))
    draws = named_seed(seed, *rank) if (rank := parallel.rank_seed()) else seed

    def scored(routing: Any) -> list[float]:
        with learner.forced(routing, draws):
            return _accuracies(evaluate(learner, stream, tasks[-1], device)[0])

    accuracy = {"learned": _accuracies(learned), "uniform": scored("uniform"), "random": scored("random")}
    single = [scored(e) for e in range(len(experts))]
    if expert_of_task := learner.task_experts():
        accuracy["own"] = [single[expert_of_task[t]][t] for t in tasks]
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
    """A line for each routing: percent over all test images, then, where they fit, of each task."""
    lines, fits = ["the same model under other routing (percent)"], (WIDTH - 29) // 7
    tasks = range(len(row["samples"])) if len(row["samples"]) <= fits else range(0)
    lines.append(f"{'':<22}{'all':>7}" + "".join(f"{t + 1:>7}" for t in tasks))
    for name, values in routing.controls(row):
        overall = routing.overall(values, row["samples"])
        lines.append(f"  {name:<20}" + "".join(f"{number(100 * v):>7}" for v in [overall, *(values[t] for t in tasks)]))
    return "\n".join(lines)
