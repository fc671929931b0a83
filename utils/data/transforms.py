"""From stored pixels to network input: uint8 RGB of any size to float32 [B, 3, size, size] in [0, 1].

Every sample has its seed, so the result depends neither on the batch a sample is in nor on the process that decodes it.
Mean and deviation are not applied here: the backbone normalises its input.
Legend: B batch, H and W stored height and width, S side of the network's input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from utils.data import recipe
from utils.data.recipe import Recipe

# Range of the "small" augmentation; no flips, which would turn characters into others.
ROTATION_DEGREES, SCALE_RANGE, SHIFT_SHARE = 10.0, 0.1, 0.0625


class Transform(Protocol):
    """Maps B images uint8 [3, H, W] and their seeds uint64 [B] to float32 [B, 3, S, S] in [0, 1].

    A `batched` transform works on a whole tensor at once, so fast that loader processes would only slow it down."""

    batched: bool

    def __call__(self, images: torch.Tensor | Sequence[torch.Tensor], seeds: np.ndarray) -> torch.Tensor: ...


def build(kind: str, size: int) -> tuple[Transform, Transform]:
    """The training and the test transform of a kind, for inputs of `size` pixels.

    small: for the embedded 32-pixel sets; a mild rotation, scaling and shift in training, nothing in the test.
    cifar: LAMDA-PILOT's (`utils/data.py`, iCIFAR100): random crop with padding 4, flip, brightness 63/255 in training.
    imagenet: SEMA-CL's (`utils/data.py`, build_transform): random resized crop (5 to 100 percent of the area) and flip;
    test bicubic to 256/224 of the size, then the centre. SEMA-CL resizes PIL images; we resize uint8 tensors with
    antialiasing, which is Pillow's method: no value differs by more than 1 of 255, and under 1 percent do.
    Where `small` and `cifar` images differ from `size` they are resized last, bilinear with antialiasing.
    Raises ValueError for an unknown kind."""
    test = follow(recipe.of(kind, size))
    if kind == "small":
        return BatchAffine(size), test
    from torchvision.transforms import v2

    to_float = v2.ToDtype(torch.float32, scale=True)
    if kind == "cifar":
        jitter = v2.ColorJitter(brightness=63 / 255)
        fit = [] if size == 32 else [v2.Resize((size, size), antialias=True)]
        train = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), jitter, *fit, to_float]
        return PerSample(v2.Compose(train)), test
    crop = v2.RandomResizedCrop(size, scale=(0.05, 1.0), ratio=(3 / 4, 4 / 3), antialias=True)
    return PerSample(v2.Compose([crop, v2.RandomHorizontalFlip(), to_float])), test


def follow(how: Recipe) -> Transform:
    """The test transform that a recipe describes. Raises ValueError for steps that no kind of `build` combines."""
    if (how.resize, how.interpolation, how.values) == ("both", "bilinear", "float"):
        if (how.resize_to, how.crop, how.longest) == (how.size, None, None):
            return BatchResize(how.size)
    elif (how.resize, how.values) == ("shorter", "uint8") and how.longest and how.crop == how.size:
        from torchvision.transforms import InterpolationMode, v2

        resize = v2.Resize(how.resize_to, interpolation=InterpolationMode(how.interpolation), antialias=True)
        to_float = v2.ToDtype(torch.float32, scale=True)
        middle = partial(_middle, longest=how.longest)
        return PerSample(v2.Compose([middle, resize, v2.CenterCrop(how.crop), to_float]))
    raise ValueError(f"no test transform combines these steps: {how}")


def _middle(image: torch.Tensor, longest: int) -> torch.Tensor:
    """The middle of an image uint8 [3, H, W] that is over `longest` times as long as wide, since all else is cut off later.

    Without this an image of 20000 x 1 pixels is enlarged to 5 million x 256 for its 224 in the middle: 52 s and 10 GB."""
    height, width = image.shape[-2:]
    most = longest * min(height, width)
    top, left = max(height - most, 0) // 2, max(width - most, 0) // 2
    return image[..., top : height - top, left : width - left]


def sample_seeds(base: int, rows: np.ndarray) -> np.ndarray:
    """One seed per sample, uint64 [B], from a base seed and the samples' row numbers int64 [B]."""
    with np.errstate(over="ignore"):
        return _mix(np.uint64(base) + _mix(rows.astype(np.uint64)))


