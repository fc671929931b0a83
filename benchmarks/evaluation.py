"""Evaluation after the last of T tasks, from scratch and with the prefix cache: `python -m benchmarks.evaluation`.

A SEMA learner with several adapters in each of its last layers scores the test images of all tasks, by
`utils.evaluation.scores.evaluate` in each way. From scratch every image passes the whole network. `cached` reads the stored
activations of earlier tasks' images, and computes and stores those of the newest task, as a run does after its last task.
`all kept` is any further evaluation. Images are noise of the network's size, in memory, so nothing is decoded.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import models
from backbone.vit import SlottedViT
from benchmarks import measure
from benchmarks.measure import Measured, Way
from benchmarks.overhead import every_token
from models.learner.base import Learner
from utils.data.dataset import Dataset
from utils.data.images import ImageArray
from utils.data.tasks import TaskStream
from utils.evaluation import scores as evaluation
from utils.run.log import RunLog


def noise(classes: int, images: int, side: int) -> Dataset:
    """`images` test images a class and one to train on."""
    rng = np.random.default_rng(0)

    def draw(count: int) -> ImageArray:
        labels = np.repeat(np.arange(classes), count)
        return ImageArray(rng.integers(0, 256, (len(labels), 3, side, side), dtype=np.uint8), labels)

    return Dataset("noise", [str(c) for c in range(classes)], draw(1), draw(images), "small")


def compare(args: argparse.Namespace, device: torch.device) -> list[Measured]:
    vit = measure.random_vit(args.model, args.image_size).to(device)
    side, tasks = vit.patch_embed.img_size[0], args.tasks
    stream = TaskStream(noise(tasks, args.images, side), init_cls=1, increment=1, seed=0, image_size=side)
    schema = models.settings_of("sema")
    start = len(vit.blocks) - args.layers

    def learner(folder: Path, storage: str) -> Learner:
        values = {"model_name": "sema", "dataset": "digits", "init_cls": 1, "increment": 1, "eval_batch_size": 16}
        cfg = schema.model_validate(
            values | {"adapt_start_layer": start, "prefix_cache": storage, "prefix_cache_gb": 64.0}
        )
        with RunLog(folder / storage, console=False) as log:
            model: Any = models.build(cfg, SlottedViT(vit).to(device), tasks, 0, log)
        for layer in range(start, len(vit.blocks)):
            while model.adapters_per_layer()[layer] < args.count:
                model._grow(layer)
        model.seen = tasks
        return model.requires_grad_(False).eval()

    def scores(model: Learner, last: int = tasks - 1) -> object:
        return evaluation.evaluate(model, stream, last, device)

    with tempfile.TemporaryDirectory() as name:
        plain, ours, full = (learner(Path(name), storage) for storage in ("off", "memory", "memory"))

        def before_the_last_task() -> None:
            ours._cache = None
            scores(ours, tasks - 2)

        every_token(plain.backbone)
        ways = [
            Way("from scratch", lambda: scores(plain)),
            Way("cached", lambda: scores(ours), before_the_last_task),
            Way("all kept", lambda: scores(full)),
        ]
        return measure.compare(ways, args.rounds, device, args.clock)


def main() -> None:
    sizes: dict[str, int | str] = {
        "model": "vit_small_patch16_224",
        "image_size": 224,
        "tasks": 10,
        "images": 8,
        "layers": 3,
        "count": 4,
    }
    args, rows = measure.measured(__doc__ or "", compare, **sizes)
    print(measure.table({f"evaluation after task {args.tasks}": rows}) + "\n")
    print(measure.verdict("cached", rows[1].faster(rows[0]), 4))


if __name__ == "__main__":
    main()
