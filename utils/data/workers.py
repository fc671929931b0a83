"""Loading: whether a data set is stored on the GPU, and how many processes decode image files, by measurement.

No result depends on the number of processes. Images stored on a GPU are transformed there, with random numbers from the CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from utils.process.machine import cores

# Share of a GPU's whole memory for the training images, and again for the test images. Not of the free memory, which
# changes from moment to moment.
SHARE = 0.1
# Share of a step's time below which decoding is not worth a process, since starting one takes longer.
SMALL = 0.05


def fits(size: int, device: torch.device | None) -> bool:
    """Whether images of `size` bytes are stored on the device: it is a GPU and they take at most SHARE of its memory."""
    if device is None or device.type != "cuda":
        return False
    return size <= SHARE * torch.cuda.mem_get_info(device)[1]


def workers_for(decode: float, step: float, most: int) -> int:
    """How many processes, each decoding a batch in `decode` seconds, keep up with steps of `step` seconds; at most `most`."""
    if decode <= SMALL * step:
        return 0
    return most if step <= 0 else min(most, math.ceil(decode / step))


@torch.inference_mode()
def measured_workers(
    data: Any, size: int, step: Callable[[torch.Tensor], object], device: torch.device
) -> tuple[int, str]:
    """The number of loader processes for `data` (a TaskData) in batches of `size`, and a line that says why.

    `step` is a forward pass of a batch. A training step takes longer, so the number is rather too high than too low."""

    def timed(work: Callable[[], Any]) -> tuple[float, Any]:
        """(seconds, result) of a second call: the first one fills the system's file cache and compiles kernels."""
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start, result

    if not data.batches(size).decodes:
        return 0, "num_workers auto: 0, the images are in memory and transformed by the batch"
    decode, (images, *_) = timed(lambda: next(iter(data.batches(size, draw="measure"))))
    images = images.to(device)
    forward, _ = timed(lambda: step(images))
    count = workers_for(decode, forward, cores())
    return count, (
        f"num_workers auto: {count} of {cores()} cores; a batch of {len(images)} takes {1000 * decode:.1f} ms to decode, "
        f"{1000 * forward:.1f} ms in a forward pass"
    )
