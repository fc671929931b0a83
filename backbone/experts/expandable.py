"""The slot of a layer that may grow: adapters, mixed by a router, with descriptors that say when there are too few.

Shapes: B batch, N tokens, D width.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn

from backbone.adapters.adapter import Adapter, mixture
from backbone.blocks import Slot
from backbone.experts.router import ExpandableRouter


class ExpandableLayer(Slot):
    """The slot of one block: adapters, and where the layer may expand, one descriptor and one router column for each."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleList()
        self.descriptors = nn.ModuleList()
        self.router = ExpandableRouter()

    def __len__(self) -> int:
        return len(self.adapters)

    @property
    def reads(self) -> Literal["token", "gates"]:  # type: ignore[override]
        return "gates" if len(self.router) else "token"

    def gates(self, x: Tensor) -> Tensor | None:
        """The adapters' gates [B, E] from the mean of all tokens x [B, N, D]; None for the lone adapter of a fixed layer."""
        return self.router(x.mean(dim=1)) if len(self.router) else None

    def forward(self, x: Tensor, gates: Tensor | None) -> Tensor:
        """The mixture of the adapters' outputs by gates [B, E], [B, N, D] -> [B, N, D] (paper eq. 5).

        The summands of a nested adapter share its gate."""
        if gates is None:
            return self.adapters[-1](x)
        summands = [adapter.summands() for adapter in cast(list[Adapter], list(self.adapters))]
        if any(len(group) > 1 for group in summands):
            gates = torch.cat([gates[:, i : i + 1].expand(-1, len(group)) for i, group in enumerate(summands)], dim=1)
        return mixture(x, [adapter for group in summands for adapter in group], gates)
