"""Mirrors the rows of metrics.jsonl to TensorBoard, Weights & Biases or MLflow, with the key `tracker`.

The file remains the complete record: a tracker that fails is named once and left out, and the run goes on. The step of a value
is the number of its row, so every point can be traced to the file. No tracker's package is imported before it is used.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from utils.run.mirror import About, Mirror, scalars
from utils.text import first_line

PACKAGES = {  # tracker -> (the package that must be there, how it is installed)
    "tensorboard": ("tensorboard", "pip install tensorboard"),
    "wandb": ("wandb", "pip install -r requirements-trackers.txt"),
    "mlflow": ("mlflow", "pip install -r requirements-trackers.txt"),
}
# What is mirrored of results.json when a run is finished.
FINAL = (
    *("last_accuracy", "average_accuracy", "final_task_mean", "task_oracle_accuracy"),
    *("forgetting", "backward_transfer", "images_per_second", "peak_memory_bytes"),
)


def missing(tracker: str | None) -> str | None:
    """A line on the package that `tracker` needs and that is not installed, else None."""
    if tracker is None or importlib.util.find_spec((package := PACKAGES[tracker])[0]) is not None:
        return None
    return (
        f'tracker: "{tracker}" needs the package {package[0]}, which is not installed: {package[1]}, or leave '
        "the key out; metrics.jsonl has every number in any case"
    )


def of(tracker: str | None, about: About, rows: int, say: Callable[[str], None]) -> Mirror | None:
    """The mirror of a run folder whose metrics.jsonl has `rows` rows; None without a tracker. `say`: called if it fails."""
    if tracker is None:
        return None
    if tracker == "tensorboard":
        return Guarded(tracker, lambda: TensorBoard(about.folder, rows), say)
    from utils.run import services

    return Guarded(tracker, lambda: services.attach(tracker, about, rows), say)


class Guarded:
    """A mirror whose first failure is said and ends it: no tracker, with its network and its versions, may cost a run."""

    def __init__(self, name: str, start: Callable[[], Mirror], say: Callable[[str], None]):
        self.name, self._say = name, say
        self._mirror: Mirror | None = None
        self._try(lambda: setattr(self, "_mirror", start()))

    def row(self, number: int, row: Mapping[str, Any]) -> None:
        if (mirror := self._mirror) is not None:
            self._try(lambda: mirror.row(number, row))

    def cut(self, count: int) -> None:
        if (mirror := self._mirror) is not None:
            self._try(lambda: mirror.cut(count))

    def finish(self, figures: Mapping[str, float]) -> None:
        if (mirror := self._mirror) is not None:
            self._try(lambda: mirror.finish(figures))

    def close(self) -> None:
        mirror, self._mirror = self._mirror, None
        if mirror is not None:
            self._try(mirror.close)

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # whatever a foreign package raises; an interruption of the run is no Exception
            self._mirror = None
            cause = first_line(str(error) or type(error).__name__)
            self._say(
                f"tracker {self.name} failed ({cause}): the run goes on without it; metrics.jsonl has every number"
            )


class TensorBoard:
    """Event files in RUN/tensorboard, one per process; `tensorboard --logdir logs` shows all runs.

    A resumed run, whose last rows are cut off and written again, tells TensorBoard which points are invalid."""

    def __init__(self, folder: Path, rows: int):
        self.folder, self._last = folder / "tensorboard", rows - 1
        self._open(rows)

    def _open(self, rows: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = rows if self.folder.exists() else None
        self._writer: Any = SummaryWriter(str(self.folder), purge_step=purge_step, flush_secs=10)

    def row(self, number: int, row: Mapping[str, Any]) -> None:
        """Mirrors row `number` (from 0)."""
        self._last = number
        for tag, value in scalars(row):
            self._writer.add_scalar(tag, value, number)

    def cut(self, count: int) -> None:
        """Marks the values of all rows after the first `count` as invalid, since the file was cut back to those."""
        self._writer.close()
        self._open(count)

    def finish(self, figures: Mapping[str, float]) -> None:
        """Adds the figures of the finished run at the step of its last row."""
        for tag, value in figures.items():
            self._writer.add_scalar(f"final/{tag}", value, max(self._last, 0))

    def close(self) -> None:
        self._writer.close()


def figures(results: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of results.json that a tracker shows of a finished run; accuracies in percent."""
    return {key: float(value) for key in FINAL if isinstance(value := results.get(key), int | float)}
