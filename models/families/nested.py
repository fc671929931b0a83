"""What methods with slow and fast adapters share: their parameter groups, the merge at the end of a task, and its log.

Shapes: B batch, n sampled tokens, D width, K fast experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.adapters import consolidation
from backbone.adapters.adapter import Adapter
from backbone.adapters.nested import NestedLoRAAdapter
from models.learner.base import Learner
from models.learner.fit import fit
from models.learner.groups import Group
from models.learner.losses import Loss, cross_entropy_among, rows_of
from models.learner.table import Table
from models.settings.nested import NestedSettings
from utils.data.tasks import Task


def new_nested(cfg: NestedSettings, width: int, experts: int = 1) -> NestedLoRAAdapter:
    """A nested adapter as the settings describe it, without start values."""
    return NestedLoRAAdapter(
        width,
        cfg.nested_lora_rank,
        experts,
        levels=cfg.nested_lora_levels,
        activation=cfg.nested_lora_activation,
        shared_down=cfg.nested_lora_use_consolidation and cfg.nested_lora_consolidation_method == "pam",
    )


def fill(learner: Learner, layers: Sequence[int], experts: int = 1) -> None:
    """Puts a nested adapter into each of the learner's layers."""
    for layer in layers:
        adapter = new_nested(learner.cfg, learner.backbone.width, experts)
        learner.backbone.fill(layer, learner.initialise(f"layers.{layer}", adapter))


def nested_of(learner: Learner, layers: Sequence[int]) -> dict[int, NestedLoRAAdapter]:
    """The nested adapter of each layer."""
    slots = {layer: learner.backbone.slots[str(layer)] for layer in layers}
    return {layer: slot for layer, slot in slots.items() if isinstance(slot, NestedLoRAAdapter)}


def ranks(learner: Learner, layers: Sequence[int]) -> dict[str, list[int]]:
    """Ranks in each layer, from slow to fast, for a checkpoint; `resize` is the inverse."""
    return {str(layer): adapter.ranks() for layer, adapter in nested_of(learner, layers).items()}


def resize(learner: Learner, layers: Sequence[int], saved: Mapping[str, Sequence[int]]) -> None:
    for layer, adapter in nested_of(learner, layers).items():
        adapter.resize(saved[str(layer)])


# Parameter groups --------------------------------------------------------------------------------------------------


def nested_groups(
    cfg: NestedSettings,
    adapters: Sequence[NestedLoRAAdapter],
    *,
    active: Sequence[int] = (0,),
    multipliers: Sequence[float] = (1.0,),
    shared_by: int = 1,
) -> list[Group]:
    """One group per level over all layers: slow, the levels between, and each `active` fast expert with its multiplier.

    `shared_by`: branches that add their gradients in what they share, which is divided by it."""
    levels = cfg.nested_lora_levels
    rates, intervals = level_rates(cfg), level_intervals(cfg)
    names = ["slow", *(f"level {i}" for i in range(1, levels - 1))]
    groups = []
    for i, name in enumerate(names):
        parameters = [p for a in adapters for p in a.trainable(a.adapters()[i])]
        groups.append(
            Group(name, parameters, rates[i], intervals[i], cfg.nested_lora_skipped_gradients, divide=shared_by)
        )
    if levels > 1:
        for k in active:
            parameters = [p for a in adapters for p in a.trainable(_fast(a, k))]
            name = "fast" if len(adapters[0].fast) == 1 else f"fast {k}"
            groups.append(Group(name, parameters, rates[-1] * multipliers[k]))
    return groups


def level_rates(cfg: NestedSettings) -> list[float]:
    """Learning rates from slow to fast: geometric between the two ends, or even where one of them is 0."""
    slow, fast, top = cfg.rate_slow, cfg.rate_fast, cfg.nested_lora_levels - 1
    between = cfg.nested_lora_level_lrs
    if between is None:
        parts = [i / top for i in range(1, top)]
        geometric = slow > 0 and fast > 0
        between = tuple(slow ** (1 - t) * fast**t if geometric else slow * (1 - t) + fast * t for t in parts)
    return [slow, *between, fast][: cfg.nested_lora_levels]


def level_intervals(cfg: NestedSettings) -> list[int]:
    """Steps between two updates from slow to fast: geometric down to the fast level's 1, rounded."""
    slow, top = cfg.nested_lora_update_interval_slow, cfg.nested_lora_levels - 1
    between = cfg.nested_lora_level_intervals
    if between is None:
        between = tuple(round(slow ** (1 - i / top)) for i in range(1, top))
    return [slow, *between, 1][: cfg.nested_lora_levels]


