"""Routers: which expert acts how much. So far the one that grows with a layer's adapters (SEMA).

Shapes: B batch, D width, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RouterColumn(nn.Linear):
    """One expert's routing logit from the mean token, [B, D] -> [B, 1]; starts as torch's Linear does."""

    def __init__(self, width: int):
        super().__init__(width, 1)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound, generator=generator)
        nn.init.uniform_(self.bias, -bound, bound, generator=generator)


class ExpandableRouter(nn.Module):
    """Softmax over one logit an expert (SEMA, Wang et al. 2025, eq. 6). A new expert brings a column of its own, so that old
    columns can stay frozen while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = nn.ModuleList()

    def __len__(self) -> int:
        return len(self.columns)

    def forward(self, mean_token: Tensor) -> Tensor:
        """Gates [B, E] that sum to 1, from mean tokens [B, D]."""
        return torch.cat([column(mean_token) for column in self.columns], dim=1).softmax(dim=1)
