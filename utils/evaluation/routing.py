"""Which expert serves which class, from the gates of test images as they are scored: means by class, and their drift.

Rows of metrics.jsonl: `gates` after each task, `routing_drift` from the second on. Experts have lasting numbers in both, in
order of birth: a method's own indices move up when an expert before them is merged away.
Shapes: B batch, N tokens, E experts, k chosen experts, L routed layers, C classes seen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # pages and pictures import this file too, and stay light
    from torch import Tensor

Row = Mapping[str, Any]
DIGITS = 4  # decimals of what is written
TIED = (
    0.9  # of the largest part: an expert with that much still serves, or noise between equals would count as a change
)


class ClassGates:
    """Adds up the routings of scored images by their class."""

    def __init__(self, layers: Sequence[int], classes: int):
        import torch

        self.layers = list(layers)
        self.counts = torch.zeros(classes, dtype=torch.int64)
        self.sums = torch.zeros(classes, len(self.layers), 1, dtype=torch.float64)  # [C, L, 2 E + 1]

    def add(self, routings: Sequence[Any], labels: Tensor) -> None:
        """One pass: a `backbone.experts.router.Routing` for each layer, of tokens [B, N, ..] or samples [B, ..]; labels [B]."""
        import torch

        by_image = []
        for routing in routings:
            chosen = torch.zeros_like(routing.gates).scatter(-1, routing.chosen, 1)
            entropy = torch.special.entr(routing.probabilities).sum(dim=-1, keepdim=True)
            found = torch.cat([routing.gates, chosen, entropy], dim=-1).double()
            by_image.append(found.mean(dim=1) if found.dim() == 3 else found)
        table = torch.stack(by_image, dim=1).cpu()  # [B, L, 2 E + 1], one transfer
        assert table.shape[1] == len(self.layers), "a pass gives one routing a layer"
        if self.sums.shape[-1] == 1:
            self.sums = self.sums.expand(*self.sums.shape[:2], table.shape[-1]).clone()
        self.sums.index_add_(0, labels, table)
        self.counts += torch.bincount(labels, minlength=len(self.counts))

    def row(self) -> dict[str, Any]:
        """Fields of a `gates` row, means over a class's images and their tokens: `gate` and `share` (of the tokens that chose
        the expert; adds up to k) [C, L, E], `entropy` of the router's softmax in nats [C, L], `samples` [C]."""
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
    return [row for row in rows if row["kind"] == kind and row.get("task") == task]


def recall(path: Path, task: int) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl that `numbered` and `drift` need after `task`: merges, the `gates` row of the task before,
    and of older ones the experts alone. Read a line at a time: all rows of all tasks in memory would grow with the run."""
    found = []
    with open(path, "rb") as file:
        for line in file:
            if not (b'"gates"' in line[:24] or b'"merge"' in line[:24]) or not line.endswith(b"\n"):
                continue
            row = json.loads(line)
            if row["kind"] == "gates" and row["task"] != task - 1:
                row = {key: row[key] for key in ("kind", "task", "experts")}
            found.append(row)
    return found


def numbered(rows: Sequence[Row], task: int, count: int) -> tuple[list[int], dict[int, int]]:
    """The lasting numbers of the `count` experts there are after `task`, and which merged one joined which in it.

    `rows`: those of the run so far. New experts come last and before any merge, as the methods add them; a `merge` row
    says `expert` joined `into`, both by their index at that moment."""
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
    """The lasting numbers of the experts that learned `task`, as its `experts` rows list them: those merged at its end
    included. Without `gates` rows that tell them, the method's own indices."""
    found = [number for t in (task - 1, task) for row in of_task(rows, "gates", t)[-1:] for number in row["experts"]]
    count = len(of_task(rows, "experts", task)[0]["gate"])
    numbers = list(dict.fromkeys(found))
    return numbers if len(numbers) == count else list(range(count))


def drift(before: Row, after: Row, joined: Mapping[int, int]) -> dict[str, Any]:
    """Fields of a `routing_drift` row, from the `gates` rows of two tasks in a row, for the classes of the first.

    `distance` [C, L]: total variation, half the sum over experts of the change in their part of the mean gates, 0 the same
    and 1 nothing in common; a new expert had 0 before, a merged one counts as the one it joined. `before`, `after` [C, L]:
    the expert with the largest mean gate. `changed` [L]: classes whose expert of before has now less than TIED of the largest
    part. `mean` [L]: of the distances."""
    place = {number: e for e, number in enumerate(after["experts"])}
    old, layers = len(before["samples"]), range(len(after["layers"]))
    distance: list[list[float]] = []
    was: list[list[int]] = []
    now: list[list[int]] = []
    changed = [0 for _ in layers]
    for c in range(old):
        for line in (distance, was, now):
            line.append([])
        for layer in layers:
            moved = [0.0] * len(place)
            for number, gate in zip(before["experts"], _parts(before["gate"][c][layer]), strict=True):
                moved[place[joined.get(number, number)]] += gate
            current = _parts(after["gate"][c][layer])
            distance[-1].append(round(sum(abs(a - b) for a, b in zip(moved, current, strict=True)) / 2, DIGITS))
            was[-1].append(after["experts"][moved.index(max(moved))])
            now[-1].append(after["experts"][current.index(max(current))])
            changed[layer] += current[place[was[-1][-1]]] < TIED * max(current)
    return {
        "layers": after["layers"],
        "added": [number for number in after["experts"] if number not in before["experts"]],
        "merged": [list(pair) for pair in joined.items()],
        "distance": distance,
        "before": was,
        "after": now,
        "changed": changed,
        "mean": [round(sum(distance[c][i] for c in range(old)) / old, DIGITS) for i in layers],
    }


def in_words(row: Row) -> str:
    """A `routing_drift` row in one line."""
    largest, layer = max(zip(row["mean"], row["layers"], strict=True), key=lambda pair: pair[0])
    old, layers = len(row["before"]), len(row["layers"])
    changed, events = sum(row["changed"]), ""
    for expert in row["added"]:
        events += f"; expert {expert} is new"
    for gone, into in row["merged"]:
        events += f"; expert {gone} is now part of expert {into}"
    return (
        f"routing of {old} old classes moved by {sum(row['mean']) / layers:.3f} (0 not at all, 1 wholly), most in layer "
        f"{layer} with {largest:.3f}; in {changed} of {old * layers} cases (class and layer) another expert serves now{events}"
    )


def controls(row: Row) -> list[tuple[str, list[float]]]:
    """Name and accuracy by task [T] of every routing in a `routing_controls` row, as tables and pictures list them."""
    names = {"own": "each task's expert", "oracle": "oracle expert"}
    found = {names.get(kind, kind): list(values) for kind, values in row["accuracy"].items()}
    last = {name: found.pop(name) for name in names.values() if name in found}
    for expert, values in zip(row["experts"], row["single"], strict=True):
        found[f"only expert {expert}"] = list(values)
    return list((found | last).items())


def overall(values: Sequence[float], samples: Sequence[int]) -> float:
    """Accuracy over all tasks' images from those of the tasks."""
    return sum(v * n for v, n in zip(values, samples, strict=True)) / max(sum(samples), 1)


def _parts(gates: Sequence[float]) -> list[float]:
    """Each one's part of the sum: a top-1 router's gates add up to less than 1."""
    total = sum(gates)
    return [gate / total for gate in gates] if total else list(gates)
