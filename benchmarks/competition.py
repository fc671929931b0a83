"""K experts that compete on the same batch: K-fold through the whole network against ours: `python -m benchmarks.competition`.

One training step each: forward, the branches' cross-entropies with a fixed random head, backward, an SGD step of the fast
experts. The plain way repeats the batch K times and runs it through the network once, each copy with its own expert (timm
computes no gradient below the first expert, here too). Ours repeats the stream where the copies begin to differ and computes
the last block for the pooled token; `cached` starts from the kept prefix (backbone/prefix_cache.py), as every epoch after the
first over un-augmented images or `train_views` does. Time to read the kept prefix from a store in memory is counted in.
"""

from __future__ import annotations

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
    generator = named_generator("benchmark", "competition")
    images = torch.rand(batch, 3, *vit.patch_embed.img_size, generator=generator).to(device)
    labels = torch.randint(CLASSES, (batch,), generator=generator).to(device)
    head = torch.randn(vit.embed_dim, CLASSES, generator=generator).to(device) / vit.embed_dim**0.5

    def network() -> SlottedViT:
        backbone, draws = SlottedViT(vit), named_generator("benchmark", "experts")
        for layer in range(backbone.depth - layers, backbone.depth):
            slot = NestedLoRAAdapter(backbone.width, rank, count)
            slot.reset_parameters(draws)
            slot.use(branches=True)
            backbone.fill(layer, slot)
        backbone.slots.requires_grad_(True)
        return backbone.to(device)

    def step(backbone: SlottedViT, features):
        optimizer = torch.optim.SGD(backbone.slots.parameters(), lr=1e-3, momentum=0.9)

        def run() -> float:
            scores = (features() @ head).unflatten(0, (count, -1))
            loss = torch.stack([F.cross_entropy(own, labels) for own in scores]).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return run

    plain, ours, cached = every_token(network()), network(), network()
    first = plain.depth - layers
    with torch.no_grad():
        made = cached.prefix(images, first, inside=True)
    assert made.after is not None
    kept = torch.stack([made.x, made.after], dim=1)
    rows = torch.arange(batch).numpy()
    store = RowStore(batch, tuple(kept.shape[1:]), kept.dtype, device=device)
    store.put(rows, [kept])
    ways = [
        Way("K-fold batch", step(plain, lambda: plain(images.repeat(count, 1, 1, 1)))),
        Way("ours", step(ours, lambda: ours(images, branches=count))),
        Way(
            "ours, cached", step(cached, lambda: cached(Activations(first, *store.get(rows).unbind(1)), branches=count))
        ),
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
    print(measure.table({"training step": found}) + "\n")
    for row, required in zip(found[1:], (1.9, 4), strict=True):
        print(measure.verdict(row.name, row.faster(found[0]), required))


if __name__ == "__main__":
    main()
