"""The slot of a layer that may grow: adapters, mixed by a router, with descriptors that say when there are too few.

Shapes: B batch, N tokens, D width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from backbone.adapters.adapter import Adapter, mixture
from backbone.experts.router import ExpandableRouter


class ExpandableLayer(nn.Module):
    """The slot of one block: adapters, and where the layer may expand, one descriptor and one router column for each."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleList()
        self.descriptors = nn.ModuleList()
        self.router = ExpandableRouter()

    def __len__(self) -> int:
        return len(self.adapters)

    @property
    def reads_all(self) -> bool:
        """Whether gates depend on all tokens, see backbone/last_block.py."""
        return len(self.router) > 0

    def gates_of(self, x: Tensor) -> Tensor | None:
        """The adapters' gates [B, E] from the mean of all tokens x [B, N, D]; None for the lone adapter of a fixed layer."""
        return self.router(x.mean(dim=1)) if len(self.router) else None

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        """The mixture of the adapters' outputs, [B, N, D] -> [B, N, D] (paper eq. 5), by the given gates [B, E] or its own.
        The parts of a nested adapter share its gate."""
        if (gates := self.gates_of(x) if gates is None else gates) is None:
            return self.adapters[-1](x)
        parts = [adapter.summands() for adapter in cast(list[Adapter], list(self.adapters))]
        if any(len(own) > 1 for own in parts):
            gates = torch.cat([gates[:, i : i + 1].expand(-1, len(own)) for i, own in enumerate(parts)], dim=1)
        return mixture(x, [expert for own in parts for expert in own], gates)
