"""How features move while a task trains, estimated on its images before and after, and applied to sums over older images.

The linear variant of SLDC (Rao et al., AAAI 2026, arXiv 2511.09926): a regularised least-squares map from the features before
to those after. Theirs is fitted on features of length 1, shrinks to zero and is then mixed with the identity by the number of
images; ours shrinks to the identity, so that features that stay leave everything as it is, and its weight is chosen on classes
left out of the fit, as the old classes are. Shapes: n images, P features, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RATIOS = tuple(
    10.0**k for k in range(-9, 4)
)  # candidates for the pull to the identity, over the mean of X'X's diagonal


@dataclass(frozen=True)
class Motion:
    """Features x [., P] become x A + b. Float64; `facts`: how it was chosen, for the log."""

    matrix: Tensor | None  # A [P, P]; None: the identity
    shift: Tensor  # b [P]
    facts: dict[str, Any]

    def of_features(self, x: Tensor) -> Tensor:
        """[n, P], or means [C, P]."""
        return (x if self.matrix is None else x @ self.matrix.to(x.dtype)) + self.shift.to(x.dtype)

    def of_directions(self, x: Tensor) -> Tensor:
        """[..., P]: differences of features, such as the rows of a factor R with covariance R'R."""
        return x if self.matrix is None else x @ self.matrix.to(x.dtype)

    def of_sums(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Sums [C, P] over `counts` [C] images each."""
        return self.of_directions(sums) + counts.unsqueeze(1) * self.shift

    def of_gram(self, gram: Tensor, total: Tensor, count: Tensor) -> Tensor:
        """The sum of x'x [P, P] over `count` images whose features add up to `total` [P]."""
        if self.matrix is not None:
            gram = self.matrix.T @ gram @ self.matrix
        cross = torch.outer(self.of_directions(total), self.shift)
        return gram + cross + cross.T + count * torch.outer(self.shift, self.shift)


def mean_motion(before: Tensor, after: Tensor) -> Motion:
    """One shift for all features: the mean of what these n images moved by. before, after [n, P]."""
    return Motion(None, (after.double() - before.double()).mean(dim=0), {"moved": moved(before, after)})


def linear_motion(before: Tensor, after: Tensor, labels: Tensor) -> Motion:
    """The A of least |X A - Y|^2 + r |A - I|^2, X and Y [n, P] the features before and after, labels [n].

    r is the candidate (`RATIOS`, times the mean of X'X's diagonal) whose maps, each fitted on one half of the classes, have
    the least squared error on the other half; ties go to the larger one, and a single class is halved by images."""
    x, y = before.double(), after.double()
    classes = labels.unique(sorted=True)
    first = torch.isin(labels, classes[::2]) if len(classes) > 1 else torch.arange(len(x), device=x.device) % 2 == 0
    halves = [rows for rows in (first, ~first) if rows.any() and (~rows).any()]
    errors = torch.zeros(len(RATIOS), dtype=torch.float64)
    for rows in halves:
        solve, left = _solver(x[rows], y[rows]), y[~rows] - x[~rows]
        for number, ratio in enumerate(RATIOS):
            errors[number] += (left - x[~rows] @ solve(ratio)).square().sum().cpu()
    best = float(errors.min())
    ratio = max(r for r, error in zip(RATIOS, errors.tolist(), strict=True) if error == best)
    matrix = torch.eye(x.shape[1], dtype=x.dtype, device=x.device) + _solver(x, y)(ratio)
    still = float((y - x).square().sum())
    facts = {
        "moved": moved(before, after),
        "ratio": ratio,
        "unexplained": best / still if still > 0 and halves else 0.0,
    }
    return Motion(matrix, torch.zeros_like(x[0]), facts)


def _solver(x: Tensor, y: Tensor) -> Any:
    """Function of r's ratio: A - I = (X'X + r I)^-1 X'(Y - X), by one eigendecomposition for all candidates."""
    gram = x.T @ x
    values, vectors = torch.linalg.eigh(gram)
    target, scale = vectors.T @ (x.T @ (y - x)), gram.diagonal().mean()
    values, floor = values.clamp(min=0), torch.finfo(x.dtype).tiny

    def solve(ratio: float) -> Tensor:
        return vectors @ (target / (values + ratio * scale + floor).unsqueeze(1))

    return solve


def moved(before: Tensor, after: Tensor) -> float:
    """Root mean square length of the moves over that of the features before."""
    length = float(before.double().square().sum())
    return float((after.double() - before.double()).square().sum() / length) ** 0.5 if length > 0 else 0.0
