"""Which expert serves which class: mean gates of each class's test images, and how they drift from task to task.

They are rows of metrics.jsonl: `gates` after each task, `routing_drift` from the second task on. Both give experts lasting
numbers in order of creation, because a method's indices move down when an earlier expert is merged away.
Shapes: B batch, N tokens, E experts, k chosen experts, L routed layers, C classes seen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the report imports this file too, and loads no torch
    from torch import Tensor

Row = Mapping[str, Any]
DIGITS = 4  # decimals of the numbers in a row
# An expert with at least this share of the largest gate still counts as serving the class. Without a margin, noise between
# equal experts would count as a change.
TIED = 0.9


class ClassGates:
    """Sums of the routings of scored images by class."""

    def __init__(self, layers: Sequence[int], classes: int):
        import torch

        self.layers = list(layers)
        self.counts = torch.zeros(classes, dtype=torch.int64)
        self.sums = torch.zeros(classes, len(self.layers), 1, dtype=torch.float64)  # [C, L, 2 E + 1]

    def add(self, routings: Sequence[Any], labels: Tensor) -> None:
        """Adds one batch: a `backbone.experts.router.Routing` for each layer, of tokens [B, N, ..] or samples [B, ..], and the
        labels [B]."""
        import torch

        by_image = []
        for routing in routings:
            chosen = torch.zeros_like(routing.gates).scatter(-1, routing.chosen, 1)
            entropy = torch.special.entr(routing.probabilities).sum(dim=-1, keepdim=True)
            values = torch.cat([routing.gates, chosen, entropy], dim=-1).double()
            by_image.append(values.mean(dim=1) if values.dim() == 3 else values)
        table = torch.stack(by_image, dim=1).cpu()  # [B, L, 2 E + 1], one transfer
        assert table.shape[1] == len(self.layers), "a pass has one routing for each layer"
        if self.sums.shape[-1] == 1:
            self.sums = self.sums.expand(*self.sums.shape[:2], table.shape[-1]).clone()
        self.sums.index_add_(0, labels, table)
        self.counts += torch.bincount(labels, minlength=len(self.counts))

    def row(self) -> dict[str, Any]:
        """The fields of a `gates` row, means over the images of a class and their tokens: `gate` and `share` (of tokens that
        chose the expert; adds up to k) [C, L, E], `entropy` of the router's softmax in nats [C, L], `samples` [C]."""
        means = (self.sums / self.counts.clamp(min=1)[:, None, None]).round(decimals=DIGITS)
        gate, share = means[..., :-1].chunk(2, dim=-1)
        return {
            "layers": self.layers,
            "gate": gate.tolist(),
            "share": share.tolist(),
            "entropy": means[..., -1].tolist(),
            "samples": self.counts.tolist(),
        }


def of_task(rows: Sequence[Row], kind: str, task: int) -> list[Row]:
    """The rows of this kind and task."""
    return [row for row in rows if row["kind"] == kind and row.get("task") == task]


def recall(path: Path, task: int) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl that `numbered` and `drift` need after `task`: merges, the `gates` row of the task before,
    and of older `gates` rows the experts alone. The file is read line by line, so that memory does not grow with the run."""
    rows = []
    with open(path, "rb") as file:
        for line in file:
            if not (b'"gates"' in line[:24] or b'"merge"' in line[:24]) or not line.endswith(b"\n"):
                continue
            row = json.loads(line)
            if row["kind"] == "gates" and row["task"] != task - 1:
                row = {key: row[key] for key in ("kind", "task", "experts")}
            rows.append(row)
    return rows


def numbered(rows: Sequence[Row], task: int, count: int) -> tuple[list[int], dict[int, int]]:
    """The lasting numbers of the `count` experts after `task`, and {merged expert: the expert it joined} for the merges in it.

    `rows` are the rows of the run so far. New experts come last and before any merge, as the methods add them. A `merge` row
    says that `expert` joined `into`, both as indices at that moment."""
    before = of_task(rows, "gates", task - 1)
    experts = list(before[-1]["experts"]) if before else []
    merges = of_task(rows, "merge", task)
    fresh = 1 + max((number for row in rows if row["kind"] == "gates" for number in row["experts"]), default=-1)
    experts += range(fresh, fresh + count + len(merges) - len(experts))
    joined: dict[int, int] = {}
    for merge in merges:
        gone, into = experts[merge["expert"]], experts[merge["into"]]
        joined = {old: into if new == gone else new for old, new in joined.items()} | {gone: into}
        experts.remove(gone)
    return experts, joined


def numbers_in(rows: Sequence[Row], task: int) -> list[int]:
    """The lasting numbers of the experts that learned `task`, in the order of its `experts` rows, with those merged at its
    end. Without `gates` rows to read them from, the method's indices."""
    listed = [number for t in (task - 1, task) for row in of_task(rows, "gates", t)[-1:] for number in row["experts"]]
    count = len(of_task(rows, "experts", task)[0]["gate"])
    numbers = list(dict.fromkeys(listed))
    return numbers if len(numbers) == count else list(range(count))


