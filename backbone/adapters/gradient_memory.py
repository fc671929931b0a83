"""DualGPM: which input directions of a layer old tasks rely on, so that a new task can stay out of them.

Liang and Li, "Adaptive Plasticity Improvement for Continual Learning" (CVPR 2023) and InfLoRA (CVPR 2024, arXiv 2404.00228,
section 3.3), after GPM (Saha et al., ICLR 2021, arXiv 2103.09762). Shapes: D width, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SMALL = 1e-12  # singular values below this share of the largest are rounding, and their vectors arbitrary


class GradientMemory(nn.Module):
    """The directions of one layer's input that matter to the tasks so far, as a projector of constant size.

    While they are few, `projector` P spans them and `retains` is false; once they are more than D / 2, P spans what is left
    over and `retains` is true. `dim` is P's rank. `moment` M [D, D] is the mean of x x^T over the tokens x that the layer
    reads. All in float64: P is a projector to rounding only, and energies are squares of M's singular values, which are
    squares already.
    """

    projector: Tensor  # [D, D]
    dim: Tensor  # []
    retains: Tensor  # []

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("projector", torch.zeros(width, width, dtype=torch.float64))
        self.register_buffer("dim", torch.zeros((), dtype=torch.int64))
        self.register_buffer("retains", torch.zeros((), dtype=torch.bool))

    def free(self, moment: Tensor) -> Tensor:
        """The part of M [D, D] that a new task may use: M - P M, or P M where P spans what is left over."""
        inside = self.projector @ moment
        return inside if self.retains else moment - inside

    def directions(self, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The `rank` directions [R, D] that hold most of M's free part, orthonormal rows, and their singular values [R].

        Where fewer are left, the further rows are 0. Their signs are those of the SVD: arbitrary."""
        vectors, values = _left(self.free(moment))
        rows, count = torch.zeros(rank, len(moment)).to(moment), min(rank, vectors.shape[1])
        rows[:count] = vectors[:, :count].T
        return rows, values[:rank]

    @torch.no_grad()
    def update(self, moment: Tensor, threshold: float, *, short_start: bool = False) -> None:
        """Takes in a task from the moment M after it: `threshold`, in 0..1, is the share of M's energy that P must hold.

        `short_start`, for the first task: one direction fewer than the share needs, at least one; and where these are half of
        all or more, they are taken for what is left over. So does the authors' code."""
        total = moment.square().sum()  # of the squares of its singular values
        if total == 0:
            return
        vectors, values = _left(self.free(moment))
        shares = (values.square() / total).tolist()
        if self.retains:  # what the task uses of the rest is taken out of it, until little enough of M's energy is left
            left, count = sum(shares), 0
            while count < len(shares) and left >= 1 - threshold:
                left, count = left - shares[count], count + 1
            self._span(vectors[:, :count], -count)
            return
        first, held, count = not bool(self.dim), 1 - sum((values.square() / total).tolist()), 0
        while count < len(shares) and held < threshold:
            held, count = held + shares[count], count + 1
        if first and short_start:
            count = max(count - 1, 1)
        self._span(vectors[:, :count], count)
        width = len(moment)
        if first and short_start:
            self.retains.fill_(2 * count >= width)
        elif 2 * int(self.dim) > width:
            self.projector.copy_(torch.eye(width).to(moment) - self.projector)
            self.dim.fill_(width - int(self.dim))
            self.retains.fill_(True)

    def _span(self, vectors: Tensor, change: int) -> None:
        """Adds the span of orthonormal columns [D, n] to P, or with a negative `change` takes it away."""
        self.projector.add_(vectors @ vectors.T, alpha=1 if change > 0 else -1)
        self.dim.add_(change)


def _left(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors [D, n] and values [n], the largest first, without those that are rounding."""
    vectors, values, _ = torch.linalg.svd(matrix)
    rank = int((values > values[0] * SMALL).sum())
    return vectors[:, :rank], values[:rank]
