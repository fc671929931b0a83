"""Whether a task is new: its prefix features against those of the skills there are, and a decision that can be replayed.

A class is embedded as the mean over its training images of the mean token that the first adapted block reads. That comes
from the frozen prefix, so embeddings of all times can be compared. Cosines are taken around a centre, since features share a
large mean: that of all images of earlier tasks. Around it the mean of the first task is 0 and has no direction; hence
an embedding is that of a class, not of a task. Everything here is a pure function in float64.
Shapes: n images, D width, C classes of the new task, S stored embeddings, K skills (experts), R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Reduce = Literal["max", "median"]
ROUNDING = 1e-5  # of the centre's length
Mode = Literal["fixed", "adaptive", "calibrated"]


@dataclass(frozen=True)
class Policy:
    """When a task asks for a new expert. A threshold above 1 spawns always, one below -1 never."""

    threshold: float
    mode: Mode = "fixed"
    delta: float = 0.0  # adaptive only
    min_samples: int = 1
    cooldown: int = 0  # tasks after a spawn that reuse whatever they look like
    max_experts: int = 64

    def threshold_at(self, experts: int, calibrated: float | None = None) -> float:
        """adaptive: tau_k = threshold - delta log(1 + k) with k experts there; calibrated: that number where there is one."""
        if self.mode == "adaptive":
            return self.threshold - self.delta * math.log(1 + experts)
        return calibrated if self.mode == "calibrated" and calibrated is not None else self.threshold


Reason = Literal["first", "novel", "similar", "uncertain", "few images", "cooldown", "full"]


@dataclass(frozen=True)
class Decision:
    """What was decided for a task, with every number it was decided on. `skill` is the expert that serves the task."""

    task: int
    spawn: bool
    skill: int
    reason: Reason
    images: int
    similarities: tuple[float, ...] = ()  # to each skill
    best: float | None = None  # the largest
    low: float | None = None  # its confidence interval
    high: float | None = None  # a threshold above this would have spawned, nothing else standing against it
    threshold: float | None = None
    calibrated: float | None = None  # what calibration proposed, if it did


def class_means(tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [C, D] and count [C] of each class, in the order of the labels, from mean tokens [n, D] and labels [n]."""
    classes, index = labels.unique(return_inverse=True)
    one_hot = F.one_hot(index, len(classes)).double()
    counts = one_hot.sum(dim=0)
    return one_hot.T @ tokens.double() / counts[:, None], counts


def centre(stored: Tensor, images: Tensor) -> Tensor:
    """The mean [D] over all images behind the stored embeddings [S, D], of `images` [S] each. With fewer than two embeddings
    it is 0, no centre: around its mean a lone one would have no direction."""
    if len(stored) < 2:
        return stored.new_zeros(stored.shape[1], dtype=torch.float64)
    return (stored.double() * images.double()[:, None]).sum(dim=0) / images.double().sum()


def similarities(new: Tensor, stored: Tensor, skills: Sequence[int], middle: Tensor, reduce: Reduce) -> Tensor:
    """Similarity to each skill, [.., K], of classes [.., C, D]: the cosine of each class to the skill's stored embeddings, of
    which the largest or the median counts, and the mean over the classes. skills [S]: whose each stored one is."""
    cosines = _cosines(new, stored, middle)
    index = torch.tensor(skills, device=stored.device)
    columns = [_reduced(cosines[..., index == k], reduce) for k in range(max(skills) + 1)]
    return torch.stack(columns, dim=-1).mean(dim=-2)


def calibrate(stored: Tensor, tasks: Sequence[int], middle: Tensor, reduce: Reduce, quantile: float) -> float | None:
    """A threshold from classes that are not new: the low `quantile` of how similar a stored class is to the others of its task.

    Classes rather than random halves of images: halves of the same classes agree to 0.99, and every new class would then be
    a new skill. None where no task had two classes."""
    cosines, index = _cosines(stored, stored, middle), torch.tensor(tasks, device=stored.device)
    similar = []
    for i, task in enumerate(tasks):
        others = (index == task) & (torch.arange(len(tasks), device=stored.device) != i)
        if others.any():
            similar.append(_reduced(cosines[i, others], reduce))
    return float(torch.stack(similar).quantile(quantile)) if similar else None