def uniforms(seeds: np.ndarray, count: int) -> np.ndarray:
    """`count` uniform numbers in [0, 1) for every seed uint64 [B]: float64 [B, count].

    Counter-based (the splitmix64 finaliser of Steele, Lea and Flood, OOPSLA 2014): a number depends on its seed and its
    position alone, and a whole batch takes microseconds."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        return (_mix(seeds[:, None] + steps) >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _as_float(images: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    batch = images if isinstance(images, torch.Tensor) else torch.stack(list(images))
    return batch.float() / 255


def _resized(batch: torch.Tensor, size: int) -> torch.Tensor:
    if batch.shape[-2:] == (size, size):
        return batch
    return F.interpolate(batch, size=(size, size), mode="bilinear", antialias=True).clamp_(0, 1)


class BatchResize:
    """To float and to the wanted size, nothing random; all images of a batch have the same size."""

    batched = True

    def __init__(self, size: int):
        self.size = size

    def __call__(self, images: torch.Tensor | Sequence[torch.Tensor], seeds: np.ndarray) -> torch.Tensor:
        return _resized(_as_float(images), self.size)


class BatchAffine:
    """A mild random rotation (10 degrees), scaling (10 percent) and shift (1/16 of the side, 2 of 32 pixels) on black.

    One grid_sample per batch: torchvision's RandomAffine on one 32-pixel image after the other takes ten times as
    long."""

    batched = True

    def __init__(self, size: int):
        self.size = size

    def __call__(self, images: torch.Tensor | Sequence[torch.Tensor], seeds: np.ndarray) -> torch.Tensor:
        batch = _as_float(images)
        grid = _affine_grid(uniforms(seeds, 4) * 2 - 1, *batch.shape[-2:])  # on the CPU: equal for every device
        grid = grid.to(batch.device)
        moved = F.grid_sample(batch, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return _resized(moved.clamp_(0, 1), self.size)


def _affine_grid(draws: np.ndarray, height: int, width: int) -> torch.Tensor:
    """Draws [B, 4] in [-1, 1) (angle, scale, shift x, shift y) to the sampling grid float32 [B, H, W, 2].

    The inverse map is written out elementwise: a matrix product may round differently for another batch size."""
    angle = [math.radians(ROTATION_DEGREES) * float(a) for a in draws[:, 0]]
    zoom = [1 / (1 + SCALE_RANGE * float(s)) for s in draws[:, 1]]
    cos = torch.tensor([z * math.cos(a) for a, z in zip(angle, zoom, strict=True)])[:, None, None]
    sin = torch.tensor([z * math.sin(a) for a, z in zip(angle, zoom, strict=True)])[:, None, None]
    shift = torch.from_numpy(draws[:, 2:] * (2 * SHIFT_SHARE)).float()[:, :, None, None]
    y = ((torch.arange(height) + 0.5) * (2 / height) - 1)[None, :, None] - shift[:, 1]
    x = ((torch.arange(width) + 0.5) * (2 / width) - 1)[None, None, :] - shift[:, 0]
    return torch.stack((cos * x + sin * y, cos * y - sin * x), dim=-1)


class PerSample:
    """Runs a torchvision transform on one image after the other, each from its own seed.

    torchvision draws from torch's global CPU generator, so that generator is seeded for each image and restored afterwards.
    `torch.manual_seed` would seed the generators of the GPUs as well, which are not restored."""

    batched = False

    def __init__(self, transform: Callable[[torch.Tensor], torch.Tensor]):
        self.transform = transform

    def __call__(self, images: torch.Tensor | Sequence[torch.Tensor], seeds: np.ndarray) -> torch.Tensor:
        generator = torch.default_generator
        before = generator.get_state()
        results = []
        try:
            for image, seed in zip(images, seeds, strict=True):
                generator.manual_seed(int(seed) >> 1)  # torch's seeds are signed
                results.append(self.transform(image))
        finally:
            generator.set_state(before)
        return torch.stack(results)
