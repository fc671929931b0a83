"""Cuts a data set into a stream of tasks with new classes each, and feeds a task's samples in seeded batches.

Labels are renumbered in the order in which classes arrive: the first task has 0 .. init_cls - 1, the next follows on.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from utils import interrupt, loading, parallel, profile, transforms
from utils.config import Experiment
from utils.data import Dataset, ImageSet
from utils.data.images import ImageArray
from utils.runtime import named_generator, named_seed

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def drawn_order(num_classes: int, seed: int, shuffle: bool = True) -> list[int]:
    """Original class ids in order of arrival: LAMDA-PILOT's and SEMA-CL's `np.random.seed(seed);
    np.random.permutation(n)`.

    Without `shuffle` the natural order. Raises ValueError for a seed outside 0 .. 2**32 - 1, numpy's range."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"the seed of the class order must lie in 0..{2**32 - 1}, got {seed}")
    return np.random.RandomState(seed).permutation(num_classes).tolist() if shuffle else list(range(num_classes))


def task_sizes(num_classes: int, init_cls: int, increment: int) -> list[int]:
    """Classes per task: `init_cls`, then `increment` as often as they fit, then what remains.

    Raises ValueError if a number is below 1 or there are fewer classes than the first task needs."""
    if init_cls < 1 or increment < 1:
        raise ValueError(f"init_cls and increment must be at least 1, got {init_cls} and {increment}")
    if init_cls > num_classes:
        raise ValueError(f"init_cls asks for {init_cls} classes in the first task, but there are only {num_classes}")
    full, rest = divmod(num_classes - init_cls, increment)
    return [init_cls] + [increment] * full + [rest] * (rest > 0)


