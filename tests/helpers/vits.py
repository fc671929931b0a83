"""Small ViTs of every kind that the backbone takes, and the plain pass through them, slow and in timm's own words."""

import timm
import torch
from torch import Tensor, nn

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
# models whose attention reads positions beside the tokens, or that are of another family of timm's
OTHER_KINDS = {
    "EVA: biases apart": "eva_giant_patch14_224",
    "EVA-02: rotary, norm in the MLP": "eva02_base_patch14_224",
    "EVA-02: class token, packed SwiGLU": "eva02_tiny_patch14_224",
    "DINOv3: rotary, registers": "vit_small_patch16_dinov3",
    "DINOv3: SwiGLU, biases": "vit_small_plus_patch16_dinov3_qkvb",
    "rotary": "vit_small_patch16_rope_224",
    "angles of each block": "vit_small_patch16_rope_mixed_ape_224",
    "rotary, attention pooling, norm before the blocks": "vit_pe_core_tiny_patch16_384",
    "rotary, one register": "vit_medium_patch16_rope_reg1_gap_256",
    "BEiT: bias by relative position": "beit_base_patch16_224",
    "BEiT v2": "beitv2_base_patch16_224",
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


def plain_pass(vit: nn.Module, images: Tensor, beside_mlp=lambda layer, x: 0) -> Tensor:
    """Pooled features [B, D] by the rule of our slots: what `beside_mlp(layer, x)` makes of a block's activations x [B, N, D]
    after attention is added to the output of its MLP. The text follows the `forward` of timm's models."""
    x, bias, by_block = vit.patch_embed(images), None, False
    if type(vit).__name__ == "Beit":
        x = torch.cat((vit.cls_token.expand(len(x), -1, -1), x), dim=1)
        x = x if vit.pos_embed is None else x + vit.pos_embed
        bias = None if vit.rel_pos_bias is None else vit.rel_pos_bias()
    elif type(vit).__name__ == "Eva":
        x, bias = vit._pos_embed(x)
        x, by_block = vit.norm_pre(x), vit.rope_mixed
    else:
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(x)))
    for layer, block in enumerate(vit.blocks):
        if hasattr(block, "ls1"):
            x = x + block.ls1(block.attn(block.norm1(x)))
            x = x + block.ls2(block.mlp(block.norm2(x))) + beside_mlp(layer, x)
        else:
            attended = block.attn(block.norm1(x), bias[layer] if by_block else bias)
            x = x + (1 if block.gamma_1 is None else block.gamma_1) * attended
            x = x + (1 if block.gamma_2 is None else block.gamma_2) * block.mlp(block.norm2(x)) + beside_mlp(layer, x)
    return vit.forward_head(vit.norm(x), pre_logits=True)
