"""From a pre-training checkpoint to the embedded weights: residual stream rescaled to unit size, fp16, facts beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from backbone.vit import SlottedViT
from utils.data.views import Views, ViewSource

MEAN = STD = (0.5, 0.5, 0.5)  # images enter in [-1, 1]
# Whatever adds to the residual stream of a pre-norm ViT; everything else reads it, through a LayerNorm.
STREAM_WRITERS = ("patch_embed.proj.", "pos_embed", "cls_token", "reg_token", ".attn.proj.", ".mlp.fc2.")


def to_input(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 in [-1, 1], as MEAN and STD say."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def stream_scale(weights: dict[str, Tensor], architecture: dict[str, Any], images: Tensor) -> float:
    """Root mean square of the mean token [B, D] that an adapter in the second-to-last block reads, over uint8 images."""
    vit = VisionTransformer(**architecture)
    vit.load_state_dict(weights)
    model = SlottedViT(vit, MEAN, STD)
    layer = max(model.depth - 2, 0)
    means = [model.mean_tokens(part.float() / 255, [layer])[layer] for part in images.split(256)]
    return float(torch.cat(means).square().mean().sqrt())


def rescale_stream(weights: dict[str, Tensor], architecture: dict[str, Any], images: Tensor) -> dict[str, Tensor]:
    """The same function with a residual stream of unit size: `stream_scale` of the result is 1.

    Every reader of the stream normalises it first, so one constant on all its writers changes nothing (but LayerNorm's
    eps of 1e-6). In this small model the stream's mean square grows to several hundred; our adapters and descriptors
    read it raw, and the learning rates published for ViT-B, whose stream is of unit order there, would diverge.
    """
    factor = 1 / stream_scale(weights, architecture, images)
    return {n: v * factor if any(part in n for part in STREAM_WRITERS) else v for n, v in weights.items()}


def export(state: dict[str, Any], path: Path, images: Tensor | None = None) -> None:
    """Write the averaged weights of a run's `state` without the class head, stream rescaled, as fp16 safetensors.

    `images` uint8 [B, 3, H, W] set the stream's size: by default 2,048 views at full strength that were never trained
    on. Metadata are strings (JSON inside), as safetensors demands.
    """
    settings = json.loads(state["settings"])
    if images is None:
        images = torch.from_numpy(ViewSource(Views(), 2048).batch(2**31)[0])  # a number no run reaches
    weights = {n: v.float() for n, v in state["average"].items() if not n.startswith("head.")}
    weights = rescale_stream(weights, settings["architecture"], images)
    views = state["step"] * settings["batch_size"]
    metadata = {
        "architecture": json.dumps(settings["architecture"]),
        "mean": json.dumps(MEAN),
        "std": json.dumps(STD),
        "about": f"python -m backbone.pretrain: {views:,} views of formula-made signs and fractals, "
        f"{state['seconds'] / 60:.0f} minutes of training; residual stream rescaled to unit size",
        "settings": state["settings"],
        "views": str(views),
        "training_seconds": f"{state['seconds']:.0f}",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file({n: v.half().contiguous() for n, v in weights.items()}, partial, metadata)
    partial.replace(path)
