"""A Gaussian for each class's features, from which features are drawn once the class's images are gone.

Shapes: n images, D width, C classes of the whole run, S samples.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

RIDGE = 1e-4  # added to a covariance's diagonal, as SLCA's code does


class ClassGaussians(nn.Module):
    """Mean and covariance of each class's features, gathered once; the covariance as its lower Cholesky factor, which
    sampling needs."""

    means: Tensor  # [C, D]
    factors: Tensor  # [C, D, D], lower triangular L with covariance L L^T

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.register_buffer("means", torch.zeros(num_classes, width))
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
            covariance = (of_class - mean).T @ (of_class - mean) / max(len(of_class) - 1, 1)
            ridge = RIDGE
            while True:
                matrix = covariance.clone()
                matrix.diagonal().add_(ridge)
                factor, failed = torch.linalg.cholesky_ex(matrix)
                if not failed:
                    break
                ridge *= 10
            self.means[label] = mean.to(self.means)
            self.factors[label] = factor.to(self.factors)

    def sample(self, normals: Tensor, scale: Tensor) -> Tensor:
        """Features [C', S, D] of the first C' classes from standard normal numbers of the same shape; each class's mean is
        multiplied by its `scale` [C']."""
        count = len(normals)
        means = self.means[:count] * scale.unsqueeze(1)
        return means.unsqueeze(1) + normals @ self.factors[:count].transpose(1, 2)
