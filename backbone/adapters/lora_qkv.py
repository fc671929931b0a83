"""Low-rank updates of the query, key or value part of a block's fused `qkv` layer, several of them added up.

They act by a hook for the time of a pass, for the reason that backbone/adapters/lora.py gives. Shapes: B batch, N
tokens, D width (the queries', keys' and values' alike), R rank, T updates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from backbone.adapters.lora import TARGETS, LoRA, linear_of, mixture
from backbone.blocks import BlockSlot
from backbone.vit import SlottedViT


class FixedDown(LoRA):
    """A LoRA whose down projection A [R, I] is a buffer: computed, not trained, and saved with every training phase."""

    def __init__(self, inputs: int, outputs: int, rank: int):
        super().__init__(inputs, outputs, rank)
        down = self.down.data
        del self.down
        self.register_buffer("down", down)


class QKVUpdates(BlockSlot):
    """(q, k, v) = W x + b, where each of `parts` gets sum_t g_t U_t A_t x on top; x is the output of the block's norm1.

    A part is "q", "k", "v", or several of them that share A, as in "kv": one LoRA with outputs [k, v]. Gates [1, T] or
    [B, T] weigh the updates, in the order they were added; None: all 1. However many there are, a part costs one down and
    one up product.
    """

    def __init__(self, parts: Sequence[str]):
        super().__init__()
        self.updates = nn.ModuleDict({part: nn.ModuleList() for part in parts})

    def __len__(self) -> int:
        return len(self.of(next(iter(self.updates))))

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.updates)

    def of(self, part: str) -> list[LoRA]:
        """The updates of a part, the oldest first."""
        return cast("list[LoRA]", list(cast(nn.ModuleList, self.updates[part])))

    def add(self, loras: Mapping[str, LoRA]) -> None:
        """Adds an update of every part."""
        for part in self.parts:
            cast(nn.ModuleList, self.updates[part]).append(loras[part])

    def newest(self) -> dict[str, LoRA]:
        return {part: self.of(part)[-1] for part in self.parts}

    def forward(self, x: Tensor, gates: Tensor | None, block: nn.Module) -> Tensor:
        """The output [B, N, D] of `block` for its input x [B, N, D]."""

        def adding(linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            (normed,) = inputs
            weights = None if gates is None else gates.expand(normed.shape[0], -1)
            thirds = dict(zip("qkv", output.chunk(3, dim=-1), strict=True))
            for part in self.parts:
                added = mixture(normed, self.of(part), weights).chunk(len(part), dim=-1)
                for letter, more in zip(part, added, strict=True):
                    thirds[letter] = thirds[letter] + more
            return torch.cat(list(thirds.values()), dim=-1)

        if not len(self):
            return cast(Tensor, block(x))
        hook = block.get_submodule(TARGETS["qkv"]).register_forward_hook(adding)
        try:
            return cast(Tensor, block(x))
        finally:
            hook.remove()


def sizes_of(backbone: SlottedViT, layer: int, part: str) -> tuple[int, int]:
    """Inputs and outputs of a LoRA for a part. Raises ValueError for a block without a fused qkv of one nn.Linear."""
    linear = linear_of(backbone, layer, "qkv")
    return linear.in_features, linear.out_features // 3 * len(part)


def slots_of(backbone: SlottedViT) -> list[QKVUpdates]:
    """The slots of this kind, from the lowest layer up."""
    slots = [backbone.slots[name] for name in sorted(backbone.slots, key=int)]
    return [slot for slot in slots if isinstance(slot, QKVUpdates)]
