"""Evaluation after the last of T tasks, from scratch against the kept prefix: `python -m benchmarks.evaluation`.

A SEMA learner with several adapters in each of its last layers scores the test images of all tasks, by
`utils.evaluation.scores.evaluate` in each way. From scratch every image passes the whole network. `cached` finds the prefix of
earlier tasks' images kept, and computes and keeps that of the newest task's, as in a run after its last task. `all kept` is
any further evaluation. Images are noise of the network's size, in memory: decoding them is not part of the comparison.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

import models
from backbone.vit import SlottedViT
from benchmarks import measure
from benchmarks.measure import Measured, Way
from benchmarks.overhead import every_token
from models.learner.base import Learner, SeededInit
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


def compare(
    model: str,
    image_size: int,
    tasks: int,
    images: int,
    layers: int,
    count: int,
    rounds: int,
    device: torch.device,
    clock: str,
) -> list[Measured]:
    vit = measure.random_vit(model, image_size).to(device)
    side = vit.patch_embed.img_size[0]
    stream = TaskStream(noise(tasks, images, side), init_cls=1, increment=1, seed=0, image_size=side)
    schema = models.settings_of("sema")
    start = len(vit.blocks) - layers

    def learner(folder: Path, place: str) -> Learner:
        values = {"model_name": "sema", "dataset": "digits", "init_cls": 1, "increment": 1, "eval_batch_size": 16}
        cfg = schema.model_validate(
            values | {"adapt_start_layer": start, "prefix_cache": place, "prefix_cache_gb": 64.0}
        )
        with RunLog(folder / place, console=False) as log:
            made = models.learner_of("sema")(cfg, SlottedViT(vit).to(device), tasks, SeededInit(0), log)
        for layer in range(start, len(vit.blocks)):
            while made.adapters_per_layer()[layer] < count:
                made._grow(layer)
        made.seen = tasks
        return made.requires_grad_(False).eval()

    def scores(made: Learner, last: int = tasks - 1) -> object:
        return evaluation.evaluate(made, stream, last, device)

    with tempfile.TemporaryDirectory() as name:
        plain, ours, full = (learner(Path(name), place) for place in ("off", "memory", "memory"))

        def before_the_last_task() -> None:
            ours._cache = None
            scores(ours, tasks - 2)

        every_token(plain.backbone)
        ways = [
            Way("from scratch", lambda: scores(plain)),
            Way("cached", lambda: scores(ours), before_the_last_task),
            Way("all kept", lambda: scores(full)),
        ]
        return measure.compare(ways, rounds, device, clock)


def main() -> None:
    sizes: dict[str, int | str] = {
        "model": "vit_small_patch16_224",
        "image_size": 224,
        "tasks": 10,
        "images": 8,
        "layers": 3,
        "count": 4,
    }
    args, found = measure.measured(__doc__ or "", compare, **sizes)
    print(measure.table({f"evaluation after task {args.tasks}": found}) + "\n")
    print(measure.verdict("cached", found[1].faster(found[0]), 4))


if __name__ == "__main__":
    main()
