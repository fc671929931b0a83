"""One frozen ViT over timm with one open slot per block, beside the MLP.

Shapes: B batch, N tokens (prefix tokens included), D width. A slot is any module that maps the stream after attention
[B, N, D] to an addition of the same shape; a BlockSlot runs its block itself. With empty slots the features equal timm's own
bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import cast

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

# the first slot's input [B, N, D] -> gates for each slot, from the lowest up
Route = Callable[[Tensor], Sequence[Tensor]]


class BlockSlot(nn.Module):
    """A slot that acts inside its block: called as slot(x, gates or None, block) with the block's input x [B, N, D], it
    returns the block's output, and the block is afterwards as it was."""


class SlottedViT(nn.Module):
    """A timm VisionTransformer, frozen and always in evaluation mode, whose blocks take additions from `slots`.

    `mean`, `std`: per-channel input normalisation of images in [0, 1]; None leaves them as they are.
    Raises ValueError for a model whose blocks are not timm's plain pre-norm Block: the place between attention and MLP,
    where an adapter reads, does not exist in it.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vit: nn.Module, mean: Sequence[float] | None = None, std: Sequence[float] | None = None):
        super().__init__()
        _check_supported(vit)
        assert isinstance(vit, VisionTransformer)
        self.vit = vit.requires_grad_(False)
        self.slots = nn.ModuleDict()
        self.router: nn.Module | None = None  # a Route for all slots, see backbone/routed.py
        self.normalises = mean is not None
        self.register_buffer("mean", torch.tensor(mean or [0.0]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std or [1.0]).view(-1, 1, 1), persistent=False)
        self.eval()

    @property
    def depth(self) -> int:
        return len(self.vit.blocks)

    @property
    def width(self) -> int:
        """D of the stream, of the slots and of the pooled feature."""
        return self.vit.embed_dim

    @property
    def tokens(self) -> int:
        """N of the stream for images of the model's size, prefix tokens included."""
        vit = self.vit
        return int(vit.patch_embed.num_patches) + int(vit.num_prefix_tokens)

    def train(self, mode: bool = True) -> SlottedViT:
        """Sets the slots' mode. The frozen model stays in evaluation mode: no dropout, no stochastic depth."""
        super().train(mode)
        self.vit.eval()
        return self

    def fill(self, layer: int, slot: nn.Module) -> None:
        """Puts `slot` beside the MLP of block `layer`, or around the block if it is a BlockSlot."""
        if not 0 <= layer < self.depth:
            raise ValueError(f"layer {layer} does not exist, the backbone has layers 0..{self.depth - 1}")
        self.slots[str(layer)] = slot

    def forward(self, images: Tensor, branches: int = 1, route: Route | None = None) -> Tensor:
        """Pooled features [B, D] of images [B, 3, H, W] in [0, 1], as timm's forward_head(.., pre_logits=True) gives them.

        With K `branches`, [K B, D]: K copies of the batch one after the other, for slots that treat them differently. What
        is equal for all copies, up to the first slot's input and its block's MLP, is computed once.

        `route`, or without one the attached `router`, is called once, with the first slot's input, which the frozen prefix
        alone decides; each slot is then called as slot(x, its gates). Without either as slot(x), a BlockSlot with None."""
        return self.encode(images, branches=branches, route=route)[0]

    def encode(
        self, images: Tensor, tap: Collection[int] = (), branches: int = 1, route: Route | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """`forward`, and for each layer in `tap` the mean token [B, D] of the stream its slot reads."""
        stream, means = self._blocks(self.stem(images), tap, branches=branches, route=route)
        return self.vit.forward_head(self.vit.norm(stream), pre_logits=True), means

    def mean_tokens(self, images: Tensor, tap: Collection[int]) -> dict[int, Tensor]:
        """The mean tokens alone: nothing above the last tapped layer's attention is computed."""
        return self._blocks(self.stem(images), tap, stop=max(tap))[1] if tap else {}

    def stem(self, images: Tensor) -> Tensor:
        """Patch and position embedding: [B, 3, H, W] -> [B, N, D], in the weights' precision."""
        images = images.to(self.mean.dtype)
        if self.normalises:
            images = (images - self.mean) / self.std
        vit = self.vit
        return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))

    def _blocks(
        self,
        x: Tensor,
        tap: Collection[int],
        stop: int | None = None,
        branches: int = 1,
        route: Route | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        route = self.router if route is None else route
        gates: Iterator[Tensor] | None = None
        means: dict[int, Tensor] = {}
        blocks = cast(list[Block], self.vit.blocks)
        for layer, block in enumerate(blocks):
            slot = self.slots[name] if (name := str(layer)) in self.slots else None
            if slot is None and layer not in tap:
                x = block(x)
                continue
            inside = isinstance(slot, BlockSlot)
            if not inside:
                x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
            if layer in tap:
                means[layer] = x.mean(dim=1)
            if layer == stop:
                break
            after = x if inside else x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
            if slot is not None:
                if branches > 1:  # the first slot: from here on the copies differ
                    x, after, branches = x.repeat(branches, 1, 1), after.repeat(branches, 1, 1), 1
                if route is not None and gates is None:
                    gates = iter(route(x))
                if inside:
                    after = slot(x, None if gates is None else next(gates), block)
                else:
                    after = after + (slot(x) if gates is None else slot(x, next(gates)))
            x = after
        return x.repeat(branches, 1, 1) if branches > 1 else x, means


def _check_supported(vit: nn.Module) -> None:
    name = type(vit).__name__
    if not isinstance(vit, VisionTransformer):
        raise ValueError(f"backbone {name} is not a timm VisionTransformer; choose a vit_* or deit_* model")
    kinds = {type(block).__name__ for block in vit.blocks if type(block) is not Block}
    if kinds:
        raise ValueError(
            f"backbone {name} has blocks of type {', '.join(sorted(kinds))}: these have no stream between attention and MLP "
            f"for an adapter to read; choose a ViT with timm's plain Block, such as vit_base_patch16_224"
        )
