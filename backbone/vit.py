"""One frozen ViT over timm with one open slot per block, beside the MLP.

Shapes: B batch, N tokens (prefix tokens included), D width. A slot is any module that maps the stream after attention
[B, N, D] to an addition of the same shape; a BlockSlot runs its block itself. With empty slots the features equal timm's own
bit for bit.

A pass may start from Activations instead of images: what lies below the first part that learns is the same for ever, so it can
be computed once. In models that pool one token the last block computes the others only where something reads them
(backbone/last_block.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from backbone import last_block
from backbone.timm_vit import Block, VisionTransformer
from utils.config.schema import Precision
from utils.process import stopwatch

# the first slot's input [B, N, D] -> gates for each slot, from the lowest up
Route = Callable[[Tensor], Sequence[Tensor]]
Half = Callable[[Block, Tensor], Tensor]  # of a frozen block: what it makes of the stream x [B, N, D]


def attention_half(block: Block, x: Tensor) -> Tensor:
    return x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))


def mlp_half(block: Block, x: Tensor) -> Tensor:
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


HALVES: tuple[Half, Half] = (attention_half, mlp_half)  # one after the other they are timm's Block.forward


@dataclass(frozen=True)
class Activations:
    """Where a pass may start instead of at images: `x` [B, N, D], what block `layer` reads.

    With `after` the block's attention and MLP are done: `x` is what its slot reads, `after` [B, N, D] what the slot's output
    is added to. At `layer` = depth everything is done: `x` [B, 1, D] holds the pooled features."""

    layer: int
    x: Tensor
    after: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Activations:
        """The same on a device, as Tensor.to."""
        after = None if self.after is None else self.after.to(device, non_blocking=non_blocking)
        return replace(self, x=self.x.to(device, non_blocking=non_blocking), after=after)


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
        self.router: nn.Module | None = None  # a Route for all slots, see backbone/experts/routed.py
        self.precision: Precision = "fp32"  # see backbone/precision.py
        self.halves = HALVES  # or these compiled
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

    def without_slots(self) -> SlottedViT:
        """The same frozen model, its tensors shared, with nothing in it: what images are before anything is learned."""
        bare = copy.copy(self)
        bare.__dict__["_modules"] = {**self._modules, "slots": nn.ModuleDict(), "router": None}
        return bare

    def frozen_copy(self) -> SlottedViT:
        """A teacher: copies of the slots and the router, without gradients and in evaluation mode, over the same frozen ViT.

        The ViT's tensors are shared, so the copy costs the memory of the slots alone; training the original later does not
        change it."""
        teacher = copy.deepcopy(self, {id(self.vit): self.vit})
        return teacher.requires_grad_(False).eval()

    def forward(self, images: Tensor | Activations, branches: int = 1, route: Route | None = None) -> Tensor:
        """Pooled features [B, D] of images [B, 3, H, W] in [0, 1], as timm's forward_head(.., pre_logits=True) gives them; or
        of what `prefix` made of them.

        With K `branches`, [K B, D]: K copies of the batch one after the other, for slots that treat them differently. What
        is equal for all copies, up to the first slot's input and its block's MLP, is computed once.

        `route`, or without one the attached `router`, is called once, with the first slot's input, which the frozen prefix
        alone decides; each slot is then called as slot(x, its gates). Without either as slot(x), a BlockSlot with None."""
        return self.encode(images, branches=branches, route=route)[0]

    def encode(
        self, images: Tensor | Activations, tap: Collection[int] = (), branches: int = 1, route: Route | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """`forward`, and for each layer in `tap` the mean token [B, D] of the stream its slot reads."""
        with _timed(images), self.casting():
            start = self._start(images, tap, branches, route)
            if start.layer == self.depth:
                return start.x[:, 0].repeat(branches, 1), {}
            stream, means = self._blocks(start, tap, branches=branches, route=route)
            return self._pooled(stream.x), means

    def all_tokens(self, start: Activations) -> Tensor:
        """Every token [B, N, D] after the final norm, of a model without slots; the stream may have more than images give."""
        assert not self.slots, "with slots the last block may leave tokens out"
        with _timed(start), self.casting():
            return self.vit.norm(self._blocks(start, ())[0].x).to(self.mean.dtype)

    def mean_tokens(self, images: Tensor | Activations, tap: Collection[int]) -> dict[int, Tensor]:
        """The mean tokens alone: nothing above the last tapped layer's attention is computed."""
        with _timed(images), self.casting():
            return self._blocks(self._start(images, tap), tap, stop=max(tap))[1] if tap else {}

    def prefix(self, images: Tensor, layer: int, inside: bool = False) -> Activations:
        """The stream [B, N, D] at the input of block `layer`, slots below it included; for `layer` = depth the features.

        `inside` goes on to where the block's slot begins: two tensors to keep, and one block less in every later pass. A
        BlockSlot acts from its block's input on, so it needs the stream without `inside`.
        Raises ValueError for a layer that does not exist, and where a router for all slots would lose the first one's
        input."""
        if not 0 <= layer <= self.depth:
            raise ValueError(f"a prefix ends at a layer 0..{self.depth}, got {layer}")
        if inside and (layer == self.depth or isinstance(self._slot(layer), BlockSlot)):
            raise ValueError(f"the prefix of layer {layer} cannot go inside its block")
        self._refuse(layer, self.router is not None, "a router")
        with _timed(images), self.casting():
            return self._prefix(images, layer, inside)

    def _prefix(self, images: Tensor, layer: int, inside: bool) -> Activations:
        start = Activations(0, self.stem(images))
        if layer == self.depth:
            return Activations(layer, self._pooled(self._blocks(start, ())[0].x).unsqueeze(1))
        stream = self._blocks(start, (), stop=layer, before=True)[0]
        if not inside:
            return stream
        block, (attend, transform) = cast(Block, self.vit.blocks[layer]), self.halves
        x = attend(block, stream.x)
        return Activations(layer, x, transform(block, x))

    def stem(self, images: Tensor) -> Tensor:
        """Patch and position embedding: [B, 3, H, W] -> [B, N, D], in the weights' precision."""
        images = images.to(self.mean.dtype)
        if self.normalises:
            images = (images - self.mean) / self.std
        vit = self.vit
        return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images)))).to(self.mean.dtype)

    def casting(self) -> AbstractContextManager[Any]:
        """What every pass runs in. The stream starts in the weights' precision and bf16 is only added to it, so it stays so."""
        return torch.autocast(self.mean.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def _slot(self, layer: int) -> nn.Module | None:
        return self.slots[name] if (name := str(layer)) in self.slots else None

    def _pooled(self, x: Tensor) -> Tensor:
        return self.vit.forward_head(self.vit.norm(x), pre_logits=True).to(self.mean.dtype)

    def _start(
        self, images: Tensor | Activations, tap: Collection[int] = (), branches: int = 1, route: Route | None = None
    ) -> Activations:
        """Where the blocks begin. ValueError if what is asked for lies below the stream that was given."""
        if not isinstance(images, Activations):
            return Activations(0, self.stem(images))
        layer = images.layer
        if passed := sorted(n for n in tap if n < layer):
            raise ValueError(f"layers {passed} are to be tapped, which a stream at layer {layer} has passed")
        if images.after is not None and isinstance(self._slot(layer), BlockSlot):
            raise ValueError(f"a stream inside block {layer} cannot enter a slot that runs the block itself")
        self._refuse(layer, branches > 1, "branches")
        self._refuse(layer, (route or self.router) is not None, "a router")
        return images

    def _refuse(self, layer: int, asked: bool, what: str) -> None:
        """ValueError if what begins at the first slot is asked of a stream that has passed it."""
        if asked and (below := [int(name) for name in self.slots if int(name) < layer]):
            raise ValueError(f"{what} would begin at slot {min(below)}, which a stream at layer {layer} has passed")

    def _blocks(
        self,
        start: Activations,
        tap: Collection[int],
        stop: int | None = None,
        branches: int = 1,
        route: Route | None = None,
        before: bool = False,
    ) -> tuple[Activations, dict[int, Tensor]]:
        """The blocks from `start` up to the end, or up to the attention of block `stop`, or with `before` up to its input."""
        route = self.router if route is None else route
        gates: Iterator[Tensor] | None = None
        means: dict[int, Tensor] = {}
        x, ready = start.x, start.after
        attend, transform = self.halves
        for layer in range(start.layer, self.depth):
            if before and layer == stop:
                break
            if stopwatch.current is not None:
                stopwatch.current.block(layer)
            block, slot = cast(Block, self.vit.blocks[layer]), self._slot(layer)
            # without any slot the features are to be timm's bit for bit, and one query may round differently
            one = layer == self.depth - 1 and len(self.slots) > 0 and last_block.pools_one(self.vit, block, slot)
            if slot is None and layer not in tap and not one and ready is None:
                x = block(x) if self.halves is HALVES else transform(block, attend(block, x))
                continue
            inside = isinstance(slot, BlockSlot)
            first = slot is not None and route is not None and gates is None
            if ready is None and not inside:
                alone = one and layer not in tap and not first and not last_block.reads_all(slot)
                if alone:
                    x = x[:, :1] + block.drop_path1(block.ls1(last_block.one_query(block.attn, block.norm1(x))))
                else:
                    x = attend(block, x)
            if layer in tap:
                means[layer] = x.mean(dim=1)
            if layer == stop:
                break
            whole = x
            if one:
                x, ready = x[:, :1], None if ready is None else ready[:, :1]
            if inside:
                after = x
            elif ready is not None:
                after = ready
            else:  # of one token no compiled code is worth having
                after = mlp_half(block, x) if one else transform(block, x)
            ready = None
            if slot is not None:
                if branches > 1:  # the first slot: from here on the copies differ
                    whole, x, after = (t.repeat(branches, 1, 1) for t in (whole, x, after))
                    branches = 1
                if first and route is not None:
                    gates = iter(route(whole))
                own = None if gates is None else next(gates)
                if one:
                    own = last_block.gates_for_one(slot, whole, own)
                if inside:
                    after = slot(x, own, block)
                else:
                    after = after + (slot(x) if own is None else slot(x, own))
            x = after
        return Activations(self.depth if stop is None else stop, x.repeat(branches, 1, 1) if branches > 1 else x), means


def _timed(images: Tensor | Activations) -> AbstractContextManager[None]:
    """The time of a pass: it begins in the prefix, and `profile.block` says where that ends."""
    return stopwatch.section("prefix", 0 if isinstance(images, Activations) else len(images))


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
