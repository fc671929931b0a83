"""CODA-Prompt's decomposed prompts (Smith et al., CVPR 2023, arXiv 2211.13218): one layer's components and how they grow.

Shapes: B batch, D width, L length of a prompt, S components.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TINY = 1e-8  # squared length below which nothing is left of a draw, as in the authors' code


class Draws(nn.Module):
    """Standard normal numbers for `rows` new components: `prompts` [rows, L D], `keys` and `attentions` [rows, D]."""

    def __init__(self, rows: int, length: int, width: int):
        super().__init__()
        self.prompts = nn.Parameter(torch.empty(rows, length * width), requires_grad=False)
        self.keys = nn.Parameter(torch.empty(rows, width), requires_grad=False)
        self.attentions = nn.Parameter(torch.empty(rows, width), requires_grad=False)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)


class Components(nn.Module):
    """S components of one layer: `prompts` [S, L, D], `keys` [S, D], `attentions` [S, D]; zero until `grow` fills them.

    prompt(q) = sum_s cos(q * A_s, K_s) P_s, no softmax (equations 3 to 6)."""

    def __init__(self, size: int, length: int, width: int):
        super().__init__()
        self.prompts = nn.Parameter(torch.zeros(size, length, width))
        self.keys = nn.Parameter(torch.zeros(size, width))
        self.attentions = nn.Parameter(torch.zeros(size, width))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Nothing is there yet."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    @torch.no_grad()
    def grow(self, draws: Draws, first: int) -> None:
        """Fills the components from `first` on from the draws: orthogonal to all before them, of length 1."""
        rows = slice(first, first + len(draws.keys))
        for components, drawn in zip(self.parameters(), draws.parameters(), strict=True):
            new = orthonormal(drawn, components[:first].flatten(1))
            components[rows] = new.view_as(components[rows])

    def forward(self, query: Tensor, first: int, end: int) -> Tensor:
        """Prefixes [B, 2, L / 2, D], keys and values, of queries [B, D] by components 0..end - 1; gradients reach those from
        `first` on."""
        prompts, keys, attentions = self.acting(first, end)
        # cos(q * A, K) without the products q * A of every sample with every component, [B, S, D]
        length = F.linear(query.square(), attentions.square()).clamp(min=1e-24).sqrt()
        weights = F.linear(query, attentions * F.normalize(keys, dim=1)) / length
        prompt = weights @ prompts.flatten(1)
        return prompt.unflatten(1, (2, prompts.shape[1] // 2, prompts.shape[2]))

    def acting(self, first: int, end: int) -> list[Tensor]:
        """Prompts, keys and attentions 0..end - 1, those below `first` without gradient."""
        return [torch.cat([x[:first].detach(), x[first:end]]) for x in self.parameters()]

    def penalty(self, first: int, end: int) -> Tensor:
        """How far components 0..end - 1 are from orthonormal: mean square of M M^T - I, summed over M = K, A and flat P
        (equation 7, with means as in the authors' code)."""
        squares = [_gram_error(x.flatten(1)) for x in self.acting(first, end)]
        return torch.stack(squares).sum()


def _gram_error(rows: Tensor) -> Tensor:
    return (rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)).square().mean()


def orthonormal(drawn: Tensor, before: Tensor) -> Tensor:
    """Rows drawn [n, W] minus their projections onto rows before [m, W] and onto each other's results, of length 1.

    Classical Gram-Schmidt as in the authors' code: the projections of a row are all of the draw itself, so the result is not
    exactly orthogonal to earlier rows that training has made oblique to each other. Where those rows span the space and
    nothing is left of a draw, it stays as drawn, and later rows are not orthogonal to it (the authors' code draws for ever).
    In float64, since what is left may be small."""
    others = [row for row in before.double() if row.any()]
    results: list[Tensor] = []
    for row in drawn.double():
        left = row - sum((row @ other) / (other @ other) * other for other in others)
        spanned = bool(left @ left < TINY)
        results.append(row if spanned else left)
        others += [] if spanned else [left]
    return torch.stack([row / row.norm() for row in results]).to(drawn.dtype) if results else drawn
