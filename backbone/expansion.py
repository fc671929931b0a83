"""The slot of a layer that may grow: adapters, mixed by a router, with descriptors that say when there are too few.

Shapes: B batch, N tokens, D width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from backbone.adapter import Adapter, mixture
from backbone.router import ExpandableRouter


class ExpandableLayer(nn.Module):
    """The slot of one block: adapters, and where the layer may expand, one descriptor and one router column for each."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleList()
        self.descriptors = nn.ModuleList()
        self.router = ExpandableRouter()

    def __len__(self) -> int:
        return len(self.adapters)

    def forward(self, x: Tensor) -> Tensor:
        """The mixture of the adapters' outputs, [B, N, D] -> [B, N, D] (paper eq. 5). The parts of a nested adapter share
        its gate."""
        if not len(self.router):
            return self.adapters[-1](x)
        gates = self.router(x.mean(dim=1))
        parts = [adapter.parts() for adapter in cast(list[Adapter], list(self.adapters))]
        if any(len(own) > 1 for own in parts):
            gates = torch.cat([gates[:, i : i + 1].expand(-1, len(own)) for i, own in enumerate(parts)], dim=1)
        return mixture(x, [expert for own in parts for expert in own], gates)
