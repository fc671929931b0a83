"""What growing adapters cost in inference, compared with the frozen ViT: `python -m benchmarks.overhead`.

The bare network is timm's forward pass. Ours has K adapters, mixed by SEMA's router, in each of the last layers
(backbone/experts/expandable.py). It computes the last block's MLP for the pooled token only, which saves more than the
adapters cost; so the third way computes all tokens there, and its overhead is the cost of the adapters.
"""

from __future__ import annotations

import argparse

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
    """The network with every token of the last block computed."""
    backbone.short_last_block = False
    return backbone


def compare(args: argparse.Namespace, device: torch.device) -> list[Measured]:
    vit = measure.random_vit(args.model, args.image_size).to(device)
    generator = named_generator("benchmark", "batch")
    images = torch.rand(args.batch, 3, *vit.patch_embed.img_size, generator=generator).to(device)

    def bare() -> torch.Tensor:
        with torch.inference_mode():
            return vit.forward_head(vit.forward_features(images), pre_logits=True)

    ours, whole = (grown(vit, args.layers, args.rank, args.count, device) for _ in range(2))
    ways = [
        Way("bare timm", bare),
        Way("with adapters", forward(ours, images)),
        Way("with adapters, every token of the last block", forward(every_token(whole), images)),
    ]
    return measure.compare(ways, args.rounds, device, args.clock)


def main() -> None:
    _, rows = measure.measured(__doc__ or "", compare, **measure.FOUR_ADAPTERS)
    print(measure.table({"forward": rows}) + "\n")
    for row in rows[1:]:
        share = 1 / row.faster(rows[0]) - 1
        met = "met" if share <= 0.05 else "NOT MET"
        print(f"- {row.name}: {100 * share:+.1f} % time compared with the bare network, at most 5 % required: {met}")


if __name__ == "__main__":
    main()
