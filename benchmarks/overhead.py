"""What growing adapters cost beside the frozen ViT: `python -m benchmarks.overhead`.

The bare network is timm's own forward pass. Ours has K adapters, mixed by SEMA's router, in each of the last layers
(backbone/experts/expandable.py). It computes the last block's MLP for the pooled token alone, which saves more than
the adapters cost;
so the third way computes all tokens there, and its overhead is that of the adapters themselves. Inference.
"""

from __future__ import annotations

import torch
from torch import nn

from backbone.adapters.adapter import Adapter
from backbone.experts.expandable import ExpandableLayer
from backbone.experts.router import RouterColumn
from backbone.vit import SlottedViT
from benchmarks import measure
from benchmarks.measure import Measured, Way
from benchmarks.routing import forward
from utils.process.seeds import named_generator


def grown(vit: nn.Module, layers: int, rank: int, count: int, device: torch.device) -> SlottedViT:
    """The ViT, shared and not copied, with `count` mixed adapters in each of its last `layers`."""
    backbone, generator = SlottedViT(vit), named_generator("benchmark", "overhead")
    for layer in range(backbone.depth - layers, backbone.depth):
        slot = ExpandableLayer()
        for _ in range(count):
            adapter, column = Adapter(backbone.width, rank), RouterColumn(backbone.width)
            adapter.reset_parameters(generator)
            nn.init.normal_(adapter.up_proj.weight, std=0.02, generator=generator)
            column.reset_parameters(generator)
            slot.adapters.append(adapter)
            slot.router.columns.append(column)
        backbone.fill(layer, slot)
    return backbone.to(device)


def every_token(backbone: SlottedViT) -> SlottedViT:
    """The same, with every token of the last block."""
    backbone.short_last_block = False
    return backbone


def compare(
    model: str,
    image_size: int,
    batch: int,
    layers: int,
    rank: int,
    count: int,
    rounds: int,
    device: torch.device,
    clock: str,
) -> list[Measured]:
    vit = measure.random_vit(model, image_size).to(device)
    images = torch.rand(batch, 3, *vit.patch_embed.img_size, generator=named_generator("benchmark", "batch")).to(device)

    def bare() -> torch.Tensor:
        with torch.inference_mode():
            return vit.forward_head(vit.forward_features(images), pre_logits=True)

    ours, whole = (grown(vit, layers, rank, count, device) for _ in range(2))
    ways = [
        Way("bare timm", bare),
        Way("with adapters", forward(ours, images)),
        Way("with adapters, every token of the last block", forward(every_token(whole), images)),
    ]
    return measure.compare(ways, rounds, device, clock)


def main() -> None:
    sizes: dict[str, int | str] = {
        "model": "vit_base_patch16_224",
        "image_size": 224,
        "batch": 4,
        "layers": 3,
        "rank": 16,
        "count": 4,
    }
    _, found = measure.measured(__doc__ or "", compare, **sizes)
    print(measure.table({"forward": found}) + "\n")
    for row in found[1:]:
        share = 1 / row.faster(found[0]) - 1
        met = "met" if share <= 0.05 else "NOT MET"
        print(f"- {row.name}: {100 * share:+.1f} % time over the bare network, at most 5 % required: {met}")


if __name__ == "__main__":
    main()
