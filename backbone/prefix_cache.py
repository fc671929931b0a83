"""Stores the frozen prefix's activations of images, so that they are computed once for each image and not in every pass.

A pass over data then begins with Activations (backbone/vit.py) at the first layer that still learns. Entries are addressed by
the row of the data set, so subsets, splits and batches of any size share them. Their key is a hash of everything that decides
them: the images and their transform, the weights, the slots below, layer and precision. If one of these changes, so does the
key, and entries under the old key are dropped: nobody has to invalidate anything, and deleting the files is always safe.

Values do not depend on the order of requests, nor on where a run was interrupted: un-augmented images are always
computed in the same groups, CHUNK of one class, and what is stored is planned from sizes alone. They differ from a pass that
starts at the images by rounding, since the batches differ. In a run of several processes each computes some of the groups
and sends them to all, so that every process stores what a single one would. Shapes: B batch, N tokens, D width.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from backbone.blocks import HALVES, BlockSlot
from backbone.rowstore import RowStore
from backbone.timm_vit import timm_version
from backbone.vit import Activations, SlottedViT
from utils.data.batches import TaskData, shards_of, split_padding
from utils.process import parallel, stopwatch

Storage = Literal["memory", "disk", "off"]
CHUNK = 256  # images of a class that are computed together
GIB = 2**30
FORMAT = 2  # of the files: another number and they are not read
Batch = tuple[Tensor | Activations, Tensor, Tensor]


class PrefixCache:
    """Activations of one backbone's prefix: at most `limit` bytes, in the memory of its device or as files under `folder`.

    `say` is called once for each kind of images that does not fit. `limit` is the total of `shared_by` caches like this one."""

    def __init__(
        self,
        backbone: SlottedViT,
        storage: Storage,
        limit: float,
        folder: Path | None = None,
        say: Callable[[str], None] = lambda text: None,
        shared_by: int = 1,
    ):
        assert storage != "disk" or folder is not None, "files need a folder"
        self.backbone, self.storage, self.limit, self.say = backbone, storage, limit, say
        self.shared_by = shared_by
        self.folder = folder if storage == "disk" else None
        self._stores: dict[str, RowStore] = {}
        self._scope = ""
        self._hashed: tuple[list[Any], str] | None = None
        self._said: set[str] = set()
        self._views: set[str] = set()  # keys of the current task's augmented views

    def batches(
        self,
        data: TaskData,
        size: int,
        layer: int,
        *,
        epoch: int = 0,
        draw: str = "train",
        augment: bool = True,
        shuffle: bool = True,
        views: int = 0,
        shard: bool = False,
    ) -> Iterable[Batch]:
        """As `TaskData.batches`, but with Activations at `layer` instead of images where those are stored.

        With `views` n > 0 augmented images are not drawn anew in every epoch: epoch e shows view e mod n of each. With 0
        augmented images are computed in every pass and not stored."""
        view = (epoch % views, "views") if augment and views else (epoch, draw)
        draws: dict[str, Any] = {"epoch": view[0], "draw": view[1], "augment": augment}
        entry = None if augment and not views else self._store(data, layer, views if augment else 0, draws)
        if entry is None and not (augment and views):
            return data.batches(size, epoch=epoch, draw=draw, augment=augment, shuffle=shuffle, shard=shard)
        order = data.order(epoch, draw) if shuffle else torch.arange(len(data))
        # torch splits nothing into one empty part
        chunks = [chunk.tolist() for chunk in order.split(size) if len(chunk)]
        if entry is None:
            return data.at(chunks, **draws, shard=shard)
        store, tensors = entry
        if not self._fill(store, data, layer, tensors, draws):
            return data.at(chunks, **draws, shard=shard)
        return self._read(store, data, layer, shards_of(chunks) if shard else chunks)

    def keeps(self, data: TaskData, layer: int) -> bool:
        """Whether the activations of this data set's un-augmented images are stored at `layer`."""
        return self._store(data, layer, 0, {"augment": False}) is not None

    def forget_views(self) -> None:
        """Drops the augmented views: those of a task are of no use after it."""
        for key in self._views:
            self._stores.pop(key, None)
            if self.folder is not None:
                shutil.rmtree(self.folder / self._scope / key, ignore_errors=True)
        self._views.clear()

    # What is stored, and under which key -----------------------------------------------------------------------------

    def _store(self, data: TaskData, layer: int, views: int, draws: dict[str, Any]) -> tuple[RowStore, int] | None:
        """The store of a request and how many tensors its Activations have (2: inside the block); None if nothing is stored."""
        backbone = self.backbone
        if self.storage == "off" or layer == 0 or self._random_below(layer):
            return None
        finished = layer == backbone.depth
        shape = (1 if finished else backbone.tokens, backbone.width)
        dtype = next(backbone.vit.parameters()).dtype
        most = 1 if finished or isinstance(backbone.slots[str(layer)], BlockSlot) else 2
        row = shape[0] * shape[1] * dtype.itemsize
        tensors = self._plan(data, views, most, row)
        if not tensors:
            return None
        self._enter(layer, dtype)
        seed = data.draws(draws["epoch"], draws["draw"]) if draws["augment"] else 0
        key = _hash(data.source.digest, seed, tensors)
        if draws["augment"]:
            self._views.add(key)
        if key not in self._stores:
            folder = None if self.folder is None else self.folder / self._scope / key
            device = next(backbone.vit.parameters()).device
            self._stores[key] = RowStore(len(data.source.images), (tensors, *shape), dtype, folder, device)
            for complaint in self._stores[key].complaints:
                self._say_once(complaint)
        return self._stores[key], tensors

    def _plan(self, data: TaskData, views: int, most: int, row: int) -> int:
        """How many tensors of `row` bytes are stored for each image, 0 to `most`: from sizes alone, test images first, then all
        training images, then the views of a task."""
        left, source = self.limit / self.shared_by, data.source
        wanted = [source.before, len(source.images)] if source.before else [len(source.images)]
        wanted += [views * len(data)] if views else []
        tensors = 0  # of the last kind of images in `wanted`, which the request is for
        for count in wanted:
            tensors = max((n for n in range(1, most + 1) if n * count * row <= left), default=0)
            left -= tensors * count * row
        if not tensors:
            what = f"{views} views of {len(data)} training" if views else "training" if source.before else "test"
            needed = sum(wanted) * row * self.shared_by / GIB
            self._say_once(
                f"prefix activations of {what} images are not stored: {needed:.2f} GiB in all are above "
                f"prefix_cache_gb {self.limit / GIB:g}; they are computed in every pass"
            )
        return tensors

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.say(text)

    def _random_below(self, layer: int) -> bool:
        """Whether a slot below draws random numbers, as dropout in training does: then nothing is the same twice."""
        return any(
            m.training and (m.p if isinstance(m, nn.Dropout) else getattr(m, "dropout", 0))
            for slot in self._below(layer)
            for m in slot.modules()
        )

    def _below(self, layer: int) -> list[nn.Module]:
        return [self.backbone.slots[name] for name in sorted(self.backbone.slots, key=int) if int(name) < layer]

    def _enter(self, layer: int, dtype: torch.dtype) -> None:
        """Drops what was stored under another key of weights, slots below, layer and precision."""
        device = next(self.backbone.vit.parameters()).device.type
        around = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
        precision = (self.backbone.precision, around, self.backbone.halves is HALVES)
        versions = (FORMAT, torch.__version__, timm_version)
        scope = _hash(self._weights(layer), layer, dtype, precision, device, versions)
        if scope == self._scope:
            return
        self._scope = scope
        self._stores.clear()
        self._views.clear()
        if self.folder is not None and self.folder.is_dir():
            for other in self.folder.iterdir():
                if other.name != scope:
                    shutil.rmtree(other, ignore_errors=True)

    def _weights(self, layer: int) -> str:
        """Hash of the frozen model and the slots below `layer`, computed anew only if a tensor was written to."""
        backbone, below = self.backbone, self._below(layer)
        assert not any(p.requires_grad for slot in below for p in slot.parameters()), (
            f"a slot below {layer} still learns"
        )
        modules = [backbone.vit, *below]
        state = [(n, t) for i, m in enumerate(modules) for n, t in _state(m, str(i))]
        state += [("mean", backbone.mean), ("std", backbone.std)]
        facts = [backbone.normalises, *(_facts(m) for m in below)]
        seen = [repr(facts), *((name, _Written(tensor)) for name, tensor in state)]
        if self._hashed is None or self._hashed[0] != seen:
            digest = hashlib.sha256(repr(facts).encode())
            for name, tensor in state:
                digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            self._hashed = (seen, digest.hexdigest())
        return self._hashed[1]

    # Filling and reading -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _fill(self, store: RowStore, data: TaskData, layer: int, tensors: int, draws: dict[str, Any]) -> bool:
        """Computes what is missing for `data`. Of un-augmented images whole groups of a class, always the same ones.

        Returns False, with a message, if it cannot be stored. What one rank misses, after a killed run, all compute again."""
        missing = data.rows[parallel.total(torch.from_numpy(~store.has(data.rows)).to(torch.int64)).numpy() > 0]
        if not len(missing):
            return True
        if draws["augment"]:  # the task's images, in its order
            groups = [missing[i : i + CHUNK] for i in range(0, len(missing), CHUNK)]
        else:
            labels, wanted = data.source.images.labels, np.zeros(len(data.source.images), dtype=bool)
            wanted[missing] = True
            classes = [np.flatnonzero(labels == label) for label in np.unique(labels[missing])]
            groups = [rows[i : i + CHUNK] for rows in classes for i in range(0, len(rows), CHUNK)]
            groups = [rows for rows in groups if wanted[rows].any()]
        rows, ends = np.concatenate(groups), np.cumsum([len(g) for g in groups])
        positions = [list(range(end - len(g), end)) for end, g in zip(ends.tolist(), groups, strict=True)]
        device = next(self.backbone.vit.parameters()).device

        def values() -> Iterator[Tensor]:
            ranks, turns = parallel.world(), range(0, len(positions), parallel.world())
            # a rank without a group in the last turn computes one image, of which nothing is taken
            of_rank = [positions[t + parallel.rank()] if t + parallel.rank() < len(positions) else [0] for t in turns]
            for turn, (images, *_) in zip(turns, data.at_rows(rows).at(of_rank, **draws), strict=True):
                with stopwatch.section("data"):
                    images = images.to(device, non_blocking=True)
                prefix = self.backbone.prefix(images, layer, inside=tensors == 2)
                stacked = torch.stack([prefix.x] if prefix.after is None else [prefix.x, prefix.after], dim=1)
                sizes = [len(group) for group in positions[turn : turn + ranks]]
                yield parallel.gather(stacked, [*sizes, *[0] * (ranks - len(sizes))])

        computed, failed = values(), None
        try:
            store.put(rows, computed)
        except OSError as error:
            failed = error
            if parallel.world() > 1:
                for _ in computed:  # the other ranks wait for this one's groups
                    pass
        if parallel.any_rank(failed is not None):
            self._say_once(
                f"no more of the prefix is stored, its files cannot be written: {failed or 'another process failed'}"
            )
            if parallel.world() > 1:
                self.storage = "off"  # all ranks store the same
            return False
        return True

    def _read(self, store: RowStore, data: TaskData, layer: int, chunks: list[list[int]]) -> Iterator[Batch]:
        for chunk in chunks:
            places, index = split_padding(chunk)
            with stopwatch.section("prefix", len(chunk)):
                values = store.get(data.rows[places])
            yield Activations(layer, *values.unbind(dim=1)), data.labels[torch.tensor(places)], index


class _Written:
    """Equal to another if both stand for the same tensor and nothing was written to it in between."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.mark = (
            tensor,
            (tensor.data_ptr(), tensor._version),
        )  # referenced, so that no other tensor gets its address

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Written) and self.tensor is other.tensor and self.mark == other.mark


def _state(module: nn.Module, prefix: str) -> list[tuple[str, Tensor]]:
    named = [*module.named_parameters(), *module.named_buffers()]
    return [(f"{prefix}.{name}", tensor) for name, tensor in named]


def _facts(module: nn.Module) -> list[tuple[str, dict[str, str]]]:
    """What else decides a module's function: the class and the plain attributes of all its submodules."""
    plain = (bool, int, float, str, tuple, type(None))
    return [
        (
            type(part).__name__,
            {
                k: repr(v)
                for k, v in sorted(vars(part).items())
                if k[0] != "_" and k != "training" and isinstance(v, plain)
            },
        )
        for part in module.modules()
    ]


def _hash(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
