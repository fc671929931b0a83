"""The last block for the one token that is pooled: attention of one query, MLP and slot for it alone.

In class-token models nothing reads the other tokens above the last attention, so leaving them out changes nothing but the
rounding of smaller products. A slot takes part by an attribute `reads_all`:
- False: what it adds to a token depends on that token, and on the gates it is given, alone;
- True: its gates, which `gates_of(x)` gives, depend on all tokens; given those, as above.
Slots without it get all tokens, as does whatever has a hook: it may read them. Shapes: B batch, N tokens, D width, H heads.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.timm_vit import Attention, Block, VisionTransformer

# the parts of timm's Attention that `one_query` knows; another version's new part would be left out silently
PARTS = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}


def pools_one(vit: VisionTransformer, block: Block, slot: nn.Module | None) -> bool:
    """Whether the last `block` with `slot` may be computed for token 0 alone, its attention's keys and values apart."""
    attention = block.attn
    return (
        vit.global_pool == "token"
        and vit.attn_pool is None
        # a distilled model pools two tokens in a method of its own
        and type(vit).forward_head is VisionTransformer.forward_head
        and type(vit).pool is VisionTransformer.pool
        and type(attention) is Attention
        and type(attention.qkv) is nn.Linear
        and {name for name, _ in attention.named_children()} <= PARTS
        and (slot is None or hasattr(slot, "reads_all"))
        and not any(_watched(module) for module in (block, slot))
    )


def reads_all(slot: nn.Module | None) -> bool:
    """Whether a slot that takes part needs every token after attention."""
    return slot is not None and bool(cast(Any, slot).reads_all)


def one_query(attention: nn.Module, x: Tensor) -> Tensor:
    """What `attention` gives token 0: x [B, N, D], normed, -> [B, 1, D]. timm's Attention.forward with one query."""
    own = cast(Attention, attention)
    width = own.qkv.out_features // 3  # H times the width of a head
    weight, bias = own.qkv.weight, own.qkv.bias

    def heads(rows: Tensor, part: slice) -> Tensor:  # [B, n, D] -> [B, H, n, width of a head]
        made = F.linear(rows, weight[part], None if bias is None else bias[part])
        return made.unflatten(-1, (-1, own.num_heads, width // own.num_heads)).permute(2, 0, 3, 1, 4)

    (q,) = heads(x[:, :1], slice(0, width))
    k, v = heads(x, slice(width, None))
    q, k = own.q_norm(q), own.k_norm(k)
    if own.fused_attn:
        y = F.scaled_dot_product_attention(q, k, v)  # frozen and in evaluation mode: no dropout
    else:
        y = (q * own.scale @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    y = y.transpose(1, 2).flatten(2)
    if (norm := getattr(own, "norm", None)) is not None:
        y = norm(y)
    if (gate := getattr(own, "gate", None)) is not None:
        y = y * torch.sigmoid(gate(x[:, :1]))
    return own.proj(y)


def gates_for_one(slot: nn.Module | None, x: Tensor, gates: Tensor | None) -> Tensor | None:
    """The gates of token 0, [B, E] or [B, 1, E]: of those given, else of what the slot makes of all tokens x [B, N, D]."""
    if gates is None and reads_all(slot):
        gates = cast(Any, slot).gates_of(x)
    return gates[:, :1] if gates is not None and gates.dim() == 3 else gates


def _watched(module: nn.Module | None) -> bool:
    parts = () if module is None else module.modules()
    return any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks for part in parts)