# End of a task -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def merge(
    learner: Learner,
    task: Task,
    name: str,
    nested: NestedLoRAAdapter,
    x: Tensor,
    *,
    expert: int = 0,
    restart: Sequence[int] | None = None,
    where: Mapping[str, int],
) -> list[dict[str, Any]]:
    """Merges each level into the slower one below it where that is due, and writes one `consolidation` row per pair.

    Every n = `nested_lora_consolidation_interval` tasks the fast expert is merged, every n^2 tasks the level above slow
    with three levels, and so on; the slowest pair goes first, so that nothing falls through two levels at once. A level
    that was merged starts anew; with the fast level, so do the experts `restart` (None: all). x [n, D] are inputs of the
    layer; the fields `where` are added to each row, in which `slow` and `fast` are the lower and the upper of the pair.
    Returns the rows; the last one is that of the fast expert."""
    cfg: NestedSettings = learner.cfg
    path = [*range(len(nested.middle) + 1), len(nested.middle) + 1 + expert]
    rows: list[dict[str, Any]] = []
    # measured for all pairs before the first merge, since a merge empties the level that the next pair merges into
    parts = [nested.adapters()[position] for position in path] if nested.fast else []
    total = sum(size(part(x)) for part in parts)
    before = [_before(below, above, x, total) for below, above in pairwise(parts)]
    for i in range(1, len(parts)):
        lower, upper = path[i - 1], path[i]
        below, above = nested.adapters()[lower], nested.adapters()[upper]
        every = cfg.nested_lora_consolidation_interval ** (len(path) - i)
        due = cfg.nested_lora_use_consolidation and (task.index + 1) % every == 0
        facts = {**where, "level": i, "expert": expert, "merged": due, **before[i - 1]}
        if due:
            method, alpha = cfg.nested_lora_consolidation_method, cfg.nested_lora_consolidation_alpha
            rank = cfg.nested_lora_consolidation_rank
            after = consolidation.consolidate(below, above, method, alpha, rank=rank, features=x)
            facts["error"] = consolidation.error(below, above, after, method, alpha, x)
            nested.replace(lower, after)
            emptied = [upper]
            if i == len(path) - 1:
                others = range(len(nested.fast)) if restart is None else restart
                emptied = sorted({upper, *(len(nested.middle) + 1 + k for k in others)})
            for position in emptied:
                fresh = learner.initialise(f"{name}.{position}.task{task.index}", nested.new())
                if cfg.nested_lora_reset == "zero":
                    for parameter in fresh.parameters():
                        nn.init.zeros_(parameter)
                nested.replace(position, fresh)
            above = nested.adapters()[upper]
            facts |= {"method": method, "alpha": alpha, "rank": after.rank}
            facts |= {"slow_norm_after": norm(after), "fast_norm_after": norm(above)}
            facts |= {"slow_output_after": size(after(x)), "fast_output_after": size(above(x))}
        learner.log.row("consolidation", task=task.index, **facts)
        rows.append(facts)
    return rows


def log_merges(learner: Learner, task: Task, merges: Mapping[Any, Sequence[Mapping[str, Any]]]) -> None:
    """One line of the log about the merges of all layers."""
    last = [rows[-1] for rows in merges.values() if rows]
    if not last:
        return
    share = [row["fast_share"] for row in last if row["fast_share"] is not None]
    text = (
        f"fast makes {100 * sum(share) / len(share):.0f} % of the adapters' output" if share else "adapters are empty"
    )
    if any(row["merged"] for row in last):
        merged = [row for rows in merges.values() for row in rows if row["merged"]]
        ranks = sorted({row["rank"] for row in merged})
        error = max(row["error"] for row in merged)
        text += f"; merged by {last[0]['method']} with alpha {last[0]['alpha']:g}, rank {ranks[0]}"
        text += f" to {ranks[-1]}" if len(ranks) > 1 else ""
        text += f", largest difference to the wanted function {error:.1e}"
    learner.log.info(f"task {task.index + 1}: {text}")


def recalibrate(learner: Learner, task: Task, epochs: int) -> None:
    """Refits the task's rows of the linear head on the merged features of its training images (test transform).

    A merge with alpha other than 1, or one that is not exact, changes the function the head was trained on."""

    def step(features: Tensor, labels: Tensor) -> Loss:
        return cross_entropy_among(learner.head(features), labels, task.first, task.total)

    table = Table(*learner.features_of(task.train))
    groups = [Group("head", list(learner.head.parameters()), learner.cfg.rate_head)]
    fit(learner, task, step, groups, phase="recalibrate", epochs=epochs, data=table, rows=rows_of(task, learner.head))


# Facts of a pair ----------------------------------------------------------------------------------------------------


def _before(slow: Adapter, fast: Adapter, x: Tensor, total: float) -> dict[str, float | None]:
    """Facts of a pair; `total` is the size of all levels' outputs together, of which fast has its share."""
    s, f = slow(x), fast(x)
    slow_size, fast_size = size(s), size(f)
    cosine = F.cosine_similarity(s.flatten(), f.flatten(), dim=0).clamp(-1, 1)  # rounding may leave the range
    return {
        "slow_norm": norm(slow),
        "fast_norm": norm(fast),
        "slow_output": slow_size,
        "fast_output": fast_size,
        "fast_share": fast_size / total if total > 0 else None,
        "cosine": float(cosine) if slow_size > 0 and fast_size > 0 else None,
    }


def norm(adapter: Adapter) -> float:
    """Euclidean norm of all its parameters, as the original logs it; it depends on LoRA's gauge."""
    return float(torch.stack([p.square().sum() for p in adapter.parameters()]).sum().sqrt())


def size(y: Tensor) -> float:
    """Root mean square length of the rows of y [n, D]."""
    return float(y.square().sum(dim=-1).mean().sqrt())


def _fast(nested: NestedLoRAAdapter, k: int) -> Adapter:
    expert = nested.fast[k]
    assert isinstance(expert, Adapter)
    return expert
