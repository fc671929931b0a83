"""Small ViTs of every kind that the backbone takes."""

import timm
import torch
from torch import nn

SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 32, "num_classes": 0, "pretrained": False}
KINDS = {
    "class token": "vit_tiny_patch16_224",
    "average pooling": "vit_medium_patch16_gap_240",
    "LayerScale, class token without position": "deit3_small_patch16_224",
    "register tokens": "vit_small_patch14_reg4_dinov2",
    "distillation token": "deit_tiny_distilled_patch16_224",
    "norm before the blocks": "vit_base_patch16_clip_224",
    "attention pooling": "vit_base_patch16_siglip_224",
}


def small(name: str, seed: int = 0) -> nn.Module:
    """A random model of that kind with every parameter away from its start value, so that no term hides behind a zero."""
    torch.manual_seed(seed)
    extra = {"img_size": 28} if "patch14" in name else {}
    vit = timm.create_model(name, **{**SMALL, **extra})
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vit.eval()
