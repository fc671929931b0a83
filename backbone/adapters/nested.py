"""Adapters with several time scales: one slow, any number of fast ones that compete for its place, and levels in between.

Design of Nested LoRA (public repository motsun1/Nested-LoRA), over the one mixture kernel of `backbone.adapters.adapter`.
Shapes: B batch, N tokens, D width, R rank, K fast experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from backbone.adapters.adapter import Activation, Adapter, mixture
from backbone.blocks import Slot

Active = Literal["combined", "slow", "fast"]


class NestedLoRAAdapter(Slot):
    """y = slow(x) + sum of the middle levels + sum of the active fast experts, [B, N, D] -> [B, N, D].

    `slow` is one Adapter, `middle` holds `levels - 2` of them from slow to fast, `fast` holds K. With `levels` 1 there is slow
    alone: a single LoRA. With `shared_down` all are built on slow's down projection, which is then frozen, so that merging
    is linear in the up projections. What acts is set by `use` between passes; `forward` changes nothing.
    """

    reads = "token"

    def __init__(
        self,
        width: int,
        rank: int,
        experts: int = 1,
        *,
        levels: int = 2,
        activation: Activation = "relu",
        shared_down: bool = False,
    ):
        super().__init__()
        if experts < 1 or levels < 1:
            raise ValueError(f"at least 1 fast expert and 1 level are needed, got {experts} and {levels}")
        self.slow = Adapter(width, rank, activation=activation)
        self.middle = nn.ModuleList(Adapter(width, rank, activation=activation) for _ in range(levels - 2))
        fast = range(experts if levels > 1 else 0)
        self.fast = nn.ModuleList(Adapter(width, rank, activation=activation) for _ in fast)
        self.width, self.base_rank, self.shared_down = width, rank, shared_down
        self.use()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        for adapter in self.adapters():
            adapter.reset_parameters(generator)
            self._share_down(adapter)

    def adapters(self) -> list[Adapter]:
        """All of them, from slow to fast."""
        return [self.slow, *cast(Sequence[Adapter], self.middle), *cast(Sequence[Adapter], self.fast)]

    def trainable(self, adapter: Adapter) -> list[nn.Parameter]:
        """What of one of its adapters is trained: all, or the up projection alone where the down projection is shared."""
        return list(adapter.up_proj.parameters() if self.shared_down else adapter.parameters())

    # What acts ------------------------------------------------------------------------------------------------------

    def use(self, part: Active = "combined", active: Sequence[int] | None = None, branches: bool = False) -> None:
        """Sets what the next passes compute: slow and fast together or one `part`, with these `active` fast experts (None:
        all). With `branches` the batch holds K copies one after the other, and copy k sees fast expert k alone."""
        self.part, self.branches = part, branches
        self.active = tuple(range(len(self.fast)) if active is None else active)

    def summands(self) -> list[Adapter]:
        """The adapters whose sum is the output now."""
        below = {"combined": [self.slow, *cast(Sequence[Adapter], self.middle)], "slow": [self.slow], "fast": []}
        fast = [] if self.part == "slow" else [cast(Adapter, self.fast[k]) for k in self.active]
        return below[self.part] + fast

    def gates(self, x: Tensor) -> Tensor:
        """1 for each of `summands`, but with branches 1 for the branch's fast expert alone, [B, summands].

        Raises ValueError if a batch of branches cannot be divided by their number."""
        gates = x.new_ones(x.shape[0], len(self.summands()))
        if self.branches and self.part != "slow":
            count = len(self.active)
            if x.shape[0] % count:
                raise ValueError(f"a batch of {x.shape[0]} cannot be divided into {count} branches of equal size")
            one_each = torch.eye(count, dtype=x.dtype, device=x.device)
            gates[:, gates.shape[1] - count :] = one_each.repeat_interleave(x.shape[0] // count, dim=0)
        return gates

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]; without gates those of `gates`."""
        adapters = self.summands()
        return mixture(x, adapters, self.gates(x) if gates is None else gates) if adapters else torch.zeros_like(x)

    # Growing and starting anew --------------------------------------------------------------------------------------

    def new(self) -> Adapter:
        """An adapter of the same shape as this one's, without start values."""
        return Adapter(self.width, self.base_rank, activation=self.slow.activation)

    def replace(self, position: int, adapter: Adapter) -> None:
        """Puts `adapter`, of whatever rank, in the place of `adapters()[position]`."""
        if position == 0:
            self.slow = adapter
            return
        within = position - 1
        levels, within = (self.middle, within) if within < len(self.middle) else (self.fast, within - len(self.middle))
        levels[within] = adapter
        self._share_down(adapter)

    def ranks(self) -> list[int]:
        """Rank of each adapter, from slow to fast; `resize` is its inverse."""
        return [adapter.rank for adapter in self.adapters()]

    def resize(self, ranks: Sequence[int]) -> None:
        """Gives the adapters these ranks, with values that a checkpoint then loads."""
        for adapter, rank in zip(self.adapters(), ranks, strict=True):
            if adapter.rank != rank:
                grown = Adapter(self.width, rank).to(adapter.down_proj.weight)
                adapter.down_proj, adapter.up_proj = grown.down_proj, grown.up_proj

    def _share_down(self, adapter: Adapter) -> None:
        if self.shared_down and adapter is not self.slow:
            with torch.no_grad():
                adapter.down_proj.weight.copy_(self.slow.down_proj.weight)
                adapter.down_proj.bias.copy_(self.slow.down_proj.bias)
