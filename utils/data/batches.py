"""The samples of a task as seeded batches: order, augmentation, loader processes and shards for several ranks.

Labels are numbered in the order in which classes arrive: the first task has 0 .. init_cls - 1, the next one continues.
Letters: N samples, B samples of a batch, S side of the network's input.
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

from utils.data import transforms, workers
from utils.data.dataset import ImageSet
from utils.data.images import ImageArray
from utils.process import interrupt, parallel, stopwatch
from utils.process.seeds import named_generator, named_seed

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Source:
    """Images and how they become input: one for all training data of a run, one for all its test data."""

    images: ImageSet
    train: transforms.Transform
    test: transforms.Transform
    seed: int
    num_workers: int
    inputs: str = ""  # names the data set, the transforms and the input size; part of `digest`
    device: torch.device | None = None  # where batches are sent
    before: int = 0  # for training images: the number of test images, which the prefix cache stores first

    @cached_property
    def pixels(self) -> torch.Tensor:
        """The images of an ImageArray, uint8 [N, 3, H, W], on the device if they fit there."""
        assert isinstance(self.images, ImageArray)
        images = self.images.images
        return images.to(self.device) if workers.fits(images.nbytes, self.device) else images

    @cached_property
    def digest(self) -> str:
        """16 hex digits over images, labels and transforms; of image files their paths, sizes and times of change."""
        digest = hashlib.blake2b(self.inputs.encode(), digest_size=8)
        digest.update(np.ascontiguousarray(self.images.labels).data)
        if isinstance(self.images, ImageArray):
            digest.update(self.images.images.contiguous().numpy().data)
        for path in getattr(self.images, "paths", ()):
            facts = os.stat(path)
            digest.update(os.fsencode(f"{path}\0{facts.st_size}\0{facts.st_mtime_ns}\0"))
        return digest.hexdigest()


class TaskData:
    """Samples of some classes. `labels` int64 [N] are class numbers in order of arrival; `rows` int64 [N] are the samples'
    rows in the data set."""

    def __init__(self, source: Source, task: int, rows: np.ndarray, labels: torch.Tensor):
        self._source, self._task = source, task
        self.rows, self.labels = rows, labels

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def source(self) -> Source:
        """The images these samples are rows of; the same object for all training data of a run."""
        return self._source

    def batches(
        self,
        batch_size: int,
        *,
        epoch: int = 0,
        draw: str = "train",
        augment: bool = True,
        shuffle: bool = True,
        shard: bool = False,
    ) -> Batches:
        """One pass over the samples; the last batch may be smaller. The result has a length and can be iterated again.

        Yields (images float32 [B, 3, S, S] in [0, 1], labels int64 [B], index int64 [B], the positions in this
        TaskData). The order depends on (seed, task, draw, epoch), a sample's augmentation on those and its row, so neither
        depends on the batch size or the number of workers. `draw` names the use, so that two uses in one epoch draw
        different numbers. `augment=False` applies the test transform, `shuffle=False` keeps the order of the data set.
        With `shard`, each batch has only this rank's shard (utils/process/parallel.py). In a batch with fewer samples than
        ranks, the ranks left over get one image as padding and an empty index.
        Raises ValueError if the batch size is below 1."""
        if batch_size < 1:
            raise ValueError(f"the batch size must be at least 1, got {batch_size}")
        order = self.order(epoch, draw) if shuffle else torch.arange(len(self))
        chunks = [chunk.tolist() for chunk in order.split(batch_size) if len(chunk)]
        return self.at(chunks, epoch=epoch, draw=draw, augment=augment, shard=shard)

    def at(
        self,
        chunks: list[list[int]],
        *,
        epoch: int = 0,
        draw: str = "train",
        augment: bool = True,
        shard: bool = False,
    ) -> Batches:
        """A batch for each list of positions in `chunks`; the other arguments are those of `batches`."""
        fetch = _Fetch(self._source, self.rows, self.labels, self.draws(epoch, draw), augment)
        if shard:
            chunks = shards_of(chunks)
        return Batches(fetch, chunks)

    def draws(self, epoch: int, draw: str) -> int:
        """The seed of the augmentation in a pass; together with a sample's row it determines the augmented image."""
        return named_seed(self._source.seed, "augment", self._task, draw, epoch)

    def order(self, epoch: int, draw: str) -> torch.Tensor:
        """The shuffled positions int64 [N] of the pass that `batches` makes."""
        return torch.randperm(len(self), generator=named_generator(self._source.seed, "order", self._task, draw, epoch))

    def split(self, ratio: float, draw: str) -> tuple[TaskData, TaskData]:
        """(the rest, the held-out samples): of every class a seeded share `ratio`, at least one sample, is held out.

        Both stay in the order of the data set. The draw for a class depends on (seed of the run, `draw`, class) alone, not on
        the other classes of the task.
        Raises ValueError if the ratio is not inside (0, 1) or a class has fewer than two samples."""
        if not 0 < ratio < 1:
            raise ValueError(f"the held-out share must lie between 0 and 1, got {ratio}")
        held_out = np.zeros(len(self), dtype=bool)
        for label in self.labels.unique().tolist():
            of_class = np.flatnonzero(self.labels.numpy() == label)
            if (size := len(of_class)) < 2:
                raise ValueError(f"class {label} of task {self._task} has {size} sample, too few to hold one out")
            count = min(max(round(ratio * size), 1), size - 1)
            generator = named_generator(self._source.seed, "split", draw, label)
            held_out[of_class[torch.randperm(size, generator=generator)[:count].numpy()]] = True
        return self.subset(np.flatnonzero(~held_out)), self.subset(np.flatnonzero(held_out))

    def at_rows(self, rows: np.ndarray) -> TaskData:
        """The samples at these rows of the same data set, without their labels: every label is -1."""
        return TaskData(self._source, self._task, rows, torch.full((len(rows),), -1))

    def subset(self, index: np.ndarray | torch.Tensor | Sequence[int]) -> TaskData:
        """The samples at these positions, in this order."""
        chosen = np.asarray(index, dtype=np.int64)
        return TaskData(self._source, self._task, self.rows[chosen], self.labels[torch.from_numpy(chosen)])

    def join(self, *others: TaskData) -> TaskData:
        """These samples, followed by those of `others`, which must come from the same source."""
        everything = (self, *others)
        assert all(data._source is self._source for data in everything), "data of different sources"
        rows = np.concatenate([data.rows for data in everything])
        return TaskData(self._source, self._task, rows, torch.cat([data.labels for data in everything]))


