"""The pictures of the worst mistakes of a finished model, saved in the run folder for the report.

`samples/mistakes.png` has them side by side, at most MOST of SIDE pixels, as the network sees test images; its text field
"rows" has their rows in the test set. They are read after everything is scored, for the page alone: no score is computed.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from utils.files.storage import write_bytes
from utils.run.sample_images import SIDE

if TYPE_CHECKING:
    import torch

    from utils.data.tasks import TaskStream

MOST = 24


class Shot(NamedTuple):
    """One picture for a page: its `row` in the test set, `source` a data: URL, `side` in pixels."""

    row: int
    source: str
    side: int


def write(folder: Path, stream: TaskStream, mistakes: Sequence[Sequence[Any]]) -> None:
    """Writes the pictures of the first `mistakes` [row, ...] of a finished run. Without any, or where one can no longer be
    read, there is no file."""
    path = folder / "samples" / "mistakes.png"
    rows = [int(row) for row, *_ in mistakes[:MOST]]
    path.unlink(missing_ok=True)
    if not rows:
        return
    import numpy as np

    data = stream.test(0).at_rows(np.asarray(rows))
    try:
        images, *_ = next(iter(data.at([list(range(len(rows)))], augment=False)))
    except (ValueError, OSError):
        return
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, _png(images.cpu(), rows), durable=False)


def _png(images: torch.Tensor, rows: list[int]) -> bytes:
    """Images [B, 3, S, S] in [0, 1] side by side."""
    from PIL import Image, PngImagePlugin
    from torch.nn.functional import interpolate

    if images.shape[-1] > SIDE:
        images = interpolate(images, size=(SIDE, SIDE), mode="bilinear", antialias=True)
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(2, 0, 3, 1).flatten(1, 2).numpy()  # [S, B S, 3]
    facts = PngImagePlugin.PngInfo()
    facts.add_text("rows", json.dumps(rows))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", pnginfo=facts, optimize=True)
    return buffer.getvalue()


def read(folder: Path) -> list[Shot]:
    """The pictures of a run folder; none where the file is missing or damaged."""
    path = folder / "samples" / "mistakes.png"
    if not path.is_file():
        return []
    from PIL import Image

    shots = []
    try:
        with Image.open(io.BytesIO(path.read_bytes()), formats=["PNG"]) as image:
            image.load()
            rows, side = [int(row) for row in json.loads(image.info["rows"])], image.height
            if image.width != side * len(rows):
                return []
            for place, row in enumerate(rows):
                buffer = io.BytesIO()
                image.crop((place * side, 0, (place + 1) * side, side)).save(buffer, format="PNG", optimize=True)
                source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
                shots.append(Shot(row, source, side))
    except (OSError, ValueError, KeyError, TypeError, SyntaxError):
        return []
    return shots
