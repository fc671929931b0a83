"""How images get to the device: whether a data set lives there, and how many processes decode files, by measurement.

No result depends on the number of processes; images that live on a GPU are transformed there, with the draws of the CPU.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any

import torch

SHARE = (
    0.1  # of a GPU's whole memory, for each of the training and the test images: what is free changes, this does not
)
SMALL = 0.05  # share of a step below which decoding is not worth a process: starting one takes longer


def fits(size: int, device: torch.device | None) -> bool:
    """Whether images of `size` bytes are to live on the device: on a GPU, if they take at most SHARE of its memory."""
    if device is None or device.type != "cuda":
        return False
    return size <= SHARE * torch.cuda.mem_get_info(device)[1]


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers_for(decode: float, step: float, most: int) -> int:
    """Processes that decode a batch in `decode` seconds each and together keep up with steps of `step` seconds."""
    if decode <= SMALL * step:
        return 0
    return most if step <= 0 else min(most, math.ceil(decode / step))


@torch.inference_mode()
def measured_workers(
    data: Any, size: int, step: Callable[[torch.Tensor], object], device: torch.device
) -> tuple[int, str]:
    """The number of processes for `data` (a TaskData) in batches of `size`, and a line that says why.

    `step` is a forward pass: a training step takes longer, so the number is rather too high than too low."""

    def timed(work: Callable[[], Any]) -> tuple[float, Any]:
        done = work()  # files into the system's cache, kernels compiled
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        done = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start, done

    if not data.batches(size).decodes:
        return 0, "num_workers auto: 0, the images are in memory and transformed by the batch"
    decode, (images, *_) = timed(lambda: next(iter(data.batches(size, draw="measure"))))
    images = images.to(device)
    once, _ = timed(lambda: step(images))
    count = workers_for(decode, once, cores())
    return count, (
        f"num_workers auto: {count} of {cores()} cores; a batch of {len(images)} takes {1000 * decode:.1f} ms to decode, "
        f"{1000 * once:.1f} ms in a forward pass"
    )
