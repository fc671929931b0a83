"""Where a run's time goes: wall-clock seconds by section, each second counted in exactly one (`--profile`).

Sections nest, and a second counts for the innermost. There are two exceptions. `data` and `prefix` are counted everywhere,
because loader processes and the prefix cache change them. `adapters` and `backward` are training alone: inside detection,
consolidation and evaluation their time counts for that stage.
Without a profile a section costs one test. On a GPU, which works asynchronously, the program waits for the device at every
change of section: a profiled run is slower, its numbers are the same.

Time belongs to the process, hence the global state, as in utils/process/interrupt.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SECTIONS = {
    "data": "waiting for batches: decoding, augmentation, transfer to the device",
    "prefix": "stem and blocks below the first that still learns: computed, or read from the cache",
    "adapters": "training, forward: blocks from there on, head, loss",
    "backward": "training, backward and the optimizer's step",
    "detection": "scans, novelty, descriptors",
    "consolidation": "merges, class statistics",
    "evaluation": "scores on test data and what is measured with them",
    "checkpoint": "what a resumed run needs, written to disk",
    "rest": "everything else",
}
STAGES = ("detection", "consolidation", "evaluation")

current: Profile | None = None  # the run's profile; None without --profile
_NOTHING: AbstractContextManager[None] = nullcontext()


class Profile:
    """Seconds and images by section since the last `lap`.

    `border()` is the layer at which the frozen prefix ends now; `wait()` returns when the device has finished its queue;
    `clock()` is the time in seconds."""

    def __init__(
        self,
        border: Callable[[], int],
        wait: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.border, self.wait, self.clock = border, wait, clock
        self._open, self._now = ["rest"], "rest"  # the sections around this moment, and the one the time counts for
        self._mark = self._start = clock()
        self._reset()

    def _reset(self) -> None:
        self.seconds, self.images = dict.fromkeys(SECTIONS, 0.0), dict.fromkeys(SECTIONS, 0)

    def _charge(self) -> None:
        self.wait()
        now = self.clock()
        self.seconds[self._now] += now - self._mark
        self._mark = now

    def _switch_to(self, name: str) -> None:
        if name != self._now:
            self._charge()
            self._now = name

    def _counted_as(self, name: str) -> str:
        """The section that the time of `name` counts for here: inside a stage, training counts for the stage."""
        stage = next((section for section in reversed(self._open) if section in STAGES), None)
        return stage if stage is not None and name in ("adapters", "backward") else name

    @contextmanager
    def section(self, name: str, images: int = 0) -> Iterator[None]:
        self._open.append(self._counted_as(name))
        self._switch_to(self._open[-1])
        if name == self._now:
            self.images[name] += images
        try:
            yield
        finally:
            self._open.pop()
            self._switch_to(self._open[-1])

    def block(self, layer: int) -> None:
        """Called by a pass that began in the prefix, before block `layer` (from 0) runs."""
        self._open[-1] = self._counted_as("prefix" if layer < self.border() else "adapters")
        self._switch_to(self._open[-1])

    def waited(self, load: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        with self.section("data"):
            batches = load()
        while True:
            with self.section("data"):
                if (batch := next(batches, None)) is None:
                    return
                self.images["data"] += len(batch[1]) if isinstance(batch, tuple) else 0  # else a damaged file's error
            yield batch

    def lap(self) -> dict[str, Any]:
        """Seconds and images by section since the last lap, and `total`, the seconds since then by the clock."""
        self._charge()
        lap = {"total": self._mark - self._start, "seconds": self.seconds, "images": self.images}
        self._start = self._mark
        self._reset()
        return lap


# What the program calls ------------------------------------------------------------------------------------------------


@contextmanager
def running(profiled: bool, border: Callable[[], int], device: torch.device) -> Iterator[None]:
    """Inside the block the time of this process is measured, if `profiled`. `border` is as in Profile."""
    global current
    if profiled:
        current = Profile(border, _waiting(device))
    try:
        yield
    finally:
        current = None


def _waiting(device: torch.device) -> Callable[[], None]:
    if device.type != "cuda":
        return lambda: None
    import torch

    return lambda: torch.cuda.synchronize(device)


def section(name: str, images: int = 0) -> AbstractContextManager[None]:
    """The time inside the block counts for section `name`, a key of SECTIONS, and so do `images`, the number of images it
    works on."""
    return _NOTHING if current is None else current.section(name, images)


@contextmanager
def unnoticed() -> Iterator[None]:
    """Sections inside the block are not counted: its time counts for the section around it, its images for none."""
    global current
    running_profile, current = current, None
    try:
        yield
    finally:
        current = running_profile


def waited(load: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """The batches (images, labels, ...) of the iterator that `load` returns. Calling `load` and waiting for each batch count
    for section `data`."""
    return load() if current is None else current.waited(load)
