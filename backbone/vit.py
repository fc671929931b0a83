"""One frozen ViT over timm with one open slot per block, beside the MLP.

Shapes: B batch, N tokens (prefix tokens included), D width. A slot (backbone/blocks.py) reads the activations after attention
[B, N, D] and returns an addition of the same shape; a BlockSlot runs its block itself. With empty slots the features equal
timm's bit for bit.

A pass may start from Activations instead of images: what lies below the first trainable part never changes, so it can
be computed once. In models that pool one token the last block computes the others only where something reads them
(backbone/last_block.py).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from backbone import families, last_block
from backbone.blocks import HALVES, BlockSlot, Pass, Positioned, Route, Slot, whole
from backbone.timm_vit import Block, VisionTransformer
from utils.config.schema import Precision
from utils.process import stopwatch


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


class SlottedViT(nn.Module):
    """A timm VisionTransformer, frozen and always in evaluation mode, whose blocks take additions from `slots`.

    `mean`, `std`: per-channel input normalisation of images in [0, 1]; None leaves them as they are.
    Raises ValueError for a model that lacks what slots need, such as blocks with a place between attention and MLP, where an
    adapter reads (backbone/families.py).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vit: nn.Module, mean: Sequence[float] | None = None, std: Sequence[float] | None = None):
        super().__init__()
        families.refuse_unfit(vit)
        # or an Eva or a Beit: what is read of it here they have under the same names
        self.vit = cast(VisionTransformer, vit.requires_grad_(False))
        self.slots = nn.ModuleDict()
        self.router: nn.Module | None = None  # a Route for all slots, see backbone/experts/routed.py
        self.precision: Precision = "fp32"  # see backbone/precision.py
        self.halves = HALVES  # or these compiled
        self.short_last_block = True  # False: all tokens there too, to measure or check what the short cut does
        self.normalises = mean is not None
        self.register_buffer("mean", torch.tensor(mean or [0.0]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std or [1.0]).view(-1, 1, 1), persistent=False)
        self.eval()

    @property
    def depth(self) -> int:
        """How many blocks, hence layers, the model has."""
        return len(self.vit.blocks)

    @property
    def width(self) -> int:
        """D of the activations, of the slots and of the pooled feature."""
        return self.vit.embed_dim

    @property
    def tokens(self) -> int:
        """N of the activations for images of the model's size, prefix tokens included."""
        vit = self.vit
        return int(vit.patch_embed.num_patches) + int(vit.num_prefix_tokens)

    def train(self, mode: bool = True) -> SlottedViT:
        """Sets the slots' mode. The frozen model stays in evaluation mode: no dropout, no stochastic depth."""
        super().train(mode)
        self.vit.eval()
        return self

    def fill(self, layer: int, slot: nn.Module) -> None:
        """Puts `slot` beside the MLP of block `layer`, or around the block if it is a BlockSlot.

        Raises ValueError for a layer that does not exist or a module that is not a Slot."""
        if not 0 <= layer < self.depth:
            raise ValueError(f"layer {layer} does not exist, the backbone has layers 0..{self.depth - 1}")
        if not isinstance(slot, Slot):
            raise ValueError(f"layer {layer} takes a backbone.blocks.Slot, got {type(slot).__name__}")
        self.slots[str(layer)] = slot

    def without_slots(self) -> SlottedViT:
        """The same frozen model, its tensors shared, without slots and router: features before anything is learned."""
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
        of what `prefix` computed from them.

        With K `branches`, [K B, D]: K copies of the batch one after the other, for slots that treat them differently. What
        is equal for all copies, up to the first slot's input and its block's MLP, is computed once.

        `route`, or without one the attached `router`, is called once, with the first slot's input, which the frozen prefix
        alone decides, and gives the gates of every slot. Without either each slot gives its gates."""
        return self.encode(images, branches=branches, route=route)[0]

    def encode(
        self, images: Tensor | Activations, tap: Collection[int] = (), branches: int = 1, route: Route | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """`forward`, and for each layer in `tap` the mean [B, D] of the tokens that its slot reads."""
        now = Pass(tap, branches, self.router if route is None else route)
        with _timed(images), self.casting():
            start = self._start(images, now)
            if start.layer == self.depth:
                return start.x[:, 0].repeat(branches, 1), {}
            return self._pooled(self._blocks(start, now)), now.tapped

    def all_tokens(self, start: Activations) -> Tensor:
        """Every token [B, N, D] after the final norm, of a model without slots; `start` may have any number of tokens."""
        assert not self.slots, "with slots the last block may leave tokens out"
        with _timed(start), self.casting():
            return self.vit.norm(self._blocks(start, Pass())).to(self.mean.dtype)

    def mean_tokens(self, images: Tensor | Activations, tap: Collection[int]) -> dict[int, Tensor]:
        """The means of `encode` alone, [B, D] each: nothing above the last tapped layer's attention is computed."""
        return self._up_to_slot(images, Pass(tap, route=self.router)) if tap else {}

    def slot_inputs(self, images: Tensor | Activations, layers: Collection[int]) -> dict[int, Tensor]:
        """All tokens [B, N, D] that the slots of `layers` read; nothing above the last layer's attention is computed."""
        return self._up_to_slot(images, Pass(layers, route=self.router, record=lambda x: x)) if layers else {}

    def _up_to_slot(self, images: Tensor | Activations, now: Pass) -> dict[int, Tensor]:
        """What `now` recorded once the pass has reached the slot of its last tapped layer."""
        top = max(now.tap)
        with _timed(images), self.casting():
            start = self._start(images, now)
            x = self._blocks(start, now, end=top)
            _mark_block(top)
            inside = start.layer == top and start.after is not None
            if not inside and not isinstance(self._slot(top), BlockSlot):
                x = self.halves[0](cast(Block, self.vit.blocks[top]), x, families.positions(self.vit)[top])
            now.look(top, x)
        return now.tapped

    def prefix(self, images: Tensor, layer: int, inside: bool = False) -> Activations:
        """The activations [B, N, D] at the input of block `layer`, slots below it included; for `layer` = depth the features.

        `inside` goes on to where the block's slot begins: two tensors to store, and one block less in every later pass. A
        BlockSlot reads its block's input, so it takes no `inside`.
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
        x = self._blocks(Activations(0, self.stem(images)), Pass(), end=layer)
        if layer == self.depth:
            return Activations(layer, self._pooled(x).unsqueeze(1))
        if not inside:
            return Activations(layer, x)
        block, (attend, transform) = cast(Block, self.vit.blocks[layer]), self.halves
        x = attend(block, x, families.positions(self.vit)[layer])
        return Activations(layer, x, transform(block, x))

    def stem(self, images: Tensor) -> Tensor:
        """Patch and position embedding: [B, 3, H, W] -> [B, N, D], in the weights' precision."""
        images = images.to(self.mean.dtype)
        if self.normalises:
            images = (images - self.mean) / self.std
        return families.embed(self.vit, images).to(self.mean.dtype)

    def casting(self) -> AbstractContextManager[Any]:
        """What every pass runs in. Activations start in the weights' precision and stay in it: bf16 is only added to them."""
        return torch.autocast(self.mean.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def _slot(self, layer: int) -> Slot | None:
        return cast(Slot, self.slots[name]) if (name := str(layer)) in self.slots else None

    def _pooled(self, x: Tensor) -> Tensor:
        return self.vit.forward_head(self.vit.norm(x), pre_logits=True).to(self.mean.dtype)

    def _start(self, images: Tensor | Activations, now: Pass) -> Activations:
        """Where the blocks begin. ValueError if the pass asks for what lies below these activations."""
        if not isinstance(images, Activations):
            return Activations(0, self.stem(images))
        layer = images.layer
        if passed := sorted(n for n in now.tap if n < layer):
            raise ValueError(f"layers {passed} are to be tapped, which activations at layer {layer} have passed")
        if images.after is not None and isinstance(self._slot(layer), BlockSlot):
            raise ValueError(f"activations inside block {layer} cannot enter a slot that runs the block itself")
        self._refuse(layer, now.branches > 1, "branches")
        self._refuse(layer, now.route is not None, "a router")
        return images

    def _refuse(self, layer: int, asked: bool, what: str) -> None:
        """ValueError if activations at `layer` have passed the first slot, where `what` would begin."""
        if asked and (below := [int(name) for name in self.slots if int(name) < layer]):
            raise ValueError(f"{what} would begin at slot {min(below)}, which activations at layer {layer} have passed")

    def _blocks(self, start: Activations, now: Pass, end: int | None = None) -> Tensor:
        """The activations [B, N, D] at the input of block `end`; above the last block perhaps those of token 0 alone."""
        x, after, (attend, transform), positions = start.x, start.after, self.halves, families.positions(self.vit)
        for layer in range(start.layer, self.depth if end is None else end):
            _mark_block(layer)
            block, slot, position = cast(Block, self.vit.blocks[layer]), self._slot(layer), positions[layer]
            if isinstance(slot, BlockSlot):
                now.look(layer, x)
                (x,) = now.repeated(x)
                x = slot(x, now.gates(slot, x), block if position is None else Positioned(block, position))
            elif self._is_short(layer, block, slot):
                x = last_block.run(block, slot, x, after, now, attend, layer)
            elif slot is None and after is None and layer not in now.tap:
                if self.halves is HALVES:
                    x = whole(block, x, position)
                else:
                    x = transform(block, attend(block, x, position))
            else:
                x = attend(block, x, position) if after is None else x
                now.look(layer, x)
                after = transform(block, x) if after is None else after
                if slot is not None:
                    x, after = now.repeated(x, after)
                    after = after + slot(x, now.gates(slot, x))
                x = after
            after = None  # what a pass starts from inside a block belongs to that block alone
        return now.repeated(x)[0]

    def _is_short(self, layer: int, block: Block, slot: Slot | None) -> bool:
        """Whether this is the last block and token 0 is enough. Never without slots: then features are timm's bit for bit,
        and one query may round differently."""
        if not self.short_last_block or layer < self.depth - 1 or not self.slots:
            return False
        return last_block.pools_one(self.vit, block, slot)


def _timed(images: Tensor | Activations) -> AbstractContextManager[None]:
    """The time of a pass: it begins in the prefix, and `profile.block` says where that ends."""
    return stopwatch.section("prefix", 0 if isinstance(images, Activations) else images.shape[0])


def _mark_block(layer: int) -> None:
    """Tells a running profile that block `layer` begins."""
    if stopwatch.current is not None:
        stopwatch.current.block(layer)
