"""How a stored image becomes the network's input at test time, as data: `transforms.follow` does what a recipe says.

An export carries the recipe of its run, so that other programs can follow it too. What all recipes share: an image is turned
upright as its EXIF tag says, transparent pixels become white, everything becomes RGB; values end as float32 in [0, 1], and the
model subtracts mean and deviation itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

KINDS = ("small", "cifar", "imagenet")
LONGEST = 16  # length of a test image in widths, beyond which its ends are cut off before it is resized


@dataclass(frozen=True)
class Recipe:
    """One way from pixels uint8 [3, H, W] to float32 [3, size, size] in [0, 1], in this order:

    `longest`: of an image over that many times as long as wide the middle is taken; null: nothing is cut.
    `resize`: "both" sides to `resize_to` pixels, or the "shorter" one with the proportions as they are; an image that has
    that size stays as it is. `interpolation` with antialiasing, on `values` "uint8" (rounded) or "float" in [0, 1].
    `crop`: side of the central square that is taken; null: nothing is cut.
    `grey_bits`: 16-bit grey values 0 .. 2^grey_bits - 1 are scaled to 0 .. 255 when the file is read."""

    size: int
    longest: int | None
    resize: Literal["both", "shorter"]
    resize_to: int
    interpolation: Literal["bilinear", "bicubic"]
    values: Literal["float", "uint8"]
    crop: int | None
    grey_bits: int = 16

    def plain(self) -> dict[str, Any]:
        """As JSON values, the inverse of `of_plain`."""
        return asdict(self)


def of(kind: str, size: int, grey_bits: int | None = None) -> Recipe:
    """The recipe of a kind of transforms for inputs of `size` pixels, see `transforms.build`. Raises ValueError for an unknown
    kind."""
    if kind not in KINDS:
        raise ValueError(f"transforms {kind!r} are not known; known are {', '.join(KINDS)}")
    if kind == "imagenet":
        shorter = int((256 / 224) * size)
        return Recipe(size, LONGEST, "shorter", shorter, "bicubic", "uint8", size, grey_bits or 16)
    return Recipe(size, None, "both", size, "bilinear", "float", None, grey_bits or 16)


def of_plain(values: Mapping[str, Any]) -> Recipe:
    """The recipe of JSON values. Raises ValueError for missing, unknown or wrong ones."""
    names = {field.name for field in fields(Recipe)}
    if not isinstance(values, Mapping) or set(values) != names:
        raise ValueError(f"the recipe of the input has other fields than {', '.join(sorted(names))}")
    for name, hint in get_type_hints(Recipe).items():
        words = [word for word in get_args(hint) if isinstance(word, str)]
        value = values[name]
        whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if value not in words if words else not (whole or (value is None and type(None) in get_args(hint))):
            raise ValueError(f"the recipe of the input has {name} {value!r}")
    return Recipe(**values)
