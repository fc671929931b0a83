"""A Gaussian for each class's features, from which features are drawn once the class's images are gone.

Four kinds, by what they store of a class beside its mean: all of its covariance (`full`, D^2 numbers), the same shrunk to the
one that all classes share (`shrunk`, D^2, and 2 D^2 once), its r largest directions and one variance for the rest (`low_rank`,
r D + 1), or the variances alone (`diagonal`, D). Shapes: n images, D width, C classes of the whole run, S samples.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from backbone.heads.drift import Motion

RIDGE = 1e-4  # added to a covariance's diagonal, as SLCA's code does
Kind = Literal["full", "shrunk", "low_rank", "diagonal"]


class ClassGaussians(nn.Module):
    """Mean and covariance of each class's features, gathered once; the covariance as its lower Cholesky factor, which
    sampling needs."""

    kind: ClassVar[Kind] = "full"
    means: Tensor  # [C, D]
    factors: Tensor  # [C, D, D], lower triangular L with covariance L L^T; after `move` any such factor

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.register_buffer("means", torch.zeros(num_classes, width))
        self._place(num_classes, width)

    def _place(self, num_classes: int, width: int) -> None:
        """Room for the covariances."""
        self.register_buffer("factors", torch.zeros(num_classes, width, width))

    @torch.no_grad()
    def add(self, features: Tensor, labels: Tensor) -> None:
        """Takes in all images of some classes: features [n, D], labels [n]. A class of one image gets the ridge alone.

        Raises ValueError if a feature is not finite."""
        if not torch.isfinite(features).all():
            raise ValueError("features are not finite, so no class statistics can be gathered; lower the learning rate")
        for label in labels.unique().tolist():
            of_class = features[labels == label].double()  # in float32 a covariance may come out indefinite
            mean = of_class.mean(dim=0)
            self.means[label] = mean.to(self.means)
            self._store(label, (of_class - mean).T @ (of_class - mean), len(of_class))

    def _store(self, label: int, scatter: Tensor, count: int) -> None:
        """A class's covariance from the scatter [D, D] of its `count` images around their mean."""
        self.factors[label] = root(scatter / max(count - 1, 1)).to(self.factors)

    @property
    def noise(self) -> int:
        """Standard normal numbers that a sample takes."""
        return self.means.shape[1]

    def sample(self, normals: Tensor, scale: Tensor) -> Tensor:
        """Features [C', S, D] of the first C' classes from standard normal numbers [C', S, noise]; each class's mean is
        multiplied by its `scale` [C']."""
        count = len(normals)
        means = self.means[:count] * scale.unsqueeze(1)
        return means.unsqueeze(1) + self._spread(normals, count)

    def _spread(self, normals: Tensor, count: int) -> Tensor:
        return normals @ self.factors[:count].transpose(1, 2)

    def covariance(self, label: int) -> Tensor:
        """[D, D] in float64, as `sample` draws."""
        factor = self.factors[label].double()
        return factor @ factor.T

    @torch.no_grad()
    def move(self, motion: Motion) -> None:
        """Moves the classes added so far as their features moved. The means of classes to come are overwritten by `add`."""
        self.means.copy_(motion.of_features(self.means))
        self._turn(motion)

    def _turn(self, motion: Motion) -> None:
        self.factors.copy_(motion.of_directions(self.factors.transpose(1, 2)).transpose(1, 2))

    @torch.no_grad()
    def clear(self) -> None:
        """Forgets all classes."""
        for buffer in self.buffers():
            buffer.zero_()


class ShrunkGaussians(ClassGaussians):
    """Covariance (1 - s) Sigma_c + s Sigma, Sigma the pooled one of all classes: the sum of two independent draws has it."""

    kind = "shrunk"
    shrinkage: Tensor  # [] s
    scatter: Tensor  # [D, D] of all images around their class's mean
    pooled: Tensor  # [D, D] lower Cholesky factor of Sigma
    freedom: Tensor  # [] images less classes

    def _place(self, num_classes: int, width: int) -> None:
        super()._place(num_classes, width)
        self.register_buffer("shrinkage", torch.tensor(0.5))
        self.register_buffer("scatter", torch.zeros(width, width))
        self.register_buffer("pooled", torch.zeros(width, width))
        self.register_buffer("freedom", torch.zeros(()))

    def _store(self, label: int, scatter: Tensor, count: int) -> None:
        super()._store(label, scatter, count)
        self.scatter += scatter.to(self.scatter)
        self.freedom += count - 1
        self._pool()

    def _pool(self) -> None:
        self.pooled.copy_(root(self.scatter.double() / self.freedom.clamp(min=1)))

    @property
    def noise(self) -> int:
        return 2 * self.means.shape[1]

    def _spread(self, normals: Tensor, count: int) -> Tensor:
        of_class, of_all = normals.chunk(2, dim=2)
        share = self.shrinkage
        return (1 - share).sqrt() * super()._spread(of_class, count) + share.sqrt() * of_all @ self.pooled.T

    def covariance(self, label: int) -> Tensor:
        pooled, share = self.pooled.double(), self.shrinkage.double()
        return (1 - share) * super().covariance(label) + share * pooled @ pooled.T

    def _turn(self, motion: Motion) -> None:
        super()._turn(motion)
        if motion.matrix is not None:
            self.scatter.copy_(motion.matrix.T @ self.scatter.double() @ motion.matrix)
            self._pool()

    @torch.no_grad()
    def clear(self) -> None:
        share = self.shrinkage.clone()
        super().clear()
        self.shrinkage.copy_(share)


