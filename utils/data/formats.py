"""Opens image files of a closed list of formats: no content starts another program, and no size fills the memory.

Pillow knows some forty formats. For a few of them (EPS) it starts Ghostscript, whatever the file is called.
"""

from __future__ import annotations

import importlib
import io
import re
from functools import cache
from pathlib import Path

from PIL import Image

# Formats by Pillow's names, each with the module of Pillow that reads it. TGA has no signature: it needs its suffix.
_READERS = {
    **{"PNG": "Png", "JPEG": "Jpeg", "WEBP": "WebP", "GIF": "Gif", "BMP": "Bmp", "DIB": "Bmp", "TIFF": "Tiff"},
    **{"PPM": "Ppm", "JPEG2000": "Jpeg2K", "AVIF": "Avif", "ICO": "Ico"},
}
_TGA_SUFFIXES = (".tga", ".icb", ".vda", ".vst")
NAMES = "PNG, JPEG, WebP, GIF, BMP, TIFF, PPM, JPEG 2000, AVIF, ICO and TGA"
MOST_PIXELS = 89_478_485  # a quarter of a GiB in RGB, where Pillow begins to warn of a decompression bomb
# How other content begins, and what it is.
_OTHERS = (
    *(
        (b"%!PS", "PostScript (EPS)"),
        (b"\xc5\xd0\xd3\xc6", "PostScript (EPS)"),
        (b"%PDF", "PDF"),
        (b"8BPS", "Photoshop"),
    ),
    *((b"PK\x03\x04", "a zip archive"), (b"\x1f\x8b", "gzip"), (b"\x89HDF", "HDF5"), (b"\x93NUMPY", "a numpy array")),
    *((b"version https://git-lfs", "a pointer of Git LFS, run git lfs pull"), (b"\xd7\xcd\xc6\x9a", "WMF")),
    *((b"<svg", "SVG"), (b"<?xml", "XML"), (b"<!doctype", "a web page"), (b"<html", "a web page"), (b"{", "JSON")),
)


class UnknownContent(ValueError):
    """The file's content is none of the formats that are read."""


def open_image(path: str | Path, content: bytes | None = None) -> Image.Image:
    """The image at `path`, its header read and no pixel decoded; close it. `content`: its bytes, if they were read before.

    Raises UnknownContent for another format, ValueError for more than MOST_PIXELS pixels, and what Pillow raises."""
    source = path if content is None else io.BytesIO(content)
    formats = known()
    if str(path).lower().endswith(_TGA_SUFFIXES):
        formats += _reader("TGA", "Tga")
    try:
        image = Image.open(source, formats=formats)
    except Image.UnidentifiedImageError:
        raise UnknownContent(_content_of(path, content)) from None
    except Image.DecompressionBombError as error:  # Pillow's limit is twice ours
        pixels = int((re.search(r"\d+", str(error)) or ["0"])[0])
        raise ValueError(
            f"{pixels / 1e6:,.0f} million pixels are more than {MOST_PIXELS / 1e6:.0f} million; save it smaller"
        ) from None
    width, height = image.size
    if width * height > MOST_PIXELS:
        image.close()
        raise ValueError(f"{width} x {height} pixels are more than {MOST_PIXELS / 1e6:.0f} million; save it smaller")
    return image


@cache
def known() -> tuple[str, ...]:
    """The formats of the list that the installed Pillow reads; no other reader is imported."""
    return tuple(name for kind, module in _READERS.items() for name in _reader(kind, module))


def _reader(kind: str, module: str) -> tuple[str, ...]:
    try:
        importlib.import_module(f"PIL.{module}ImagePlugin")
    except ImportError:  # AVIF needs Pillow 11.3
        return ()
    return (kind,) if kind in Image.OPEN else ()


def _content_of(path: str | Path, content: bytes | None) -> str:
    """What the file holds instead of an image, as far as its first bytes say."""
    if content is None:
        with open(path, "rb") as file:
            content = file.read(64)
    start = content[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    what = next((name for sign, name in _OTHERS if start.startswith(sign.lower())), "")
    if content[4:8] == b"ftyp":
        brand = content[8:12].decode("ascii", "replace")
        what = (
            "AVIF, which this Pillow does not read: pip install -U pillow"
            if brand == "avif"
            else f"HEIC or video ({brand})"
        )
    elif content[:64] and not any(content[:64]):
        what = "zero bytes"
    return f"its content is {what or 'unknown'}, read are {NAMES}"
