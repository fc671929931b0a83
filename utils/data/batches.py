"""Cuts a data set into a stream of tasks with new classes each, and feeds a task's samples in seeded batches.

Labels are renumbered in the order in which classes arrive: the first task has 0 .. init_cls - 1, the next follows on.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from utils.data import transforms
from utils.data import workers as loading
from utils.data.dataset import ImageSet
from utils.data.images import ImageArray
from utils.process import interrupt, parallel, stopwatch
from utils.process.seeds import named_generator, named_seed

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


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
        draw: str = "train",
        augment: bool = True,
        shuffle: bool = True,
        part: bool = False,
    ) -> Batches:
        """One pass over the samples; the last batch may be smaller. The result has a length and can be run through
        again.

        Yields (images float32 [B, 3, S, S] in [0, 1], labels int64 [B], index int64 [B], the positions in this
        TaskData). The order comes from (seed, task, draw, epoch), a sample's augmentation from those and its row, so
        neither depends on the batch size or the number of workers. `draw` names the use, so that two uses of one
        epoch draw differently. `augment=False` gives the test transform, `shuffle=False` the order of the data set.
        `part`: of each batch only what this rank computes, see utils/process/parallel.py. Where a batch has fewer samples than
        there are ranks, some get one image as padding, and an empty index with it."""
        if batch_size < 1:
            raise ValueError(f"the batch size must be at least 1, got {batch_size}")
        order = self.order(epoch, draw) if shuffle else torch.arange(len(self))
        chunks = [chunk.tolist() for chunk in order.split(batch_size) if len(chunk)]
        return self.at(chunks, epoch=epoch, draw=draw, augment=augment, part=part)

    def at(
        self,
        chunks: list[list[int]],
        *,
        epoch: int = 0,
        draw: str = "train",
        augment: bool = True,
        part: bool = False,
    ) -> Batches:
        """Batches of the samples at these positions, with the augmentation that `draw` and `epoch` draw."""
        fetch = _Fetch(self._source, self.rows, self.labels, self.draws(epoch, draw), augment)
        if part:
            chunks = own_parts(chunks)
        return Batches(fetch, chunks)

    def draws(self, epoch: int, draw: str) -> int:
        """The seed of the augmentation that `draw` and `epoch` draw; with a sample's row it decides the image."""
        return named_seed(self._source.seed, "augment", self._task, draw, epoch)

    def order(self, epoch: int, draw: str) -> torch.Tensor:
        """The shuffled positions int64 [N] of one pass, as `batches` takes them."""
        return torch.randperm(len(self), generator=named_generator(self._source.seed, "order", self._task, draw, epoch))

    def split(self, ratio: float, draw: str) -> tuple[TaskData, TaskData]:
        """(kept, held out): of every class a seeded share `ratio`, rounded but at least one sample, is held out.

        Both keep the data set's order. A class is split by its own draw from (the run's seed, `draw`, class), the same
        whatever else is in the task.
        Raises ValueError if the ratio is not inside (0, 1) or a class has fewer than two samples."""
        if not 0 < ratio < 1:
            raise ValueError(f"the held-out share must lie between 0 and 1, got {ratio}")
        held = np.zeros(len(self), dtype=bool)
        for label in self.labels.unique().tolist():
            of_class = np.flatnonzero(self.labels.numpy() == label)
            if (size := len(of_class)) < 2:
                raise ValueError(f"class {label} of task {self._task} has {size} sample, too few to hold one out")
            count = min(max(round(ratio * size), 1), size - 1)
            generator = named_generator(self._source.seed, "split", draw, label)
            held[of_class[torch.randperm(size, generator=generator)[:count].numpy()]] = True
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
        for batch in stopwatch.waited(self._loader):
            if isinstance(batch, Exception):
                raise batch
            interrupt.raise_if_requested()
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
    return [parallel.shard(chunk) or [~chunk[0]] for chunk in chunks]


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
