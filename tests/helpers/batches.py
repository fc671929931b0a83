"""Task streams over coloured squares, and their batches as one list."""

import numpy as np
import torch

from utils.data.dataset import Dataset
from utils.data.images import ImageArray
from utils.data.tasks import TaskStream


def toy(per_class=6, classes=5, kind="small", side=32):
    """Labels run 0, 1, .., 0, 1, ..; an image's mean tells its row."""

    def part(count, seed):
        images = np.random.RandomState(seed).randint(0, 256, (count * classes, 3, side, side), dtype=np.uint8)
        return ImageArray(images, np.tile(np.arange(classes), count))

    return Dataset("toy", [f"c{k}" for k in range(classes)], part(per_class, 0), part(2, 1), kind)


def stream(dataset=None, **settings):
    defaults = {"init_cls": 2, "increment": 2, "seed": 1993, "image_size": 32}
    return TaskStream(dataset or toy(), **(defaults | settings))


def gather(batches):
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]
