"""Heads: class scores from pooled features, trained as a linear map or computed from statistics of each class.

The discriminant head is in discriminant.py, the linear head that is aligned anew in aligned.py.
Shapes: n images, B batch, D width, P width after the random projection (D without one), C classes of the whole run.
"""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.heads.drift import Motion

RIDGES = tuple(10.0**k for k in range(-8, 9))  # candidates for lambda, those of RanPAC's code
HELD_OUT = 0.2  # share of a task's training images that lambda is chosen on, as in RanPAC's code
ROWS = 4096  # images whose projected features are in memory at once


class LinearHead(nn.Linear):
    """Class scores from pooled features, [B, D] -> [B, C]: uniform Kaiming weights, zero bias, as SEMA-CL's."""

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.bias)


class CosineHead(nn.Module):
    """sigma * cosine(feature, row) for each class, [B, D] -> [B, C] (cosine normalisation: Hou et al., CVPR 2019, "Learning a
    Unified Classifier Incrementally via Rebalancing").

    Trains `weight` [C, D], which starts uniform in +-1/sqrt(D), and `sigma` [1], which starts at 1."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, width))
        self.sigma = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound, generator=generator)
        nn.init.ones_(self.sigma)

    def forward(self, features: Tensor) -> Tensor:
        return self.sigma * F.linear(F.normalize(features, dim=1), F.normalize(self.weight, dim=1))


class StatisticsHead(nn.Module):
    """Class scores [B, C] from sums over each class's features, which grow task by task; no image is stored, nothing trained.

    With `projection_dim` P the features x are first lifted to P random ones, W ~ N(0, 1) of shape [D, P], fixed: `relu`
    max(0, x W) (RanPAC, McDonnell et al., NeurIPS 2023, arXiv 2307.02251), or `fourier` sqrt(2/P) cos(sqrt(2 gamma) x W + b),
    b uniform in [0, 2 pi), whose inner products approach exp(-gamma |x - y|^2) (Rahimi and Recht, NeurIPS 2007; KLDA, Momeni
    et al., AAAI 2025). `add` takes in images, `solve` makes the `weight` [C, P] that `forward` uses:

    - `ncm`: the class means; a score is the cosine to one (SimpleCIL, arXiv 2303.07338).
    - `ridge`: (G + lambda I)^-1 S with G [P, P] the Gram matrix of all features and S [P, C] the sum of each class's: least
      squares on one-hot targets over all images ever added, the same in whatever order they came (RanPAC, section 3).

    - `lda`: G and S as well, see discriminant.py.

    With `cosine` (ncm always) scores are cosines, whatever the weight's lengths. All is float64: G is ill-conditioned, and
    8 P^2 bytes (800 MB at P = 10,000) is what ridge keeps. Classes without images score 0.
    """

    counts: Tensor  # [C] images added
    sums: Tensor  # [C, P] of their lifted features
    gram: Tensor | None  # [P, P], not with ncm
    weight: Tensor  # [C, P]
    ridge: Tensor  # [] lambda
    projection: Tensor | None  # [D, P]
    phase: Tensor | None  # [P] b of the Fourier features
    gamma: Tensor | None  # [] theirs; 0: not chosen yet

    def __init__(
        self,
        kind: Literal["ncm", "ridge", "lda"],
        width: int,
        num_classes: int,
        projection_dim: int | None = None,
        cosine: bool = False,
        lift: Literal["relu", "fourier"] = "relu",
        gamma: float | None = None,
    ) -> None:
        """`gamma` of the Fourier features; None: chosen by `fit_lift`."""
        super().__init__()
        self.kind, self.normalises = kind, cosine or kind == "ncm"
        size = projection_dim or width

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        self.register_buffer("counts", zeros(num_classes))
        self.register_buffer("sums", zeros(num_classes, size))
        self.register_buffer("gram", zeros(size, size) if kind != "ncm" else None)
        self.register_buffer("weight", zeros(num_classes, size))
        self.register_buffer("ridge", torch.ones((), dtype=torch.float64))
        self.register_buffer("projection", zeros(width, size) if projection_dim else None)
        fourier = projection_dim is not None and lift == "fourier"
        self.register_buffer("phase", zeros(size) if fourier else None)
        self.register_buffer("gamma", zeros() + (gamma or 0.0) if fourier else None)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the projection, then the phases; the statistics stay as they are."""
        if self.projection is not None:
            self.projection.normal_(generator=generator)
        if self.phase is not None:
            self.phase.uniform_(0, 2 * math.pi, generator=generator)

    @torch.no_grad()
    def fit_lift(self, features: Tensor) -> None:
        """Before the first `add`, with the first task's features [n, D]: gamma becomes 1 over the median squared distance of
        two of them (at most 1,000, evenly spaced), if it was not given."""
        if self.gamma is None or self.gamma > 0:
            return
        some = features[torch.linspace(0, len(features) - 1, min(len(features), 1000)).long().to(features.device)]
        distances = torch.pdist(some.double()).square()
        median = distances.median() if len(distances) else distances.new_zeros(())
        self.gamma.copy_(1 / median if median > 0 else torch.ones_like(median))

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, C] in the features' precision."""
        lifted, weight = self.lift(features), self.weight
        if self.normalises:
            lifted, weight = F.normalize(lifted, dim=1), F.normalize(weight, dim=1)
        return F.linear(lifted, weight).to(features.dtype)

    def lift(self, features: Tensor) -> Tensor:
        """[n, D] -> [n, P] in float64."""
        x = features.double()
        if self.projection is None:
            return x
        projected = x @ self.projection.double()
        if self.phase is None or self.gamma is None:
            return projected.relu()
        return math.sqrt(2 / len(self.phase)) * torch.cos((2 * self.gamma).sqrt() * projected + self.phase)

    def means(self) -> Tensor:
        """Mean lifted feature of each class, [C, P]; 0 for a class without images."""
        return self.sums / self.counts.clamp(min=1)[:, None]

    def cosine(self, other: StatisticsHead, classes: int) -> float:
        """Mean over the first `classes` of the cosine between this head's class mean and the other's."""
        return F.cosine_similarity(self.means()[:classes], other.means()[:classes]).mean().item()

    def emptied(self) -> StatisticsHead:
        """A copy with the same projection and lambda that has seen no image."""
        other = copy.deepcopy(self)
        other.clear()
        return other

    @torch.no_grad()
    def clear(self) -> None:
        """Forgets all images."""
        for tensor in (self.counts, self.sums, self.gram, self.weight):
            if tensor is not None:
                tensor.zero_()

    @torch.no_grad()
    def add(self, features: Tensor, labels: Tensor) -> None:
        """Takes in features [n, D] with labels [n]; `solve` makes them count. Raises ValueError if one is not finite."""
        if not torch.isfinite(features).all():
            raise ValueError("features are not finite, so no class statistics can be gathered; lower the learning rate")
        for x, y in zip(features.split(ROWS), labels.split(ROWS), strict=True):
            lifted, one_hot = self.lift(x), F.one_hot(y, len(self.counts)).double()
            self.counts += one_hot.sum(dim=0)
            self.sums += one_hot.T @ lifted  # unlike index_add_, the same on every run on a GPU
            if self.gram is not None:
                self.gram += lifted.T @ lifted

    @torch.no_grad()
    def move(self, motion: Motion) -> None:
        """Moves the statistics of all images added so far as their lifted features moved; `solve` makes that count."""
        if self.gram is not None:
            self.gram.copy_(motion.of_gram(self.gram, self.sums.sum(dim=0), self.counts.sum()))
        self.sums.copy_(motion.of_sums(self.sums, self.counts))

    @torch.no_grad()
    def solve(self) -> None:
        """Makes `weight` from what was added. Where rounding leaves G + lambda I indefinite, lambda grows tenfold."""
        if self.gram is None:
            self.weight.copy_(self.means())
            return
        while True:
            matrix = self.gram.clone()
            matrix.diagonal().add_(self.ridge)
            factor, failed = torch.linalg.cholesky_ex(matrix)
            if not failed:
                break
            self.ridge *= 10
        self.weight.copy_(torch.cholesky_solve(self.sums.T, factor).T)

    @torch.no_grad()
    def choose_ridge(self, features: Tensor, labels: Tensor, held: Tensor, alone: bool = False) -> list[float]:
        """Sets lambda to the candidate of least squared error on a new task's held-out images; ties go to the larger one.

        features [n, D], labels [n] are the whole task, not added yet; held [n] is true for those held out. Each candidate is
        fitted on all that was added before and the rest of the task, or with `alone` on the rest of the task, as RanPAC's code
        does though lambda is weighed against the Gram matrix of all tasks. Returns the error of each, summed over classes and
        averaged over images."""
        trial = self.emptied() if alone else copy.deepcopy(self)
        trial.add(features[~held], labels[~held])
        lifted, targets = self.lift(features[held]), F.one_hot(labels[held], len(self.counts)).double()
        errors = []
        for ridge in RIDGES:
            trial.ridge.fill_(ridge)
            trial.solve()
            errors.append((lifted @ trial.weight.T - targets).square().sum(dim=1).mean().item())
        self.ridge.fill_(max(ridge for ridge, error in zip(RIDGES, errors, strict=True) if error == min(errors)))
        return errors