class LowRankGaussians(ClassGaussians):
    """Covariance U U' + v I: the `rank` largest directions, and the mean variance of the others in all directions
    (probabilistic principal components; Tipping and Bishop, 1999)."""

    kind = "low_rank"
    factors: Tensor  # [C, D, r] U
    rest: Tensor  # [C] v

    def __init__(self, num_classes: int, width: int, rank: int):
        self.rank = min(rank, width - 1)
        super().__init__(num_classes, width)

    def _place(self, num_classes: int, width: int) -> None:
        self.register_buffer("factors", torch.zeros(num_classes, width, self.rank))
        self.register_buffer("rest", torch.zeros(num_classes))

    def _store(self, label: int, scatter: Tensor, count: int) -> None:
        values, vectors = torch.linalg.eigh(scatter / max(count - 1, 1))
        values = values.clamp(min=0) + RIDGE  # ascending
        rest = values[: -self.rank].mean()
        self.rest[label] = rest.to(self.rest)
        self.factors[label] = (vectors[:, -self.rank :] * (values[-self.rank :] - rest).sqrt()).to(self.factors)

    @property
    def noise(self) -> int:
        return self.means.shape[1] + self.rank

    def _spread(self, normals: Tensor, count: int) -> Tensor:
        in_directions, in_all = normals.split([self.rank, self.means.shape[1]], dim=2)
        return super()._spread(in_directions, count) + self.rest[:count, None, None].sqrt() * in_all

    def covariance(self, label: int) -> Tensor:
        matrix = super().covariance(label)
        matrix.diagonal().add_(self.rest[label].double())
        return matrix

    def _turn(self, motion: Motion) -> None:
        """The variance of the rest takes the mean factor by which the map scales areas in its directions."""
        super()._turn(motion)
        if motion.matrix is not None:
            self.rest *= motion.matrix.square().sum(dim=0).mean().to(self.rest)


class DiagonalGaussians(ClassGaussians):
    """The variances alone: `factors` [C, D] are their roots."""

    kind = "diagonal"

    def _place(self, num_classes: int, width: int) -> None:
        self.register_buffer("factors", torch.zeros(num_classes, width))

    def _store(self, label: int, scatter: Tensor, count: int) -> None:
        self.factors[label] = (scatter.diagonal() / max(count - 1, 1) + RIDGE).sqrt().to(self.factors)

    def _spread(self, normals: Tensor, count: int) -> Tensor:
        return normals * self.factors[:count].unsqueeze(1)

    def covariance(self, label: int) -> Tensor:
        return self.factors[label].double().square().diag()

    def _turn(self, motion: Motion) -> None:
        if motion.matrix is not None:
            moved = self.factors.double().square() @ motion.matrix.square()
            self.factors.copy_(moved.sqrt())


def new_gaussians(kind: Kind, num_classes: int, width: int, rank: int) -> ClassGaussians:
    """Empty Gaussians; `rank` is that of low_rank."""
    if kind == "low_rank":
        return LowRankGaussians(num_classes, width, rank)
    return {"full": ClassGaussians, "shrunk": ShrunkGaussians, "diagonal": DiagonalGaussians}[kind](num_classes, width)


def root(covariance: Tensor) -> Tensor:
    """Lower Cholesky factor [D, D] of a covariance and a ridge, which grows tenfold while rounding needs it."""
    ridge = RIDGE
    while True:
        matrix = covariance.clone()
        matrix.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            return factor
        ridge *= 10


def log_density(gaussians: ClassGaussians, features: Tensor, labels: Tensor) -> float:
    """Mean log density of features [n, D] under the Gaussians of their classes [n], without the constant -D/2 log(2 pi)."""
    total = 0.0
    for label in labels.unique().tolist():
        factor = torch.linalg.cholesky(gaussians.covariance(label))
        left = features[labels == label].double() - gaussians.means[label].double()
        white = torch.linalg.solve_triangular(factor, left.T, upper=False)
        total -= 0.5 * float(white.square().sum()) + len(left) * float(factor.diagonal().log().sum())
    return total / len(labels)
