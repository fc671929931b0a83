"""Where a run's time goes: wall-clock seconds by part, each second in one of them (`--profile`).

Parts nest, and a second belongs to the innermost one, with a choice: data and prefix are told apart everywhere, since workers
and the prefix cache change those; what detection, consolidation and evaluation compute above the prefix is their own, so that
adapters and backward are training alone. Off, a mark costs one test. On a GPU, whose work runs behind the program, the
program waits for it wherever the part changes: a profiled run is slower, its numbers are the same.

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


current: Profile | None = None  # the run's profile, None unless it is asked for
_NOTHING: AbstractContextManager[None] = nullcontext()


class Profile:
    """Seconds and images by part since the last `lap`.

    `border()` is the layer at which the prefix ends now, `wait()` returns when the device has done all it was given."""

    def __init__(
        self,
        border: Callable[[], int],
        wait: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.border, self.wait, self.clock = border, wait, clock
        self._open, self._now = ["rest"], "rest"  # the parts that enclose this moment, and the one that is charged
        self._mark = self._start = clock()
        self._reset()

    def _reset(self) -> None:
        self.seconds, self.images = dict.fromkeys(SECTIONS, 0.0), dict.fromkeys(SECTIONS, 0)

    def _charge(self) -> None:
        self.wait()
        now = self.clock()
        self.seconds[self._now] += now - self._mark
        self._mark = now

    def _change(self, name: str) -> None:
        if name != self._now:
            self._charge()
            self._now = name

    def _own(self, name: str) -> str:
        """The part that `name` counts as here: training's parts within a stage are the stage's."""
        stage = next((part for part in reversed(self._open) if part in STAGES), None)
        return stage if stage is not None and name in ("adapters", "backward") else name

    @contextmanager
    def section(self, name: str, images: int = 0) -> Iterator[None]:
        self._open.append(self._own(name))
        self._change(self._open[-1])
        if name == self._now:
            self.images[name] += images
        try:
            yield
        finally:
            self._open.pop()
            self._change(self._open[-1])

    def block(self, layer: int) -> None:
        """Within a pass that began in the prefix: the block `layer` comes next."""
        self._open[-1] = self._own("prefix" if layer < self.border() else "adapters")
        self._change(self._open[-1])

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
        """Seconds and images by part since the last lap, and the seconds between the two as the clock has them."""
        self._charge()
        found = {"total": self._mark - self._start, "seconds": self.seconds, "images": self.images}
        self._start = self._mark
        self._reset()
        return found


# The marks ---------------------------------------------------------------------------------------------------------------


@contextmanager
def running(asked: bool, border: Callable[[], int], device: torch.device) -> Iterator[None]:
    """Within the block the marks act, if that is `asked`."""
    global current
    if asked:
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
    """The time within the block belongs to this part, in which so many images are worked on."""
    return _NOTHING if current is None else current.section(name, images)


def waited(load: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """The batches (images, labels, ...) that `load` begins to give; beginning and waiting for each are the part data."""
    return load() if current is None else current.waited(load)
