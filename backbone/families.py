"""timm's families of ViTs: how each gets from images to its blocks, what position its blocks read, and which have a slot.

Three families have blocks of which a slot can be part: VisionTransformer (also DeiT), Eva (EVA-02, DINOv3, ViTs with rotary
positions) and Beit. In Eva and Beit a block's attention may read a position beside the tokens: the angles that rotate queries
and keys, or a bias of the attention's scores by relative position. It depends on the model alone, not on the images, so a pass
that starts above the stem computes it too. Shapes: B batch, N tokens, D width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from backbone.timm_vit import Block, VisionTransformer, checkpoint_filter_fn

# (timm's module, the model's class, its block's class). The modules are imported only where their models are, since
# `timm.create_model` has then imported them anyway (backbone/timm_vit.py).
OTHERS = (("eva", "Eva", "EvaBlock"), ("beit", "Beit", "Block"))
AFTER = "normalises after its attention and its MLP, and a slot stands beside an MLP whose input is normalised"
TOGETHER = "computes attention and MLP from the same input, so there is no place between attention and MLP for a slot"
WITHOUT_PLACE = {
    "ResPostBlock": AFTER,
    "EvaBlockPostNorm": AFTER,
    "ParallelScalingBlock": TOGETHER,
    "DiffParallelScalingBlock": TOGETHER,
    "ParallelThingsBlock": TOGETHER,
}


def refuse_unfit(vit: nn.Module) -> None:
    """ValueError that says which property `vit` lacks to take slots."""
    name = type(vit).__name__
    expected = _block_class(vit)
    if expected is None:
        raise ValueError(
            f"backbone {name} is not a timm VisionTransformer, Eva or Beit: it has no sequence of tokens that passes through "
            f"blocks of attention and MLP; choose a vit_*, deit*, eva* or beit* model"
        )
    for block in model(vit).blocks:
        if type(block) is not expected:
            kind = type(block).__name__
            why = WITHOUT_PLACE.get(kind, "is of no kind that is known to have a place between attention and MLP")
            raise ValueError(
                f"backbone {name} has blocks of type {kind}, which {why}; choose a model of other blocks, such as "
                f"vit_base_patch16_224"
            )


def model(vit: nn.Module) -> Any:
    """`vit` for reading the parts that all three families have under the same names."""
    return vit


def embed(vit: nn.Module, images: Tensor) -> Tensor:
    """What the first block reads: images [B, 3, H, W], normalised, -> [B, N, D]."""
    if isinstance(vit, VisionTransformer):
        return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
    other = model(vit)
    x = other.patch_embed(images)
    if _is(vit, "eva"):
        return other.norm_pre(other._pos_embed(x)[0])
    x = torch.cat((other.cls_token.expand(len(x), -1, -1), x), dim=1)
    return other.pos_drop(x if other.pos_embed is None else x + other.pos_embed)


def positions(vit: nn.Module) -> list[Tensor | None]:
    """For each block what its attention reads beside the tokens, None where positions are part of the tokens alone."""
    other = model(vit)
    depth, position = len(other.blocks), None
    if _is(vit, "eva") and other.rope is not None:
        rope = other.rope
        fixed = hasattr(rope, "feat_shape") and not other.dynamic_img_size
        position = rope.get_embed() if fixed else rope.get_embed(shape=other.patch_embed.grid_size)
        if other.rope_mixed:  # learnt angles of each block: [all blocks, H, N, ..]
            return list(position[:depth])
    elif _is(vit, "beit") and other.rel_pos_bias is not None:
        position = other.rel_pos_bias()
    return [position] * depth


def takes_more_tokens(vit: nn.Module) -> bool:
    """Whether the blocks take any number of tokens: no attention has a position for each of the model's."""
    relative = any(getattr(block.attn, "relative_position_bias_table", None) is not None for block in model(vit).blocks)
    return not relative and getattr(vit, "rope", None) is None and getattr(vit, "rel_pos_bias", None) is None


def without_start_values(name: str) -> dict[str, Any]:
    """The argument of timm's model `name` that leaves out drawing start values: for a model on the meta device that takes most
    of the time, though nothing is filled. The other families have no such argument."""
    from timm.models import is_model_in_modules

    plain = is_model_in_modules(name.partition(".")[0], ("vision_transformer", "deit"))
    return {"weight_init": "skip"} if plain else {}


def conversion(vit: nn.Module) -> Callable[..., dict[str, Tensor]]:
    """timm's function (state, vit) -> state that resamples positions to the model's image size."""
    for module, _, _ in OTHERS:
        if _is(vit, module):
            function: Callable[..., dict[str, Tensor]] = sys.modules[f"timm.models.{module}"].checkpoint_filter_fn
            return function
    return checkpoint_filter_fn


def _is(vit: nn.Module, module: str) -> bool:
    name = next(model for file, model, _ in OTHERS if file == module)
    loaded = sys.modules.get(f"timm.models.{module}")
    return loaded is not None and isinstance(vit, getattr(loaded, name))


def _block_class(vit: nn.Module) -> type[nn.Module] | None:
    """The block that has a place for a slot in the family of `vit`; None for other models."""
    if isinstance(vit, VisionTransformer):
        return Block
    for module, _, block in OTHERS:
        if _is(vit, module):
            kind: type[nn.Module] = getattr(sys.modules[f"timm.models.{module}"], block)
            return kind
    return None