class Batches:
    """A sized iterable over batches; every iteration yields the same ones."""

    def __init__(self, fetch: _Fetch, chunks: list[list[int]]):
        self._fetch, self._chunks = fetch, chunks

    def __len__(self) -> int:
        return len(self._chunks)

    @property
    def decodes(self) -> bool:
        """Whether images are decoded or transformed one by one, so that loader processes would help."""
        return not self._fetch.cheap

    def __iter__(self) -> Iterator[Batch]:
        for batch in stopwatch.waited(self._loader):
            if isinstance(batch, Exception):
                raise batch
            interrupt.raise_if_requested()
            yield batch

    def after(self, count: int) -> Batches:
        """The batches after the first `count`, which are not loaded."""
        return Batches(self._fetch, self._chunks[count:])

    def _loader(self) -> Iterator[Batch | Exception]:
        processes = min(self._fetch.useful_workers(), len(self._chunks))
        if processes == 0:
            return (self._fetch.__getitems__(chunk) for chunk in self._chunks)
        unused = torch.Generator()  # without it the loader would draw from the global generator
        loader = DataLoader(
            self._fetch,
            batch_sampler=self._chunks,
            num_workers=processes,
            collate_fn=_unchanged,
            generator=unused,
            pin_memory=self._fetch.pins,
            worker_init_fn=interrupt.leave_to_parent if parallel.world() > 1 else None,
        )
        return iter(loader)


def shards_of(chunks: list[list[int]]) -> list[list[int]]:
    """This rank's shard of each list of positions. An empty shard gets one position p as padding, written ~p."""
    if parallel.world() == 1:
        return chunks
    return [parallel.shard(chunk) or [~chunk[0]] for chunk in chunks]


def split_padding(shard: list[int]) -> tuple[list[int], torch.Tensor]:
    """(positions to compute, the positions among them that are not padding, int64) of a shard of `shards_of`."""
    return [p if p >= 0 else ~p for p in shard], torch.tensor([p for p in shard if p >= 0], dtype=torch.int64)


def _unchanged(batch: Any) -> Any:
    return batch


class _Fetch(torch.utils.data.Dataset):
    """Builds whole batches, in loader processes if there are any."""

    def __init__(self, source: Source, rows: np.ndarray, labels: torch.Tensor, base: int, augment: bool):
        self.source, self.rows, self.labels, self.base = source, rows, labels, base
        self.transform = source.train if augment else source.test
        self.cheap = isinstance(source.images, ImageArray) and self.transform.batched
        # page-locked memory lets copies to a GPU overlap with its work; without a GPU it only costs time
        self.pins = source.device is not None and source.device.type == "cuda"

    def useful_workers(self) -> int:
        return 0 if self.cheap else self.source.num_workers

    def __getitems__(self, index: list[int]) -> Batch | Exception:
        """One batch. The error of a damaged file is returned, not raised: a loader process would wrap it in a traceback."""
        index, real = split_padding(index)
        rows = self.rows[index]
        images: torch.Tensor | list[torch.Tensor]
        try:
            if isinstance(self.source.images, ImageArray):
                # images transformed one by one stay on the CPU: a GPU would start a kernel for every step of every image
                stored = self.source.pixels if self.cheap else self.source.images.images
                images = stored[torch.from_numpy(rows).to(stored.device)]
            else:
                images = [self.source.images.image(row) for row in rows.tolist()]
        except (ValueError, OSError) as error:
            return error
        labels = self.labels[torch.tensor(index)]
        return self.transform(images, transforms.sample_seeds(self.base, rows)), labels, real
