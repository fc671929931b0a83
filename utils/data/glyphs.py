"""`glyphs`: 100 characters drawn at random with the sixteen text fonts inside matplotlib, 7,500 images.

Each image is rotated, sheared, scaled and shifted at random. Twelve fonts draw the training images and four
others the test images, one of each family (DejaVu Sans, Sans Mono and Serif, STIX), so the test asks for the letter
and not for the font.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Characters that all sixteen fonts have. Some look alike once their size is random (A and Greek Alpha; O, 0 and o; C and
# c; I and l; H and Cyrillic En; Eta and n): of each such group there is one. `tests/utils/data/test_sets.py` measures that
# no two coincide.
CHARACTERS = (
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # 26 Latin capitals
    "abdefghijmnpqrtuy"  # 17 small letters that do not look like their capital
    "123456789"  # 9
    "ΓΔΘΛΞΣΦΨΩ"  # 9 Greek capitals
    "αβδεζλξσω"  # 9 small Greek
    "БДЖИЦЧЩЭЮЯЫЪЂЊ"  # 14 Cyrillic
    "&@#%$€£§¶?÷{±<*~"  # 16 signs
)
TEST_FONTS = ("DejaVuSans-BoldOblique", "DejaVuSansMono", "DejaVuSerif-Italic", "STIXGeneralBol")
TRAIN_FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique"),
    *("DejaVuSansMono-Bold", "DejaVuSansMono-BoldOblique", "DejaVuSansMono-Oblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralBolIta", "STIXGeneralItalic"),
)
TRAIN_PER_CLASS, TEST_PER_CLASS = 60, 15
_SEED = 100
_SIDE, _OVER = 32, 2  # side of the images; drawn at twice the side and averaged
_POINTS, _CANVAS = 64, 128  # em size and side of the master drawing in pixels
# Ranges of the random draws: degrees, shear, size of the em in pixels of the final image, shift in such pixels.
_ROTATION, _SHEAR, _EM, _SHIFT = 15.0, 0.2, (24.0, 34.0), 2.5


def load() -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Class names, training images uint8 [6000, 3, 32, 32], training labels [6000], test images [1500, ...], test labels
    [1500].

    White on black; the same pixels for the same versions of the fonts and of FreeType. Raises ValueError if
    matplotlib's fonts are missing or lack a character."""
    masters = {font: _masters(font) for font in (*TRAIN_FONTS, *TEST_FONTS)}
    random = np.random.RandomState(_SEED)
    train = _draw(masters, TRAIN_FONTS, TRAIN_PER_CLASS, random)
    test = _draw(masters, TEST_FONTS, TEST_PER_CLASS, random)
    return list(CHARACTERS), *train, *test


def font_path(font: str) -> Path:
    """The file of a font that ships inside matplotlib; ValueError if it is missing."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    if not path.is_file():
        raise ValueError(
            f"dataset glyphs: the font {path} is missing; it ships inside matplotlib: "
            "python -m pip install --force-reinstall matplotlib"
        )
    return path


def _masters(font: str) -> list[Image.Image]:
    """Every character once, upright, centred by its outline, on [128, 128] grey."""
    from matplotlib.ft2font import FT2Font

    path = font_path(font)
    absent = [c for c in CHARACTERS if ord(c) not in FT2Font(str(path)).get_charmap()]
    if absent:
        raise ValueError(f"dataset glyphs: the font {path} lacks {' '.join(absent)}; install matplotlib 3.8 or newer")
    # The basic layout engine always exists; the other one depends on how Pillow was built.
    face = ImageFont.truetype(str(path), _POINTS, layout_engine=ImageFont.Layout.BASIC)
    drawn = []
    for character in CHARACTERS:
        image = Image.new("L", (_CANVAS, _CANVAS))
        left, top, right, bottom = face.getbbox(character)
        x, y = (_CANVAS - left - right) / 2, (_CANVAS - top - bottom) / 2
        ImageDraw.Draw(image).text((round(x), round(y)), character, fill=255, font=face)
        drawn.append(image)
    return drawn


def _draw(
    masters: dict[str, list[Image.Image]], fonts: tuple[str, ...], per_class: int, random: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [classes * per_class, 3, 32, 32] and labels; a class's images go through the fonts in turn."""
    labels = np.repeat(np.arange(len(CHARACTERS)), per_class)
    draws = random.uniform(-1, 1, size=(len(labels), 5))
    images = np.empty((len(labels), _SIDE, _SIDE), dtype=np.uint8)
    for row, (label, draw) in enumerate(zip(labels, draws, strict=True)):
        images[row] = _warp(masters[fonts[row % per_class % len(fonts)]][label], draw)
    return np.ascontiguousarray(np.repeat(images[:, None], 3, axis=1)), labels


def _warp(master: Image.Image, draw: np.ndarray) -> np.ndarray:
    """One image [32, 32]: rotation, shear, size and shift from five draws in [-1, 1]."""
    angle = math.radians(_ROTATION) * draw[0]
    em = (_EM[0] + _EM[1]) / 2 + (_EM[1] - _EM[0]) / 2 * draw[2]
    zoom = _POINTS / (em * _OVER)  # master pixels for one pixel of the oversized drawing
    cos, sin, shear = zoom * math.cos(angle), zoom * math.sin(angle), _SHEAR * draw[1]
    a, b, c, d = cos - shear * sin, sin + shear * cos, -sin, cos  # shear after rotation
    side = _SIDE * _OVER
    x, y = side / 2 + _SHIFT * _OVER * draw[3], side / 2 + _SHIFT * _OVER * draw[4]
    middle = _CANVAS / 2
    matrix = (a, b, middle - a * x - b * y, c, d, middle - c * x - d * y)
    large = master.transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(large.reduce(_OVER))