def drift(before: Row, after: Row, joined: Mapping[int, int]) -> dict[str, Any]:
    """The fields of a `routing_drift` row for the classes in `before`, from the `gates` rows of two consecutive tasks.

    A class's mean gates in a layer are scaled to add up to 1. `distance` [C, L]: the total variation between before and
    after, half the sum of the absolute changes over experts, from 0 (the same) to 1 (nothing in common). A new expert had 0
    before; a merged one counts as the expert it joined. `before`, `after` [C, L]: the expert with the largest gate.
    `changed` [L]: classes whose expert of before now has less than TIED of the largest gate. `mean` [L]: of the distances."""
    column = {number: e for e, number in enumerate(after["experts"])}
    classes, layers = len(before["samples"]), range(len(after["layers"]))
    distance: list[list[float]] = []
    was: list[list[int]] = []
    now: list[list[int]] = []
    changed = [0 for _ in layers]
    for c in range(classes):
        for of_classes in (distance, was, now):
            of_classes.append([])
        for layer in layers:
            earlier = [0.0] * len(column)
            for number, gate in zip(before["experts"], _scaled(before["gate"][c][layer]), strict=True):
                earlier[column[joined.get(number, number)]] += gate
            current = _scaled(after["gate"][c][layer])
            distance[-1].append(round(sum(abs(a - b) for a, b in zip(earlier, current, strict=True)) / 2, DIGITS))
            was[-1].append(after["experts"][earlier.index(max(earlier))])
            now[-1].append(after["experts"][current.index(max(current))])
            changed[layer] += current[column[was[-1][-1]]] < TIED * max(current)
    return {
        "layers": after["layers"],
        "added": [number for number in after["experts"] if number not in before["experts"]],
        "merged": [list(pair) for pair in joined.items()],
        "distance": distance,
        "before": was,
        "after": now,
        "changed": changed,
        "mean": [round(sum(distance[c][i] for c in range(classes)) / classes, DIGITS) for i in layers],
    }


def in_words(row: Row) -> str:
    """A `routing_drift` row as one line of text."""
    largest, layer = max(zip(row["mean"], row["layers"], strict=True), key=lambda pair: pair[0])
    old, layers = len(row["before"]), len(row["layers"])
    changed, events = sum(row["changed"]), ""
    for expert in row["added"]:
        events += f"; expert {expert} is new"
    for gone, into in row["merged"]:
        events += f"; expert {gone} was merged into expert {into}"
    return (
        f"routing of {old} old classes moved by {sum(row['mean']) / layers:.3f} (0 not at all, 1 completely), most in layer "
        f"{layer} with {largest:.3f}; in {changed} of {old * layers} cases (class and layer) another expert serves now{events}"
    )


def controls(row: Row) -> list[tuple[str, list[float]]]:
    """(name, accuracy of each task [T]) of every routing in a `routing_controls` row, in the order of tables and plots."""
    names = {"own": "each task's expert", "oracle": "oracle expert"}
    accuracy = {names.get(kind, kind): list(values) for kind, values in row["accuracy"].items()}
    last = {name: accuracy.pop(name) for name in names.values() if name in accuracy}
    for expert, values in zip(row["experts"], row["single"], strict=True):
        accuracy[f"only expert {expert}"] = list(values)
    return list((accuracy | last).items())


def overall(values: Sequence[float], samples: Sequence[int]) -> float:
    """Accuracy over the images of all tasks, from the accuracies and numbers of images by task."""
    return sum(v * n for v, n in zip(values, samples, strict=True)) / max(sum(samples), 1)


def _scaled(gates: Sequence[float]) -> list[float]:
    """Gates divided by their sum: those of a top-1 router add up to less than 1."""
    total = sum(gates)
    return [gate / total for gate in gates] if total else list(gates)
