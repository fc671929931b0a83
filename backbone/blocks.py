"""A frozen block in two halves, the slots that act in it, and what one pass carries from block to block.

Shapes: B batch, N tokens (prefix tokens included), D width, E experts, K branches.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal, cast

from torch import Tensor, nn

from backbone.timm_vit import Block

# what one half of a frozen block makes of the activations x [B, N, D], (block, x) -> [B, N, D]; the attention half reads a
# position beside them where the family has one, (block, x, position)
Half = Callable[..., Tensor]
# the first slot's input [B, N, D] -> gates for each slot, from the lowest layer up
Route = Callable[[Tensor], Sequence[Tensor]]


def attention_half(block: Block, x: Tensor, position: Tensor | None = None) -> Tensor:
    """x [B, N, D] plus the block's attention, which reads `position` where the family has one."""
    if isinstance(block, Block):
        return x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
    attended = block.attn(block.norm1(x), position)
    return x + block.drop_path1(attended if block.gamma_1 is None else block.gamma_1 * attended)


def mlp_half(block: Block, x: Tensor) -> Tensor:
    """x [B, N, D] plus the block's MLP."""
    if isinstance(block, Block):
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    transformed = block.mlp(block.norm2(x))
    return x + block.drop_path2(transformed if block.gamma_2 is None else block.gamma_2 * transformed)


def whole(block: Block, x: Tensor, position: Tensor | None = None) -> Tensor:
    """timm's forward pass of the block."""
    return block(x) if position is None else block(x, position)


HALVES: tuple[Half, Half] = (attention_half, mlp_half)  # one after the other they are timm's forward pass of the block


def mean_token(x: Tensor) -> Tensor:
    """[B, N, D] -> [B, D]."""
    return x.mean(dim=1)


class Slot(nn.Module):
    """What may stand beside a block's MLP. SlottedViT asks for `gates(x)`, then adds `forward(x, gates)` to the MLP's output.

    x [B, N, D] is the output of the block's attention half; `forward` returns the same shape. `reads` says what may be
    left out where the last block is computed for token 0 alone (backbone/last_block.py):
    - "token": what the slot adds to a token depends on that token alone;
    - "gates": the gates depend on all tokens, but `forward` acts on each token by itself;
    - "all": `forward` reads all tokens.
    """

    reads: Literal["token", "gates", "all"] = "all"

    def gates(self, x: Tensor) -> Tensor | None:
        """How much each expert acts, [B, E] or for each token [B, N, E]; None where the slot has no router."""
        return None


class BlockSlot(Slot):
    """A slot that acts inside its block: called as slot(x, gates, block) with the block's input x [B, N, D], it returns the
    block's output. Its gates are computed from x as well. Afterwards the block is as it was before."""


class Positioned:
    """A block with the position that it reads in this pass, as a BlockSlot calls it: block(x), block.get_submodule(name)."""

    def __init__(self, block: nn.Module, position: Tensor):
        self.block, self.position = block, position

    def __call__(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.block(x, self.position))

    def get_submodule(self, target: str) -> nn.Module:
        return self.block.get_submodule(target)


class Pass:
    """One pass through the blocks: the layers it looks at, the source of the gates, how often the batch is repeated."""

    def __init__(
        self,
        tap: Collection[int] = (),
        branches: int = 1,
        route: Route | None = None,
        record: Callable[[Tensor], Tensor] = mean_token,
    ):
        self.tap, self.branches, self.route, self.record = tap, branches, route, record
        self.tapped: dict[
            int, Tensor
        ] = {}  # of each layer in `tap` what `record` makes of the tokens that its slot reads
        self._routed: Iterator[Tensor] | None = None

    def look(self, layer: int, x: Tensor) -> None:
        """Records x [B, N, D], which the slot of `layer` reads, if the layer is tapped."""
        if layer in self.tap:
            self.tapped[layer] = self.record(x)

    def repeated(self, *activations: Tensor) -> list[Tensor]:
        """At the first slot each [B, ..] becomes [K B, ..], the batch K times; at later slots nothing is left to repeat."""
        branches, self.branches = self.branches, 1
        return [x if branches == 1 else x.repeat(branches, 1, 1) for x in activations]

    def gates(self, slot: Slot, x: Tensor) -> Tensor | None:
        """The gates of a slot that reads x: those of the route, which is called once, at the first slot; else the slot's."""
        if self.route is None:
            return slot.gates(x)
        if self._routed is None:
            self._routed = iter(self.route(x))
        return next(self._routed)

    def needs_all_tokens(self, layer: int, slot: nn.Module | None) -> bool:
        """Whether a tap, the route or the slot's gates read every token that leaves the attention of `layer`."""
        if layer in self.tap:
            return True
        if slot is None:
            return False
        first = self.route is not None and self._routed is None
        return first or cast(Any, slot).reads != "token"
