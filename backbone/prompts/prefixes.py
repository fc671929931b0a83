"""Prompts for a frozen ViT: pools whose keys select them by an image's query, and prefixes for a block's attention.

A prefix is put before a block's keys and values after the qkv projection, per head; it has no queries, so the tokens stay
as they are (prefix tuning, Li and Liang 2021, as DualPrompt and CODA-Prompt use it). timm's modules are not touched.
Shapes: B batch, N tokens, D width, L length of a prompt, S prompts of a pool, K chosen of them, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.nn import functional as F

from backbone import last_block
from backbone.blocks import BlockSlot
from backbone.vit import Activations, SlottedViT


@dataclass(frozen=True)
class Queried:
    """Images [B, 3, H, W], or Activations of them, whose queries [B, D] are known already."""

    images: Tensor | Activations
    query: Tensor

    def __len__(self) -> int:
        return len(self.query)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Queried:
        """The same on a device, as Tensor.to."""
        images = self.images.to(device, non_blocking=non_blocking)
        return replace(self, images=images, query=self.query.to(device, non_blocking=non_blocking))


class PrefixTuning(BlockSlot):
    """A block whose attention also reads a prefix [B, 2, L, D] of keys (0) and values (1). It has no parameters: the caller
    passes the prefix as the slot's gates, by a `route`."""

    def forward(self, x: Tensor, prefix: Tensor | None, block: Block) -> Tensor:
        """What the block makes of x [B, N, D]; without a prefix what timm's does."""
        if prefix is None:
            return block(x)
        attended = attend(cast(Attention, block.attn), block.norm1(x), prefix)
        x = x + block.drop_path1(block.ls1(attended))
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def attend(attention: Attention, x: Tensor, prefix: Tensor) -> Tensor:
    """timm's Attention.forward of x [B, N, D], normed, with a prefix [B, 2, L, D] before its keys and values -> [B, N, D].

    The prefix is not projected, nor normalised where the model normalises keys: it stands for what would come out of that."""
    heads, width = attention.num_heads, attention.qkv.out_features // 3
    q, k, v = attention.qkv(x).unflatten(-1, (3, heads, width // heads)).permute(2, 0, 3, 1, 4)
    keys, values = (
        prefix.unflatten(-1, (heads, width // heads)).permute(1, 0, 3, 2, 4).to(v.dtype)
    )  # [2, B, H, L, D / H]
    q, k = attention.q_norm(q), torch.cat([keys, attention.k_norm(k).to(v.dtype)], dim=2)
    return last_block.attended(attention, q, k, torch.cat([values, v], dim=2), x)


def fill(backbone: SlottedViT, layers: Sequence[int], key: str) -> None:
    """Puts PrefixTuning into these layers, which the setting `key` names. Raises ValueError if the backbone lacks one, or its
    attention is none that takes a prefix of its width."""
    for layer in layers:
        if layer >= backbone.depth:
            raise ValueError(
                f"{key}: layer {layer} does not exist, the backbone has layers 0..{backbone.depth - 1}; "
                f"got {list(layers)}"
            )
        attention: Any = cast(Block, backbone.vit.blocks[layer]).attn
        if (
            type(attention) is not Attention
            or type(attention.qkv) is not nn.Linear
            or attention.qkv.out_features != 3 * backbone.width
            or not {name for name, _ in attention.named_children()} <= last_block.PARTS
        ):
            raise ValueError(
                f"{key}: the attention of layer {layer}, {type(attention).__name__}, takes no prefix: it is no plain attention "
                f"whose queries, keys and values come from one linear layer `qkv`"
            )
        backbone.fill(layer, PrefixTuning())


class Prompts(nn.Module):
    """Learnable `values` of any shape, uniform in [-1, 1] at the start as in LAMDA-PILOT."""

    def __init__(self, *shape: int):
        super().__init__()
        self.values = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.uniform_(self.values, -1, 1, generator=generator)


class PromptPool(nn.Module):
    """S prompts of one shape and a key for each, by which a query finds them (Wang et al. 2022, section 4.2).

    `prompts` [S, *shape], `keys` [S, D]; both start uniform in [-1, 1]. Only `pull` gives the keys a gradient."""

    def __init__(self, size: int, shape: Sequence[int], width: int):
        super().__init__()
        self.prompts = nn.Parameter(torch.empty(size, *shape))
        self.keys = nn.Parameter(torch.empty(size, width))
        self.reset_parameters()

    def __len__(self) -> int:
        return len(self.keys)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        for parameter in (self.prompts, self.keys):
            nn.init.uniform_(parameter, -1, 1, generator=generator)

    def similarity(self, query: Tensor) -> Tensor:
        """Cosine [B, S] between queries [B, D] and keys; a length below 1e-6 counts as 1e-6, as in LAMDA-PILOT."""
        unit = [F.normalize(x, dim=1, eps=1e-6) for x in (query, self.keys)]
        return F.linear(*unit)

    def forward(self, ids: Tensor) -> Tensor:
        """The prompts with numbers ids [B, K] -> [B, K, *shape]. As a product, whose gradient no GPU sums at random."""
        chosen = F.one_hot(ids, len(self)).to(self.prompts.dtype) @ self.prompts.flatten(1)
        return chosen.unflatten(-1, self.prompts.shape[1:])


def choose(similarity: Tensor, count: int, batchwise: bool = False) -> Tensor:
    """Numbers [B, count] of each sample's most similar keys, from similarity [B, S]; of equals the lower number.

    `batchwise`: the `count` numbers that most of the batch's samples have among theirs, for all of them (LAMDA-PILOT's
    `batchwise_prompt`): what a sample gets then depends on the batch it is in."""
    ids = similarity.sort(dim=1, descending=True, stable=True).indices[:, :count]
    if not batchwise:
        return ids
    votes = F.one_hot(ids, similarity.shape[1]).sum(dim=(0, 1))
    return votes.sort(descending=True, stable=True).indices[:count].expand(ids.shape[0], count)


def pull(similarity: Tensor, ids: Tensor) -> Tensor:
    """Sum over the chosen keys of their similarity to the query, mean over the batch: [B, S], [B, K] -> scalar.

    L2P, equation 5, as LAMDA-PILOT scales it (by the batch, not by K)."""
    return similarity.gather(1, ids).sum() / ids.shape[0]


def scrambled(prefix: Tensor) -> Tensor:
    """LAMDA-PILOT's layout of DualPrompt's E-prompts: of the 2B items, all keys [B, L, D] and then all values, sample b gets
    items 2b and 2b + 1. It comes from a reshape that mixes up the axes 2 and B; prefix [B, 2, L, D]."""
    return prefix.transpose(0, 1).reshape(prefix.shape)
