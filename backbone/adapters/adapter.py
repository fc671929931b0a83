"""Low-rank experts and the one kernel that mixes them.

Shapes: B batch, N tokens, D width, R rank, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.blocks import Slot

Activation = Literal["relu", "none"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "none": lambda x: x}


class Adapter(Slot):
    """A bottleneck beside a frozen MLP: y = scale * (U dropout(act(A x + a)) + u)   (AdaptFormer, Chen et al. 2022, eq. 4).

    x [.., D] -> y [.., D]; A `down_proj` [R, D], U `up_proj` [D, R]; `activation` relu, or none (LoRA, Hu et al. 2022).
    Starts as LoRA does (A Kaiming, the rest zero), so the output is exactly 0 until the first step. Trains all four tensors.
    """

    reads = "token"

    def __init__(
        self, width: int, rank: int, scale: float = 1.0, dropout: float = 0.0, activation: Activation = "relu"
    ):
        super().__init__()
        self.down_proj = nn.Linear(width, rank)
        self.up_proj = nn.Linear(rank, width)
        self.scale, self.dropout, self.activation = scale, dropout, activation

    @property
    def rank(self) -> int:
        return self.down_proj.out_features

    def summands(self) -> list[Adapter]:
        """The adapters whose sum is the output: itself alone."""
        return [self]

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.kaiming_uniform_(self.down_proj.weight, a=math.sqrt(5), generator=generator)
        for zero in (self.down_proj.bias, self.up_proj.weight, self.up_proj.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor, gates: None = None) -> Tensor:
        hidden = F.dropout(ACTIVATIONS[self.activation](self.down_proj(x)), self.dropout, self.training)
        return self.up_proj(hidden) * self.scale


def mixture(x: Tensor, experts: Sequence[Adapter], gates: Tensor) -> Tensor:
    """sum_e g_e * expert_e(x) in one down and one up product, whatever the ranks. All experts have one activation.

    x [B, N, D]; gates [B, E] (per sample) or [B, N, E] (per token); returns [B, N, D].
    Since expert_e is linear after its activation, its gate may scale its slice of the hidden units instead of its output:
    h = act(x A_cat^T + a_cat) [B, N, sum R_e]; y = (h * g) U_cat^T + g u. Exact for every elementwise activation; the loop
    over experts it replaces materialises E outputs of width D.
    """
    if gates.dim() == 2:
        gates = gates.unsqueeze(1)
    gates = gates * gates.new_tensor([e.scale for e in experts]) if any(e.scale != 1 for e in experts) else gates
    down = torch.cat([e.down_proj.weight for e in experts])
    first = experts[0]
    hidden = ACTIVATIONS[first.activation](F.linear(x, down, torch.cat([e.down_proj.bias for e in experts])))
    hidden = F.dropout(hidden, first.dropout, first.training)
    spread = [gates[..., i : i + 1].expand(*gates.shape[:-1], e.rank) for i, e in enumerate(experts)]
    # the gates as further hidden units, each with its expert's u as its column: a sum less over [B, N, D]
    units = torch.cat([hidden * torch.cat(spread, dim=-1), gates.expand(*hidden.shape[:-1], -1)], dim=-1)
    up = torch.cat([*(e.up_proj.weight for e in experts), torch.stack([e.up_proj.bias for e in experts], dim=1)], dim=1)
    return F.linear(units, up)
