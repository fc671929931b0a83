"""The last block for the one token that is pooled: attention of one query, MLP and slot for token 0 alone.

In class-token models nothing reads the other tokens above the last attention, so leaving them out changes nothing but the
rounding of smaller products. Slots say by `reads` what they need (backbone/blocks.py). A hook on a slot sees the tokens that
are computed and does not change which: an observed pass is the plain pass. A hook inside the frozen block is different: the
short cut would never call it, so such a block computes all tokens. Shapes: B batch, N tokens, D width, H heads.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.blocks import Half, Pass, Slot, mlp_half
from backbone.timm_vit import Attention, Block, VisionTransformer

# the parts of timm's Attention that `one_query` knows; a later version's new part would be left out silently
PARTS = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}


def pools_one(vit: VisionTransformer, block: Block, slot: Slot | None) -> bool:
    """Whether the last `block` with `slot` may be computed for token 0 alone, its attention's keys and values apart."""
    attention = block.attn
    return (
        isinstance(vit, VisionTransformer)  # the other families' attention is not that of `one_query`
        and vit.global_pool == "token"
        and vit.attn_pool is None
        # a distilled model pools two tokens in another method
        and type(vit).forward_head is VisionTransformer.forward_head
        and type(vit).pool is VisionTransformer.pool
        and type(attention) is Attention
        and type(attention.qkv) is nn.Linear
        and {name for name, _ in attention.named_children()} <= PARTS
        and (slot is None or slot.reads != "all")
        and not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in block.modules())
    )


def run(
    block: Block, slot: Slot | None, x: Tensor, after: Tensor | None, now: Pass, attend: Half, layer: int
) -> Tensor:
    """Token 0 [B, 1, D] of what the last `block` with its `slot` makes of x [B, N, D].

    With `after` [B, N, D], the output of the MLP half, x is the output of the attention half (see Activations)."""
    if after is None:
        x = attend(block, x, None) if now.needs_all_tokens(layer, slot) else _attention_of_token_0(block, x)
    now.look(layer, x)
    first = x[:, :1]
    after = mlp_half(block, first) if after is None else after[:, :1]  # compiled code would gain nothing on one token
    if slot is None:
        return after
    x, first, after = now.repeated(x, first, after)
    gates = now.gates(slot, x)
    if gates is not None and gates.dim() == 3:
        gates = gates[:, :1]
    return after + slot(first, gates)


def _attention_of_token_0(block: Block, x: Tensor) -> Tensor:
    """`attention_half` of token 0: x [B, N, D] -> [B, 1, D]."""
    return x[:, :1] + block.drop_path1(block.ls1(one_query(block.attn, block.norm1(x))))


def one_query(attention: nn.Module, x: Tensor) -> Tensor:
    """What `attention` gives token 0: x [B, N, D], normed, -> [B, 1, D]. timm's Attention.forward with one query."""
    layer = cast(Attention, attention)
    width = layer.qkv.out_features // 3  # H times the width of a head
    weight, bias = layer.qkv.weight, layer.qkv.bias

    def heads(rows: Tensor, part: slice) -> Tensor:  # [B, n, D] -> [B, H, n, width of a head]
        projected = F.linear(rows, weight[part], None if bias is None else bias[part])
        return projected.unflatten(-1, (-1, layer.num_heads, width // layer.num_heads)).permute(2, 0, 3, 1, 4)

    (q,) = heads(x[:, :1], slice(0, width))
    k, v = heads(x, slice(width, None))
    return attended(layer, layer.q_norm(q), layer.k_norm(k), v, x[:, :1])


def attended(attention: Attention, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """The rest of timm's Attention.forward, for normed queries q [B, H, n, D / H], keys k and values v [B, H, N, D / H].

    `x` [B, n, D]: the inputs of the queries, for a gate. Returns [B, n, D]."""
    if attention.fused_attn:
        y = F.scaled_dot_product_attention(q, k, v)  # frozen and in evaluation mode: no dropout
    else:
        y = (q * attention.scale @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    y = y.transpose(1, 2).flatten(2)
    if (norm := getattr(attention, "norm", None)) is not None:
        y = norm(y)
    if (gate := getattr(attention, "gate", None)) is not None:
        y = y * torch.sigmoid(gate(x))
    return attention.proj(y)
