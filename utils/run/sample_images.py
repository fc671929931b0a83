"""A few training images of each task's classes, saved in the run folder when the task begins, for the report.

`samples/task_T.png` (T from 1) has a column for each class, images of at most SIDE pixels, as the network sees them without
augmentation. The PNG's text field "classes" names the columns. It reads no test image and draws no random number.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from utils.files.storage import write_bytes

if TYPE_CHECKING:
    import torch

    from utils.data.tasks import TaskStream

CLASSES, IMAGES = 8, 2  # at most: classes of a task, images of a class
SIDE, GAP = 48, 2  # pixels: largest side of an image, and between two images
MOST_SHOWN = 20  # tasks in a report; a hundred would make it a file of many megabytes


class Sheet(NamedTuple):
    """One task's images for a page: `task` from 1, `source` a data: URL, its size in pixels, the classes of its columns."""

    task: int
    source: str
    width: int
    height: int
    classes: tuple[str, ...]


def write(folder: Path, stream: TaskStream, index: int) -> None:
    """Writes the images of task `index` (from 0), unless an earlier process did."""
    path = folder / "samples" / f"task_{index + 1}.png"
    if path.is_file():
        return
    task = stream.task(index)
    classes = range(task.first, min(task.total, task.first + CLASSES))
    chosen = [(task.train.labels == c).nonzero().flatten()[:IMAGES].tolist() for c in classes]
    images, *_ = next(iter(task.train.at([[row for rows in chosen for row in rows]], augment=False)))
    path.parent.mkdir(exist_ok=True)
    names = [stream.class_names[c] for c in classes]
    write_bytes(path, _png(images.cpu(), [len(rows) for rows in chosen], names), durable=False)


def _png(images: torch.Tensor, counts: list[int], names: list[str]) -> bytes:
    """Images [B, 3, S, S] in [0, 1] as one PNG; `counts[i]` of them are column i. Gaps are transparent."""
    import numpy as np
    from PIL import Image, PngImagePlugin
    from torch.nn.functional import interpolate

    if images.shape[-1] > SIDE:
        images = interpolate(images, size=(SIDE, SIDE), mode="bilinear", antialias=True)
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    side, step = pixels.shape[1], pixels.shape[1] + GAP
    sheet = np.zeros((max(counts) * step - GAP, len(counts) * step - GAP, 4), dtype=np.uint8)
    remaining = iter(pixels)
    for column, count in enumerate(counts):
        for row in range(count):
            cell = sheet[row * step : row * step + side, column * step : column * step + side]
            cell[..., :3], cell[..., 3] = next(remaining), 255
    facts = PngImagePlugin.PngInfo()
    facts.add_itxt("classes", json.dumps(names))
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, format="PNG", pnginfo=facts, optimize=True)
    return buffer.getvalue()


def read(folder: Path, tasks: int) -> list[Sheet]:
    """The sheets of the first MOST_SHOWN of `tasks` tasks, without missing and damaged ones."""
    sheets = []
    for task in range(1, min(tasks, MOST_SHOWN) + 1):
        path = folder / "samples" / f"task_{task}.png"
        if not path.is_file():
            continue
        from PIL import Image

        try:
            data = path.read_bytes()
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                image.load()
                names = tuple(str(name) for name in json.loads(image.info["classes"]))
                width, height = image.size
        except (OSError, ValueError, KeyError, TypeError, SyntaxError):
            continue
        sheets.append(Sheet(task, "data:image/png;base64," + base64.b64encode(data).decode(), width, height, names))
    return sheets
