"""Looks at the images of a data set before a run: what cannot be read, all at once, and how deep their grey values are.

A header takes about a tenth of a millisecond. Where the end of a file is missing, as after a broken download, or on request,
the image is decoded as a run would. In threads: Pillow's decoders run beside each other, and so do reads of a slow disk.
"""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from utils.data import formats
from utils.data.dataset import DataFaults
from utils.data.images import DAMAGE, decode, refusal
from utils.process.machine import cores

TAIL = 4096  # bytes at a file's end in which its end mark is looked for
CHUNK = 64  # images that a thread looks at before it reports
SAMPLE = 64  # 16-bit images whose values are looked at
DEPTHS = (8, 10, 12, 14, 16)
Progress = Callable[[int, int], None]


@dataclass
class Report:
    """`broken`: {file: why it cannot be read}, in the order of the files; `deep_grey`: files with more than 8 bits of grey."""

    broken: dict[str, str] = field(default_factory=dict)
    deep_grey: list[str] = field(default_factory=list)


def inspect(files: Sequence[str], *, full: bool = False, progress: Progress | None = None) -> Report:
    """Reads the header of every file, with `full` every pixel. `progress` is called with (images done, all)."""
    report, done = Report(), 0
    chunks = [files[k : k + CHUNK] for k in range(0, len(files), CHUNK)]

    def look_at(chunk: Sequence[str]) -> list[tuple[str, str | None, bool]]:
        return [(file, *_look(file, full)) for file in chunk]

    with warnings.catch_warnings(), ThreadPoolExecutor(min(32, 2 * cores())) as pool:
        warnings.simplefilter("ignore")  # Pillow's on sizes and metadata: what cannot be read becomes an error
        for results in pool.map(look_at, chunks):
            for file, fault, deep in results:
                if fault:
                    report.broken[file] = fault
                elif deep:
                    report.deep_grey.append(file)
            done += len(results)
            if progress:
                progress(done, len(files))
    return report


def _look(file: str, full: bool) -> tuple[str | None, bool]:
    """(why the image cannot be read or None, whether it has more than 8 bits of grey)."""
    try:
        with formats.open_image(file) as image:
            deep, whole = image.mode.startswith("I"), _has_end(file, image.format)
            if image.mode == "F":
                raise ValueError("floating-point pixels have no defined range; save it with 8 or 16 bits")
        if (full and not deep) or not whole:
            decode(file)
        elif full:
            _largest(file)
    except (*DAMAGE, Image.DecompressionBombError) as error:
        told = "is not a readable image" in str(error) or "cannot be read" in str(error)
        return str(error if told else refusal(file, error)), False
    return None, deep


def _has_end(file: str, kind: str | None) -> bool:
    """Whether a PNG, JPEG or WebP file has its end; others are taken for whole."""
    with open(file, "rb") as opened:
        start = opened.read(12)
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(0, size - TAIL))
        tail = opened.read()
    if kind == "PNG":
        return b"IEND" in tail
    if kind in ("JPEG", "MPO"):
        return b"\xff\xd9" in tail
    if kind == "WEBP":
        return bool(struct.unpack("<I", start[4:8])[0] + 8 <= size)
    return True


def _largest(file: str) -> int:
    """The largest grey value of an image with more than 8 bits."""
    with formats.open_image(file) as image:
        return int(np.asarray(image).max())


def grey_bits_of(deep: Sequence[str], stated: int | None) -> tuple[int, list[str]]:
    """(the bits of grey that a data set's 16-bit images hold, notes). `stated`: the key grey_bits, which decides if it is set.

    Cameras and scanners of 8 to 12 bits write 16-bit files whose values use a small part of the range. Scaled as 16 bits they
    would be black, and scaled by the brightest pixel of each image they would lose how bright they are beside each other. So
    one depth holds for all images of a data set, and where it looks wrong it must be stated. Raises DataFaults there."""
    if stated is not None or not deep:
        return stated or 16, []
    sample = spread(deep)
    values = []
    for file in sample:
        try:
            values.append(_largest(file))
        except (*DAMAGE, Image.DecompressionBombError):
            continue  # the run names it when it decodes it
    largest = max(values, default=65535)
    bits = next((depth for depth in DEPTHS if largest < 2**depth), 16)
    seen = f"the 16-bit grey images hold values up to {largest:,} of 65,535 ({len(sample)} of {len(deep):,} looked at)"
    if bits <= 12:
        DataFaults.refuse(
            "", [f"{seen}, so they would be nearly black: set grey_bits={bits}, or grey_bits=16 if they are that dark"]
        )
    return 16, [f"{seen}: if they have 14 bits, set grey_bits=14"] if bits < 16 else []


def spread(files: Sequence[str]) -> list[str]:
    """At most SAMPLE files, evenly over all."""
    return [files[k * len(files) // SAMPLE] for k in range(SAMPLE)] if len(files) > SAMPLE else list(files)