@dataclass(frozen=True)
class _Source:
    """Where samples come from and how they are turned into input; the same for all tasks of a stream."""

    images: ImageSet
    train: transforms.Transform
    test: transforms.Transform
    seed: int
    num_workers: int
    inputs: str = ""  # names the transforms and the size of their result
    device: torch.device | None = None  # where batches go
    before: int = 0  # test images, where these are training images: what is kept of both is planned together

    @cached_property
    def pixels(self) -> torch.Tensor:
        """The images of an ImageArray, on the device where they fit."""
        assert isinstance(self.images, ImageArray)
        own = self.images.images
        return own.to(self.device) if loading.fits(own.nbytes, self.device) else own

    @cached_property
    def digest(self) -> str:
        """16 hex digits over the images (of files: paths, sizes and times of change), labels and transforms."""
        found = hashlib.blake2b(self.inputs.encode(), digest_size=8)
        found.update(np.ascontiguousarray(self.images.labels).data)
        if isinstance(self.images, ImageArray):
            found.update(self.images.images.contiguous().numpy().data)
        for path in getattr(self.images, "paths", ()):
            facts = os.stat(path)
            found.update(f"{path}\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode())
        return found.hexdigest()


class TaskData:
    """Samples of some classes. `labels` int64 [N] in arrival order numbers; `rows` int64 [N] are rows of the data
    set."""

    def __init__(self, source: _Source, task: int, rows: np.ndarray, labels: torch.Tensor):
        self._source, self._task = source, task
        self.rows, self.labels = rows, labels

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def source(self) -> _Source:
        """Where the samples come from: one for all training data of a run, one for all test data."""
        return self._source

    def batches(
        self,
        batch_size: int,
        *,
        epoch: int = 0,
        stream: str = "train",
        augment: bool = True,
        shuffle: bool = True,
        part: bool = False,
    ) -> Batches:
        """One pass over the samples; the last batch may be smaller. The result has a length and can be run through
        again.

        Yields (images float32 [B, 3, S, S] in [0, 1], labels int64 [B], index int64 [B], the positions in this
        TaskData). The order comes from (seed, task, stream, epoch), a sample's augmentation from those and its row, so
        neither depends on the batch size or the number of workers. `stream` names the use, so that two uses of one
        epoch draw differently. `augment=False` gives the test transform, `shuffle=False` the order of the data set.
        `part`: of each batch only what this rank computes, see utils/parallel.py. Where a batch has fewer samples than
        there are ranks, some get one image as padding, and an empty index with it."""
        if batch_size < 1:
            raise ValueError(f"the batch size must be at least 1, got {batch_size}")
        order = self.order(epoch, stream) if shuffle else torch.arange(len(self))
        chunks = [chunk.tolist() for chunk in order.split(batch_size) if len(chunk)]
        return self.at(chunks, epoch=epoch, stream=stream, augment=augment, part=part)

    def at(
        self,
        chunks: list[list[int]],
        *,
        epoch: int = 0,
        stream: str = "train",
        augment: bool = True,
        part: bool = False,
    ) -> Batches:
        """Batches of the samples at these positions, with the augmentation that `stream` and `epoch` draw."""
        fetch = _Fetch(self._source, self.rows, self.labels, self.draws(epoch, stream), augment)
        if part:
            chunks = own_parts(chunks)
        return Batches(fetch, chunks)

    def draws(self, epoch: int, stream: str) -> int:
        """The seed of the augmentation that `stream` and `epoch` draw; with a sample's row it decides the image."""
        return named_seed(self._source.seed, "augment", self._task, stream, epoch)

    def order(self, epoch: int, stream: str) -> torch.Tensor:
        """The shuffled positions int64 [N] of one pass, as `batches` takes them."""
        return torch.randperm(
            len(self), generator=named_generator(self._source.seed, "order", self._task, stream, epoch)
        )

    def split(self, ratio: float, stream: str) -> tuple[TaskData, TaskData]:
        """(kept, held out): of every class a seeded share `ratio`, rounded but at least one sample, is held out.

        Both keep the data set's order. A class is split by its own draw from (the run's seed, `stream`, class), the same
        whatever else is in the task.
        Raises ValueError if the ratio is not inside (0, 1) or a class has fewer than two samples."""
        if not 0 < ratio < 1:
            raise ValueError(f"the held-out share must lie between 0 and 1, got {ratio}")
        held = np.zeros(len(self), dtype=bool)
        for label in self.labels.unique().tolist():
            own = np.flatnonzero(self.labels.numpy() == label)
            if len(own) < 2:
                raise ValueError(f"class {label} of task {self._task} has {len(own)} sample, too few to hold one out")
            count = min(max(round(ratio * len(own)), 1), len(own) - 1)
            draw = torch.randperm(
                len(own), generator=named_generator(self._source.seed, "split", stream, label)
            ).numpy()
            held[own[draw[:count]]] = True
        return self.subset(np.flatnonzero(~held)), self.subset(np.flatnonzero(held))

    def at_rows(self, rows: np.ndarray) -> TaskData:
        """Samples of the same source at these rows of the data set, to be looked at without labels: all are -1."""
        return TaskData(self._source, self._task, rows, torch.full((len(rows),), -1))

    def subset(self, index: np.ndarray | torch.Tensor | Sequence[int]) -> TaskData:
        """The samples at these positions, in this order."""
        chosen = np.asarray(index, dtype=np.int64)
        return TaskData(self._source, self._task, self.rows[chosen], self.labels[torch.from_numpy(chosen)])

    def join(self, *others: TaskData) -> TaskData:
        """These samples and those of others of the same stream, one after the other, as one set."""
        parts = (self, *others)
        assert all(part._source is self._source for part in parts), "parts of different streams"
        rows = np.concatenate([part.rows for part in parts])
        return TaskData(self._source, self._task, rows, torch.cat([part.labels for part in parts]))


class Batches:
    """A sized iterable over batches; every pass gives the same ones."""

    def __init__(self, fetch: _Fetch, chunks: list[list[int]]):
        self._fetch, self._chunks = fetch, chunks

    def __len__(self) -> int:
        return len(self._chunks)

    @property
    def decodes(self) -> bool:
        """Whether worker processes would help."""
        return not self._fetch.cheap

    def __iter__(self) -> Iterator[Batch]:
        for batch in profile.waited(self._loader):
            if isinstance(batch, Exception):
                raise batch
            interrupt.check()
            yield batch

    def after(self, count: int) -> Batches:
        """Those after the first `count`; the rest is not loaded."""
        return Batches(self._fetch, self._chunks[count:])

    def _loader(self) -> Iterator[Batch | Exception]:
        workers = min(self._fetch.useful_workers(), len(self._chunks))
        if workers == 0:
            return (self._fetch.__getitems__(chunk) for chunk in self._chunks)
        unused = torch.Generator()  # without one the loader would draw from the global generator
        loader = DataLoader(
            self._fetch,
            batch_sampler=self._chunks,
            num_workers=workers,
            collate_fn=_unchanged,
            generator=unused,
            pin_memory=self._fetch.pins,
            worker_init_fn=interrupt.leave_to_parent if parallel.world() > 1 else None,
        )
        return iter(loader)


def own_parts(chunks: list[list[int]]) -> list[list[int]]:
    """This rank's part of each chunk of positions. Where it is empty it has one position p as padding, written ~p."""
    if parallel.world() == 1:
        return chunks
    return [parallel.part(chunk) or [~chunk[0]] for chunk in chunks]


def real_and_padded(chunk: list[int]) -> tuple[list[int], torch.Tensor]:
    """(positions to compute, those of them that are no padding, int64) of a chunk of `own_parts`."""
    return [p if p >= 0 else ~p for p in chunk], torch.tensor([p for p in chunk if p >= 0], dtype=torch.int64)


def _unchanged(batch: Any) -> Any:
    return batch


class _Fetch(torch.utils.data.Dataset):
    """Builds whole batches, in the worker process where there are any."""

    def __init__(self, source: _Source, rows: np.ndarray, labels: torch.Tensor, base: int, augment: bool):
        self.source, self.rows, self.labels, self.base = source, rows, labels, base
        self.transform = source.train if augment else source.test
        self.cheap = isinstance(source.images, ImageArray) and self.transform.batched
        # page-locked memory: copies to a GPU then run beside its work; anywhere else it only costs
        self.pins = source.device is not None and source.device.type == "cuda"

    def useful_workers(self) -> int:
        return 0 if self.cheap else self.source.num_workers

    def __getitems__(self, index: list[int]) -> Batch | Exception:
        """One batch; a damaged file's error is returned, since a worker would wrap its message in a traceback."""
        index, own = real_and_padded(index)
        rows = self.rows[index]
        images: torch.Tensor | list[torch.Tensor]
        try:
            if isinstance(self.source.images, ImageArray):
                # one image after the other is faster transformed on the CPU: a GPU would start a kernel for each step of each
                stored = self.source.pixels if self.cheap else self.source.images.images
                images = stored[torch.from_numpy(rows).to(stored.device)]
            else:
                images = [self.source.images.image(row) for row in rows.tolist()]
        except (ValueError, OSError) as error:
            return error
        labels = self.labels[torch.tensor(index)]
        return self.transform(images, transforms.sample_seeds(self.base, rows)), labels, own


@dataclass(frozen=True)
class Task:
    """What a learner gets: training data only.

    `first` classes were seen before, `total` are seen with this task; `class_ids` are the new classes' original ids.
    `past` holds the training data of earlier tasks and is empty unless the method declares that it uses them. `test` is
    None unless a setting asks to select on test data, which spoils the result and is told in it."""

    index: int
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
        increment: int,
        seed: int,
        image_size: int,
        class_order_seed: int | None = None,
        class_order: Sequence[int] | None = None,
        shuffle: bool = True,
        num_workers: int = 0,
        device: torch.device | None = None,
    ):
        """`seed` is the run's; the class order is `class_order`, or follows `class_order_seed` if given. `device`: where
        batches will go; what fits a GPU lives there. Raises ValueError for an impossible split."""
        count = len(dataset.class_names)
        self.sizes = task_sizes(count, init_cls, increment)
        order_seed = seed if class_order_seed is None else class_order_seed
        self.order = drawn_order(count, order_seed, shuffle) if class_order is None else list(class_order)
        if sorted(self.order) != list(range(count)):
            raise ValueError(f"class_order: each of the {count} classes 0..{count - 1} is expected once")
        self.class_names = [dataset.class_names[c] for c in self.order]
        pair = transforms.build(dataset.transforms, image_size)
        how = (*pair, seed, num_workers, f"{dataset.name} {dataset.transforms} {image_size}", device)
        self._test = _Source(dataset.test, *how)
        self._train = _Source(dataset.train, *how, before=len(dataset.test))
        for part, source in (("training", self._train), ("test", self._test)):
            absent = set(range(count)) - set(np.unique(source.images.labels).tolist())
            if absent:
                names = ", ".join(dataset.class_names[c] for c in sorted(absent)[:10])
                raise ValueError(
                    f"dataset {dataset.name}: no {part} images for {len(absent)} of {count} classes: {names}"
                )

    @classmethod
    def of(
        cls, cfg: Experiment, dataset: Dataset, seed: int, image_size: int, device: torch.device | None = None
    ) -> TaskStream:
        """The tasks that a run's settings ask for. With num_workers "auto" no process decodes until `measure_workers`."""
        names = ("init_cls", "increment", "class_order_seed", "class_order", "shuffle")
        settings = {name: getattr(cfg, name) for name in names}
        workers = 0 if cfg.num_workers == "auto" else cfg.num_workers
        return cls(dataset, seed=seed, image_size=image_size, num_workers=workers, device=device, **settings)

    def measure_workers(self, cfg: Experiment, model: torch.nn.Module, device: torch.device) -> str | None:
        """With num_workers "auto": takes as many as loading and a pass of `model` ask for, and says so."""
        if cfg.num_workers != "auto":
            return None
        count, text = loading.measured_workers(self.task(0).train, cfg.batch_size, model, device)
        self._train, self._test = (replace(source, num_workers=count) for source in (self._train, self._test))
        return text

    def __len__(self) -> int:
        return len(self.sizes)

    def task(self, index: int, with_past: bool = False, with_test: bool = False) -> Task:
        """Task `index` with its training data; on request those of the tasks before it, or all test data so far."""
        span = self._span(index)
        past = tuple(self._data(self._train, earlier, index) for earlier in range(index)) if with_past else ()
        train = self._data(self._train, index, index)
        test = self.test(0).join(*(self.test(k) for k in range(1, index + 1))) if with_test else None
        return Task(index, span.start, span.stop, tuple(self.order[span.start : span.stop]), train, past, test)

    def test(self, index: int) -> TaskData:
        """The test samples of task `index`'s own classes. Only the runner calls this, never a learner."""
        return self._data(self._test, index, index)

    def _span(self, index: int) -> range:
        if not 0 <= index < len(self.sizes):
            raise IndexError(f"task {index} of {len(self.sizes)}")
        first = sum(self.sizes[:index])
        return range(first, first + self.sizes[index])

    def _data(self, source: _Source, index: int, used_in: int) -> TaskData:
        """Samples of task `index`'s classes in the data set's order, with the random draws of task `used_in`."""
        arrival = np.full(len(self.order), -1, dtype=np.int64)
        arrival[[self.order[k] for k in self._span(index)]] = list(self._span(index))
        labels = arrival[source.images.labels]
        rows = np.flatnonzero(labels >= 0)
        return TaskData(source, used_in, rows, torch.from_numpy(labels[rows]))
