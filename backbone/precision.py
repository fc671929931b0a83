"""How a backbone computes: in which precision, and whether compiled. Set once, before a learner is built over it.

bf16 is torch's autocast inside every pass of the backbone, hence alike in training, detection, evaluation and in what the
prefix cache keeps. Only its matrix products are bf16: weights, optimizer, the activations between the blocks, norms and the
pooled features stay in the weights' precision, and routers, heads, descriptors, losses and class statistics never see bf16.

Compiled are the two halves of a frozen block, as functions of (block, x), not the whole pass: slots stay outside, so that
they grow, route and carry hooks as they like and nothing is ever compiled again for it. All blocks share one compiled
code. Its batch size is open from the start: else the first batch would get special code, and a resumed run, whose first
batch is another one, would round differently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch

from backbone import families
from backbone.blocks import HALVES, Half
from backbone.timm_vit import Block
from backbone.vit import SlottedViT
from utils.config.schema import Precision


def prepare(
    backbone: SlottedViT, precision: Precision = "fp32", compiled: bool = False, say: Callable[[str], None] = print
) -> None:
    """Sets how `backbone` computes on the device it is on; `say` is called with each setting that has no effect there."""
    device = backbone.mean.device
    backbone.precision, backbone.halves = precision, HALVES
    if device.type == "meta":  # shapes without values
        return
    if device.type == "cuda":
        # process-wide, since the backward pass takes it too. cuDNN's default is TF32 for the patch embedding: fp32 is fp32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    elif precision == "tf32":
        say(f"precision tf32 has no effect on {device.type}, only on CUDA GPUs: the run is in fp32")
    if not compiled:
        return
    try:
        backbone.halves = _compiled(backbone)
    # torch wraps whatever its compilers raise in a RuntimeError; a missing compiler or toolchain is one, or an OSError
    except (RuntimeError, OSError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        say(f"compile: torch.compile does not work on this machine ({reason}): the run goes on uncompiled")


@torch.no_grad()
def _compiled(backbone: SlottedViT) -> tuple[Half, Half]:
    """The compiled halves, tried on the backbone's first block: torch compiles at the first call only."""
    attend, transform = (torch.compile(half, dynamic=True) for half in HALVES)
    block, x = cast(Block, backbone.vit.blocks[0]), backbone.mean.new_zeros(2, backbone.tokens, backbone.width)
    with backbone.casting():
        transform(block, attend(block, x, families.positions(backbone.vit)[0]))
    return attend, transform
