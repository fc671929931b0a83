"""Linear discriminant analysis from sums that grow task by task: class means and one covariance that all classes share.

The closed form of scikit-learn's LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s); with Fourier features it is KLDA
(Momeni et al., AAAI 2025). Shapes: n images, B batch, D width, P width after the lift, C classes.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from backbone.heads.heads import StatisticsHead

SHRINKAGES = (1e-5, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.2, 0.4, 0.7, 1.0)  # candidates
NO_SPREAD = 1e-12  # variance over the features' mean square, below which it is rounding


class DiscriminantHead(StatisticsHead):
    """Log posteriors up to a constant, [B, C], of classes with normal features of one covariance:

    x Sigma^-1 mu_c - mu_c Sigma^-1 mu_c / 2 + log(n_c / n), Sigma = (1 - s) W / n + s tr(W / n) / P I,

    with W = G - sum_c n_c mu_c mu_c' the scatter within classes, from the Gram matrix G and the class sums that ridge has too,
    and `shrinkage` s. The result does not depend on the order in which images came. Classes without images score 0: cut them
    off. Unlike KLDA's code W is divided by n, shrinkage is relative, and classes weigh by their images."""

    bias: Tensor  # [C]
    shrinkage: Tensor  # [] s

    def __init__(
        self,
        width: int,
        num_classes: int,
        projection_dim: int | None = None,
        lift: Literal["relu", "fourier"] = "relu",
        gamma: float | None = None,
        shrinkage: float | None = None,
    ) -> None:
        """`shrinkage` None: chosen by `choose_shrinkage`, 0.1 until then."""
        super().__init__("lda", width, num_classes, projection_dim, lift=lift, gamma=gamma)
        self.register_buffer("bias", torch.zeros(num_classes, dtype=torch.float64))
        self.register_buffer("shrinkage", torch.tensor(0.1 if shrinkage is None else shrinkage, dtype=torch.float64))

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, C] in the features' precision."""
        return F.linear(self.lift(features), self.weight, self.bias).to(features.dtype)

    @torch.no_grad()
    def clear(self) -> None:
        super().clear()
        self.bias.zero_()

    @torch.no_grad()
    def solve(self) -> None:
        """Makes `weight` and `bias`. Where rounding leaves Sigma indefinite, a ridge is added that grows tenfold."""
        assert self.gram is not None
        n, means = self.counts.sum().clamp(min=1), self.means()
        within = (self.gram - means.T @ (self.counts.unsqueeze(1) * means)) / n
        level = self.gram.diagonal().mean() / n
        spread = torch.maximum(within.diagonal().mean(), NO_SPREAD * level)
        ridge = self.shrinkage * spread
        while True:
            matrix = (1 - self.shrinkage) * within
            matrix.diagonal().add_(ridge)
            factor, failed = torch.linalg.cholesky_ex(matrix)
            if not failed:
                break
            ridge = torch.maximum(10 * ridge, torch.maximum(1e-14 * level, ridge.new_tensor(1e-30)))
        self.weight.copy_(torch.cholesky_solve(means.T, factor).T)
        prior = torch.where(self.counts > 0, (self.counts.clamp(min=1) / n).log(), 0)
        self.bias.copy_(prior - (means * self.weight).sum(dim=1) / 2)

    @torch.no_grad()
    def choose_shrinkage(self, features: Tensor, labels: Tensor, held: Tensor) -> list[float]:
        """Sets s to the candidate of least mean -log posterior of a new task's held-out images among all classes seen.

        features [n, D], labels [n] are the whole task, not added yet; held [n] is true for those held out. Each candidate is
        fitted on all that was added before and the rest of the task; ties go to the larger. Returns the loss of each."""
        trial = copy.deepcopy(self)
        trial.add(features[~held], labels[~held])
        seen = int((trial.counts > 0).nonzero().max()) + 1
        lifted, losses = self.lift(features[held]), []
        for shrinkage in SHRINKAGES:
            trial.shrinkage.fill_(shrinkage)
            trial.solve()
            scores = F.linear(lifted, trial.weight[:seen], trial.bias[:seen])
            losses.append(float(F.cross_entropy(scores, labels[held])))
        self.shrinkage.fill_(max(s for s, loss in zip(SHRINKAGES, losses, strict=True) if loss == min(losses)))
        return losses
