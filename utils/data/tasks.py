"""The order of the classes, its split into tasks, and the data of a task that a learner gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from utils.data import transforms, workers
from utils.data.batches import Source, TaskData
from utils.data.dataset import Dataset


def drawn_order(num_classes: int, seed: int, shuffle: bool = True) -> list[int]:
    """Original class ids in order of arrival, as LAMDA-PILOT and SEMA-CL draw them: `np.random.seed(seed);
    np.random.permutation(n)`. Without `shuffle` the natural order.

    Raises ValueError for a seed outside 0 .. 2**32 - 1, numpy's range."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"the seed of the class order must lie in 0..{2**32 - 1}, got {seed}")
    return np.random.RandomState(seed).permutation(num_classes).tolist() if shuffle else list(range(num_classes))


def task_sizes(num_classes: int, init_cls: int, increment: int | Sequence[int]) -> list[int]:
    """Classes per task: `init_cls` in the first, `increment` in each later one, the remainder in the last; or, where
    `increment` is a list, its numbers in the later ones.

    Raises ValueError if a number is below 1, there are fewer classes than the first task needs, or a list leaves classes
    over or asks for too many."""
    if init_cls < 1 or (increment < 1 if isinstance(increment, int) else min(increment, default=1) < 1):
        raise ValueError(f"init_cls and increment must be at least 1, got {init_cls} and {increment}")
    if init_cls > num_classes:
        raise ValueError(f"init_cls asks for {init_cls} classes in the first task, but there are only {num_classes}")
    if not isinstance(increment, int):
        if init_cls + sum(increment) != num_classes:
            counts = f"init_cls {init_cls} and increment {list(increment)} make {init_cls + sum(increment)} classes"
            raise ValueError(f"{counts}, but there are {num_classes}")
        return [init_cls, *increment]
    full, rest = divmod(num_classes - init_cls, increment)
    return [init_cls] + [increment] * full + [rest] * (rest > 0)


@dataclass(frozen=True)
class Task:
    """The data of one task that a learner gets: training data, and no test data.

    `first` classes were seen before the task, `total` after it; `class_ids` are the original ids of its new classes.
    `past` has the training data of earlier tasks and is empty unless the method declares that it uses them. `test` is
    None unless a setting asks to select on test data, which invalidates the result; results.json says so."""

    index: int  # from 0
    first: int
    total: int
    class_ids: tuple[int, ...]
    train: TaskData
    past: tuple[TaskData, ...] = ()
    test: TaskData | None = None


class TaskStream:
    """The tasks of one run. `order`: original class ids as they arrive; `sizes`: classes per task."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        init_cls: int,
        increment: int | Sequence[int],
        seed: int,
        image_size: int,
        class_order_seed: int | None = None,
        class_order: Sequence[int] | None = None,
        shuffle: bool = True,
        num_workers: int = 0,
        device: torch.device | None = None,
    ):
        """`seed` is the seed of the run. The class order is `class_order`, else drawn from `class_order_seed` or `seed`.
        `device`: where batches are sent; images in memory that fit a GPU are stored there.
        Raises ValueError for an impossible split or a class without images."""
        count = len(dataset.class_names)
        self.sizes = task_sizes(count, init_cls, increment)
        order_seed = seed if class_order_seed is None else class_order_seed
        self.order = drawn_order(count, order_seed, shuffle) if class_order is None else list(class_order)
        if sorted(self.order) != list(range(count)):
            raise ValueError(f"class_order: each of the {count} classes 0..{count - 1} is expected once")
        self.left_out = dataset.left_out
        self.class_names = [dataset.class_names[c] for c in self.order]
        pair = transforms.build(dataset.transforms, image_size)
        shared = (*pair, seed, num_workers, f"{dataset.name} {dataset.transforms} {image_size}", device)
        self._test = Source(dataset.test, *shared)
        self._train = Source(dataset.train, *shared, before=len(dataset.test))
        for split, source in (("training", self._train), ("test", self._test)):
            absent = set(range(count)) - set(np.unique(source.images.labels).tolist())
            if absent:
                names = ", ".join(dataset.class_names[c] for c in sorted(absent)[:10])
                raise ValueError(
                    f"dataset {dataset.name}: no {split} images for {len(absent)} of {count} classes: {names}"
                )

    @classmethod
    def of(
        cls, cfg: Any, dataset: Dataset, seed: int, image_size: int, device: torch.device | None = None
    ) -> TaskStream:
        """The tasks of a run with settings `cfg`. With num_workers "auto" there are no loader processes until
        `measure_workers` is called."""
        names = ("init_cls", "increment", "class_order_seed", "class_order", "shuffle")
        settings = {name: getattr(cfg, name) for name in names}
        count = 0 if cfg.num_workers == "auto" else cfg.num_workers
        return cls(dataset, seed=seed, image_size=image_size, num_workers=count, device=device, **settings)

    def measure_workers(self, cfg: Any, model: torch.nn.Module, device: torch.device) -> str | None:
        """With num_workers "auto": measures loading and a forward pass of `model`, sets the number of loader processes, and
        returns a line that says so; else None."""
        if cfg.num_workers != "auto":
            return None
        count, text = workers.measured_workers(self.task(0).train, cfg.batch_size, model, device)
        self._train, self._test = (replace(source, num_workers=count) for source in (self._train, self._test))
        return text

    def __len__(self) -> int:
        return len(self.sizes)

    def original_names(self) -> list[str]:
        """Names of the classes in the data set's order; `class_names` has them in order of arrival."""
        return [name for _, name in sorted(zip(self.order, self.class_names, strict=True))]

    def train_images(self) -> list[int]:
        """The number of training images of each task."""
        counts = np.bincount(self._train.images.labels, minlength=len(self.order))[self.order]
        ends = np.cumsum(self.sizes)
        return [int(counts[end - size : end].sum()) for size, end in zip(self.sizes, ends, strict=True)]

    def task(self, index: int, with_past: bool = False, with_test: bool = False) -> Task:
        """Task `index` (from 0) with its training data; if asked, also that of earlier tasks, or all test data so far."""
        span = self._span(index)
        past = tuple(self._data(self._train, earlier, index) for earlier in range(index)) if with_past else ()
        train = self._data(self._train, index, index)
        test = self.test(0).join(*(self.test(k) for k in range(1, index + 1))) if with_test else None
        return Task(index, span.start, span.stop, tuple(self.order[span.start : span.stop]), train, past, test)

    def test(self, index: int) -> TaskData:
        """The test samples of the classes of task `index`. Only the runner calls this, never a learner."""
        return self._data(self._test, index, index)

    def _span(self, index: int) -> range:
        if not 0 <= index < len(self.sizes):
            raise IndexError(f"task {index} of {len(self.sizes)}")
        first = sum(self.sizes[:index])
        return range(first, first + self.sizes[index])

    def _data(self, source: Source, index: int, used_in: int) -> TaskData:
        """Samples of the classes of task `index` in the order of the data set, with the random draws of task `used_in`."""
        arrival = np.full(len(self.order), -1, dtype=np.int64)
        arrival[[self.order[k] for k in self._span(index)]] = list(self._span(index))
        labels = arrival[source.images.labels]
        rows = np.flatnonzero(labels >= 0)
        return TaskData(source, used_in, rows, torch.from_numpy(labels[rows]))
