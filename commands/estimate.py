"""What a run will take, from one training step and one pass that are measured here: a part of `--check all`.

The method is built over random weights of the real shapes and learns from noise, so nothing is read, written or disturbed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.config import common_names
from utils.config.schema import Experiment
from utils.config.split import Split
from utils.text import clock, counted

if TYPE_CHECKING:
    import torch

    from utils.data.dataset import Dataset

STEPS = 3  # measured steps; the first one warms up and is not timed


@dataclass(frozen=True)
class Measured:
    """Seconds of a training step of `batch` images (None if the method takes none), seconds and images of a pass without
    gradients, and the most memory of this process (a GPU's: of its tensors), bytes."""

    step: float | None
    batch: int
    seconds: float
    images: int
    memory: int


class _Enough(Exception):
    """Ends the training that is measured."""


def measure(cfg: Experiment, sizes: Sequence[int], device: torch.device) -> Measured:
    """Takes STEPS steps of the first phase of the first task, then a pass over a batch of `eval_batch_size` images."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    import models
    from backbone import weights
    from utils.data.tasks import TaskStream
    from utils.process.machine import peak_memory
    from utils.run.log import RunLog

    backbone, facts = weights.build(cfg.model_copy(update={"backbone_weights": "random"}))
    stream = TaskStream(_noise(sizes, cfg.batch_size, facts.image_size), init_cls=sizes[0], increment=list(sizes[1:]),
                        seed=0, image_size=facts.image_size, shuffle=False, device=device)  # fmt: skip
    ends: list[float] = []

    def after_step(*_: Any) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ends.append(time.perf_counter())
        if len(ends) == STEPS:
            raise _Enough

    hook = register_optimizer_step_post_hook(after_step)
    with tempfile.TemporaryDirectory() as folder, RunLog(Path(folder) / "run", console=False) as log:
        learner = models.build(cfg, backbone.to(device), sum(sizes), 0, log)
        learner.begin_task()
        try:
            learner.learn(stream.task(0))
        except _Enough:
            pass
        finally:
            hook.remove()
        learner.eval()
        images = torch.rand(cfg.eval_batch_size, 3, facts.image_size, facts.image_size, device=device)
        with torch.inference_mode():
            start = time.perf_counter()
            learner.backbone.vit.forward_features(images)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - start
    step = (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else None
    return Measured(step, cfg.batch_size, seconds, len(images), peak_memory(device))


def _noise(sizes: Sequence[int], batch: int, side: int) -> Dataset:
    """Images of noise: a whole batch in the first task, one image of each class elsewhere."""
    import numpy as np

    from utils.data.dataset import Dataset
    from utils.data.images import ImageArray

    count, of_first = sum(sizes), -(-batch // sizes[0])
    labels = np.concatenate([np.repeat(np.arange(sizes[0]), of_first), np.arange(sizes[0], count)])
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 3, side, side), dtype=np.uint8)
    test = ImageArray(np.zeros((count, 3, side, side), dtype=np.uint8), np.arange(count))
    return Dataset("noise", [str(k) for k in range(count)], ImageArray(pixels, labels), test, "small")


def lines(cfg: Experiment, sizes: Sequence[int], images: Sequence[int], measured: Measured) -> list[str]:
    """What was measured and, where the training `images` of each task were counted, the time of a seed's training steps.

    Steps are those of the key `epochs` of the method in the tasks that it trains in."""
    pass_of = f"a forward pass of {counted(measured.images, 'image')} {measured.seconds:.2f} s"
    memory = f"peak memory {measured.memory / 2**30:.1f} GiB"
    if measured.step is None:
        return [f"measured here: {pass_of}, {memory}; the method takes no training steps in the first task"]
    text = [
        f"measured here: a training step of {counted(measured.batch, 'image')} {measured.step:.3f} s, {pass_of}, {memory}"
    ]
    fields = type(cfg).model_fields
    key = "epochs" if "epochs" in fields else common_names.of(fields).get("epochs")
    trained = len(list(getattr(cfg, "classes_in_loss", lambda c: c)(sizes))) or len(sizes)
    steps = Split(sizes, list(images)).steps(getattr(cfg, key), cfg.batch_size) if key and images else None
    if steps:
        count = sum(steps[:trained])
        text.append(
            f"expected of a seed: {counted(count, 'step')} of {key}, about {clock(count * measured.step)} on this machine as "
            "busy as now; scoring, other phases and data come on top, cached passes may save time"
        )
    return text
