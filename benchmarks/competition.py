"""K experts that compete on the same batch, the plain way and ours: `python -m benchmarks.competition`.

A way is one training step: forward, the branches' cross-entropies with a fixed random head, backward, an SGD step of the fast
experts. The plain way repeats the batch K times and runs it through the whole network, one expert for each copy; no gradient
is computed below the first expert. Ours repeats the activations where the copies begin to differ and computes the last block
for the pooled token only. `cached` starts from stored activations (backbone/prefix_cache.py), as every epoch after the first
does over images without augmentation or with `train_views`. Reading them from memory is part of its time.
"""

from __future__ import annotations

import argparse

import torch
from torch.nn import functional as F

from backbone.adapters.nested import NestedLoRAAdapter
from backbone.rowstore import RowStore
from backbone.vit import Activations, SlottedViT
from benchmarks import measure
from benchmarks.measure import Measured, Way
from benchmarks.overhead import every_token
from benchmarks.routing import CLASSES
from utils.process.seeds import named_generator


def compare(args: argparse.Namespace, device: torch.device) -> list[Measured]:
    vit = measure.random_vit(args.model, args.image_size).to(device)
    generator = named_generator("benchmark", "competition")
    images = torch.rand(args.batch, 3, *vit.patch_embed.img_size, generator=generator).to(device)
    labels = torch.randint(CLASSES, (args.batch,), generator=generator).to(device)
    head = torch.randn(vit.embed_dim, CLASSES, generator=generator).to(device) / vit.embed_dim**0.5

    def network() -> SlottedViT:
        backbone, draws = SlottedViT(vit), named_generator("benchmark", "experts")
        for layer in range(backbone.depth - args.layers, backbone.depth):
            slot = NestedLoRAAdapter(backbone.width, args.rank, args.count)
            slot.reset_parameters(draws)
            slot.use(branches=True)
            backbone.fill(layer, slot)
        backbone.slots.requires_grad_(True)
        return backbone.to(device)

    def step(backbone: SlottedViT, features):
        optimizer = torch.optim.SGD(backbone.slots.parameters(), lr=1e-3, momentum=0.9)

        def run() -> float:
            scores = (features() @ head).unflatten(0, (args.count, -1))
            loss = torch.stack([F.cross_entropy(branch, labels) for branch in scores]).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return run

    plain, ours, cached = every_token(network()), network(), network()
    first = plain.depth - args.layers
    with torch.no_grad():
        prefix = cached.prefix(images, first, inside=True)
    assert prefix.after is not None
    stored = torch.stack([prefix.x, prefix.after], dim=1)
    rows = torch.arange(args.batch).numpy()
    store = RowStore(args.batch, tuple(stored.shape[1:]), stored.dtype, device=device)
    store.put(rows, [stored])

    def from_store() -> Activations:
        return Activations(first, *store.get(rows).unbind(1))

    ways = [
        Way("K-fold batch", step(plain, lambda: plain(images.repeat(args.count, 1, 1, 1)))),
        Way("ours", step(ours, lambda: ours(images, branches=args.count))),
        Way("ours, cached", step(cached, lambda: cached(from_store(), branches=args.count))),
    ]
    return measure.compare(ways, args.rounds, device, args.clock)


def main() -> None:
    _, rows = measure.measured(__doc__ or "", compare, **measure.FOUR_ADAPTERS)
    print(measure.table({"training step": rows}) + "\n")
    for row, required in zip(rows[1:], (1.9, 4), strict=True):
        print(measure.verdict(row.name, row.faster(rows[0]), required))


if __name__ == "__main__":
    main()
