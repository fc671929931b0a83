"""How a backbone computes: in which precision. Set before a learner is built over it; passes only read it.

bf16 is torch's autocast inside every pass of the backbone, hence alike in training, detection, evaluation and in what the
prefix cache keeps. Its matrix products alone are bf16: weights, optimizer, the stream between the blocks, norms and the
pooled features stay in the weights' precision, and routers, heads, descriptors, losses and class statistics never see bf16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from backbone.vit import SlottedViT
from utils.config import Precision


def prepare(backbone: SlottedViT, precision: Precision, say: Callable[[str], None]) -> None:
    """Makes `backbone`, which is on its device, compute as asked; `say` is told what does not act there."""
    device = backbone.mean.device
    backbone.precision = precision
    if device.type == "cuda":
        # process-wide, since the backward pass takes it too. cuDNN's own default is TF32 for the patch embedding: fp32 is fp32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    elif precision == "tf32" and device.type != "meta":
        say(f"precision tf32 acts on CUDA GPUs alone: on {device.type} the run is in fp32")
