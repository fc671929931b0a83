"""Image sets in memory and on disk, and `decode`, the one function that turns a file into RGB pixels."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps

from utils.data import formats
from utils.data.names import readable

# Exceptions that Pillow raises on damaged files, from its checks or from the parsers it calls.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
)


class ImageArray:
    """Images in memory: `images` uint8 [N, 3, H, W], `labels` int64 [N]."""

    def __init__(self, images: np.ndarray | torch.Tensor, labels: np.ndarray | Sequence[int]):
        self.images = torch.as_tensor(images)
        self.labels = np.asarray(labels, dtype=np.int64)
        assert self.images.dtype == torch.uint8 and self.images.ndim == 4 and self.images.shape[1] == 3, (
            self.images.shape
        )
        assert self.labels.shape == (len(self.images),), (self.labels.shape, self.images.shape)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> torch.Tensor:
        return self.images[index]

    def at(self, rows: np.ndarray) -> ImageArray:
        """The images `rows` alone, in this order."""
        return ImageArray(self.images[torch.from_numpy(rows)], self.labels[rows])

    def without_images(self) -> ImageArray:
        """A set of such images that has none."""
        return self.at(np.zeros(0, dtype=np.int64))


class Watch(Protocol):
    """Reads image files for an ImageFiles: `read` gives a file's bytes, None to have the path opened instead."""

    def read(self, index: int, path: str) -> bytes | None: ...
    def decoded(self, index: int) -> None: ...


class ImageFiles:
    """Images on disk, decoded on every access: `paths` [N], `labels` int64 [N]. `grey_bits`: see `decode`.

    `watch`, if set, reads the files and compares them with what the run read before (utils/data/manifest.py)."""

    watch: Watch | None = None

    def __init__(self, paths: Sequence[str | Path], labels: np.ndarray | Sequence[int], grey_bits: int = 16):
        self.paths = [str(p) for p in paths]
        self.labels = np.asarray(labels, dtype=np.int64)
        self.grey_bits = grey_bits
        assert self.labels.shape == (len(self.paths),), (self.labels.shape, len(self.paths))

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, rows: np.ndarray) -> ImageFiles:
        """The images `rows` alone, in this order."""
        return ImageFiles([self.paths[row] for row in rows], self.labels[rows], self.grey_bits)

    def image(self, index: int) -> torch.Tensor:
        if self.watch is None:
            return decode(self.paths[index], grey_bits=self.grey_bits)
        pixels = decode(self.paths[index], self.watch.read(index, self.paths[index]), self.grey_bits)
        self.watch.decoded(index)  # a damaged file does not count as read: it may be repaired
        return pixels


def decode(path: str | Path, content: bytes | None = None, grey_bits: int = 16) -> torch.Tensor:
    """Reads an image file as RGB, uint8 [3, H, W], upright. `content`: its bytes, if they were read before.

    It is rotated as its EXIF tag says. Transparent pixels become white (LAMDA-PILOT drops the alpha channel, which turns a
    drawing in black on transparent into a black square). 16-bit grey is scaled to 8 bits, not clipped: its values lie in
    0 .. 2^grey_bits - 1, the same for every image of a data set. Of an animation the first frame is read.
    Raises ValueError with the path if the file is damaged, empty, of a format that is not read (utils/data/formats.py), too
    large or has pixels without a defined range, FileNotFoundError if it has been removed."""
    try:
        with formats.open_image(path, content) as opened:
            opened.load()
            pixels = np.array(_rgb(ImageOps.exif_transpose(opened), grey_bits))
    except (*DAMAGE, Image.DecompressionBombError) as error:
        raise refusal(path, error) from None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def refusal(path: str | Path, error: Exception) -> ValueError | FileNotFoundError:
    """What to raise for an image that could not be read: one line with the path, the reason and what to do."""
    name = readable(str(path))
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{name}: the image is gone or is a dangling link")
    if isinstance(error, OSError) and error.errno is not None:  # an error of the system, not of the decoder
        return ValueError(f"{name}: cannot be read: {error.strerror}")
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{name}: is not a readable image ({reason}); replace or remove the file")


def _rgb(image: Image.Image, grey_bits: int) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray(eight_bits(np.asarray(image), grey_bits)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range; save it with 8 or 16 bits")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        upper = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), upper).convert("RGB")
    return image.convert("RGB")


def eight_bits(pixels: np.ndarray, bits: int) -> np.ndarray:
    """Integer grey values 0 .. 2^bits - 1 as uint8: scaled and rounded, so that the largest becomes 255."""
    low, high, most = int(pixels.min()), int(pixels.max()), 2**bits - 1
    if low < 0 or high > 65535:
        raise ValueError(f"grey values {low}..{high} do not fit 16 bits; save it with 8 or 16 bits")
    if high > most:
        raise ValueError(f"grey value {high} is above {most}, the most that grey_bits {bits} allows")
    return ((pixels.astype(np.uint32) * 510 + most) // (2 * most)).astype(np.uint8)