def interval(
    tokens: Tensor,
    labels: Tensor,
    stored: Tensor,
    skills: Sequence[int],
    middle: Tensor,
    reduce: Reduce,
    *,
    confidence: float,
    resamples: int,
    generator: torch.Generator,
) -> tuple[float, float]:
    """Percentile bootstrap of the largest similarity: images are drawn anew with replacement, within each class, R times.

    (Efron 1979.) A resampled mean is noisier than the mean and so less similar; the interval is widened to hold the
    estimate itself where that leaves it outside."""
    drawn = []
    for label in labels.unique():
        of_class = tokens[labels == label].double()
        count = len(of_class)
        rows = torch.randint(count, (resamples, count), generator=generator)
        weights = torch.zeros(resamples, count, dtype=torch.float64)
        weights.scatter_add_(1, rows, torch.ones_like(weights))
        drawn.append(weights.to(of_class.device) @ of_class / count)
    best = similarities(torch.stack(drawn, dim=1), stored, skills, middle, reduce).max(dim=-1).values  # [R]
    means, _ = class_means(tokens, labels)
    estimate = float(similarities(means, stored, skills, middle, reduce).max())
    tail = (1 - confidence) / 2
    low, high = (float(best.quantile(q)) for q in (tail, 1 - tail))
    return min(low, estimate), max(high, estimate)


def decide(
    policy: Policy,
    *,
    task: int,
    images: int,
    similar: Sequence[float] = (),
    bounds: tuple[float, float] | None = None,
    calibrated: float | None = None,
    last_spawn: int = 0,
) -> Decision:
    """Spawn or reuse, from similarities [K] to the skills and the confidence interval of the largest (None: itself).

    Spawns where the whole interval lies below the threshold; reuses the most similar skill, the first of equals."""
    if not similar:
        return Decision(task, True, 0, "first", images)
    best = max(similar)
    low, high = bounds or (best, best)
    threshold = policy.threshold_at(len(similar), calibrated)
    reason = _reason(policy, len(similar), images, task - last_spawn, best, high, threshold)
    spawn = reason == "novel"
    skill = len(similar) if spawn else list(similar).index(best)
    return Decision(task, spawn, skill, reason, images, tuple(similar), best, low, high, threshold, calibrated)


def decisions(history: Iterable[Mapping[str, Any]]) -> list[Decision]:
    """The decisions in a run's `selection_history` (results.json) or checkpoint, for `replay`; other entries are left out."""
    names = [field.name for field in fields(Decision)]
    logged = []
    for entry in history:
        if entry.get("kind", "novelty") == "novelty":
            values: dict[str, Any] = {name: entry[name] for name in names}
            logged.append(Decision(**values | {"similarities": tuple(values["similarities"])}))
    return logged


def replay(decisions: Iterable[Decision], policy: Policy) -> list[int]:
    """The tasks at which another policy would have spawned, from the numbers logged.

    Experts and cooldown are counted anew. Similarities stay those to the skills of the logged run: with another history
    the skills would have been others, which nobody measured."""
    spawned: list[int] = []
    for d in decisions:
        if d.best is None or d.high is None:
            spawned.append(d.task)
            continue
        count, last = len(spawned), spawned[-1]
        threshold = policy.threshold_at(count, d.calibrated)
        if _reason(policy, count, d.images, d.task - last, d.best, d.high, threshold) == "novel":
            spawned.append(d.task)
    return spawned


def _reason(
    policy: Policy, experts: int, images: int, since: int, best: float, high: float, threshold: float
) -> Reason:
    if best >= threshold:
        return "similar"
    if experts >= policy.max_experts:
        return "full"
    if images < policy.min_samples:
        return "few images"
    if since <= policy.cooldown:
        return "cooldown"
    return "novel" if high < threshold else "uncertain"


def _cosines(new: Tensor, stored: Tensor, middle: Tensor) -> Tensor:
    """Cosines [.., C, S] around the centre; 0 for what lies on it up to rounding, whose direction would be noise."""
    return _directions(new, middle) @ _directions(stored, middle).T


def _directions(vectors: Tensor, middle: Tensor) -> Tensor:
    """Unit vectors [.., D] from the centre to `vectors`; 0 where that is no further than float32 rounds."""
    away = vectors.double() - middle
    near = away.norm(dim=-1, keepdim=True) <= ROUNDING * middle.norm()
    return F.normalize(away.masked_fill(near, 0), dim=-1)


def _reduced(cosines: Tensor, reduce: Reduce) -> Tensor:
    return cosines.max(dim=-1).values if reduce == "max" else cosines.quantile(0.5, dim=-1)
