"""Where a run's time goes: wall-clock seconds by part, each second in one of them (`--profile`).

Parts nest, and a second belongs to the innermost one, with a choice: data and prefix are told apart everywhere, since workers
and the prefix cache change those; what detection, consolidation and evaluation compute above the prefix is their own, so that
adapters and backward are training alone. Off, a mark costs one test. On a GPU, whose work runs behind the program, the
program waits for it wherever the part changes: a profiled run is slower, its numbers are the same.

Time belongs to the process, hence the global state, as in utils/interrupt.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from utils.report import number
from utils.runlog import RunLog

if TYPE_CHECKING:
    import torch

PARTS = {
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
Row = Mapping[str, Any]

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
        self.seconds, self.images = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0)

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
    def part(self, name: str, images: int = 0) -> Iterator[None]:
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
        with self.part("data"):
            batches = load()
        while True:
            with self.part("data"):
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


def part(name: str, images: int = 0) -> AbstractContextManager[None]:
    """The time within the block belongs to this part, in which so many images are worked on."""
    return _NOTHING if current is None else current.part(name, images)


def waited(load: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """The batches (images, labels, ...) that `load` begins to give; beginning and waiting for each are the part data."""
    return load() if current is None else current.waited(load)


def tell(log: RunLog, task: int, tasks: int, whole: bool) -> None:
    """The time since the task before as a row and a table; `whole` false if an earlier process had begun the task."""
    if current is not None:
        row = log.row("profile", task=task, whole=whole, **current.lap())
        log.info(table([row], f"time of task {task + 1}/{tasks}"))


# The tables --------------------------------------------------------------------------------------------------------------


def shares(rows: Sequence[Row]) -> list[tuple[str, float, float | None, float | None]]:
    """Of profile rows together: part, seconds, percent of all, images a second where images are counted; last the sum,
    with the training images shown. Parts without time are left out."""
    total = sum(row["total"] for row in rows)
    found = [(name, *(sum(row[key][name] for row in rows) for key in ("seconds", "images"))) for name in PARTS]
    shown = [entry for entry in found if entry[1] > 0]
    shown.append(("all", total, sum(row["images"]["adapters"] for row in rows)))
    return [(n, s, 100 * s / total if total else None, images / s if images and s else None) for n, s, images in shown]


def table(rows: Sequence[Row], title: str) -> str:
    """Seconds, share and images a second of each part."""
    lines = [f"{title:<32}{'seconds':>10}{'percent':>10}{'images/s':>10}"]
    for name, seconds, share, speed in shares(rows):
        lines.append(f"  {name:<30}{number(seconds):>10}{number(share, 1):>10}{number(speed, 0):>10}")
    return "\n".join(lines + [partly(rows)] * any(not row["whole"] for row in rows))


def of_run(rows: Sequence[Row], tasks: int) -> str | None:
    """The table of all tasks that have a profile among the rows of metrics.jsonl; None if none has."""
    own = [row for row in rows if row["kind"] == "profile"]
    return table(own, f"time of {len(own)} of {tasks} tasks") if own else None


def partly(rows: Sequence[Row]) -> str:
    """A sentence on the tasks that were begun by an earlier process, empty if there are none."""
    some = ", ".join(str(row["task"] + 1) for row in rows if not row["whole"])
    return f"  of task {some} only what was spent after the run was resumed" if some else ""
