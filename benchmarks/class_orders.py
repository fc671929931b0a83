"""A stress test of class orders: `python -m benchmarks.class_orders exps/sema_digits.json`.

Writes an experiment file whose sweep runs an experiment with extreme and with random class orders; `main.py --config` of that
file then runs it and prints the table. In the order `similar` every class is followed by the most similar of those left, so
that a task has classes that are hard to distinguish; in `dissimilar` by the least similar one, so that classes that are hard
to distinguish are in different tasks. Similarity: cosine of the class means of the frozen backbone's features
over the training images; no test image is read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import models
from backbone import catalogue, weights
from utils import data
from utils.config import nested_lora_files, resolve
from utils.config.schema import Experiment
from utils.config.strict_json import read_json
from utils.data.tasks import TaskStream

REPLACED = ("expected", "sweep", "shuffle", "class_order", "class_order_seed")


def chain(similarity: Tensor, nearest: bool) -> list[int]:
    """A class order [C] from similarities [C, C]: starts with the most extreme pair, each class is followed by the one most
    (least) similar to it among those left. Ties go to the lower number."""
    sign = 1 if nearest else -1
    values = sign * similarity.double()
    values.fill_diagonal_(-torch.inf)
    first = int(values.max(dim=1).values.argmax())
    order = [first]
    left = set(range(len(values))) - {first}
    while left:
        order.append(max(sorted(left), key=lambda c: values[order[-1], c].item()))
        left.remove(order[-1])
    return order


@torch.no_grad()
def class_similarity(cfg: Experiment) -> Tensor:
    """Cosine [C, C] between the classes' mean frozen features, by original class number."""
    backbone, facts = weights.build(cfg)
    dataset = data.load(cfg.dataset, **data.places(cfg), test_ratio=cfg.test_ratio)
    stream = TaskStream.of(cfg, dataset, cfg.seed[0], facts.image_size)
    sums = torch.zeros(len(stream.order), backbone.width, dtype=torch.float64)
    for index in range(len(stream)):
        for images, labels, *_ in stream.task(index).train.batches(cfg.eval_batch_size, augment=False, shuffle=False):
            sums.index_add_(0, torch.tensor(stream.order)[labels], backbone(images).double())
    means = F.normalize(sums, dim=1)  # of sums as of means: length does not matter
    return means @ means.T


def arms(orders: dict[str, list[int]], random: Sequence[int]) -> list[dict[str, object]]:
    """A sweep's arms: the random orders, then `orders`."""
    sweep: list[dict[str, object]] = [{"prefix": f"random order {seed}", "class_order_seed": seed} for seed in random]
    sweep += [{"prefix": f"{name} neighbours", "class_order": order} for name, order in orders.items()]
    return sweep


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("config", type=Path, help="experiment file")
    ask.add_argument(
        "--random",
        type=int,
        nargs="*",
        default=[1, 2, 3],
        metavar="SEED",
        help="seeds of random orders to compare with",
    )
    ask.add_argument("--out", type=Path, help="file to write (default: logs/orders_<name>.json)")
    args = ask.parse_args()
    values = {k: v for k, v in read_json(args.config)[0].items() if k not in REPLACED}
    cfg = resolve.resolve(
        nested_lora_files.translate(values)[0],
        source=str(args.config),
        settings_of=models.settings_of,
        methods=models.available(),
        backbones=catalogue.names,
    ).settings
    similarity = class_similarity(cfg)
    values["sweep"] = arms({"similar": chain(similarity, True), "dissimilar": chain(similarity, False)}, args.random)
    out = args.out or Path("logs") / f"orders_{args.config.stem}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    print(f"python main.py --config {out} --jobs 2")


if __name__ == "__main__":
    main()
