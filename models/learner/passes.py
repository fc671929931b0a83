"""Passes over images: from the images or from cached activations, in one process or several.

Shapes: n images, B batch, b shard of a batch on one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from backbone.prefix_cache import GIB, PrefixCache, Storage
from backbone.vit import SlottedViT
from utils.data.batches import TaskData
from utils.process import interrupt, parallel, stopwatch
from utils.run.log import RunLog

T = TypeVar("T")


class Passes(nn.Module):
    """The part of a learner that reads data. A method calls `outputs`; training reads through `fit`.

    With several processes (utils/process/parallel.py) each rank computes a shard of every batch and all ranks get the
    whole result. Everything outside a pass is computed identically on every rank."""

    trains_backbone: bool = False
    cfg: Any
    log: RunLog
    backbone: SlottedViT
    _cache: PrefixCache | None = None
    shard_sizes: Sequence[int] = (0,)  # [W] images of each rank in the step in progress

    @property
    def device(self) -> Any:
        """Where the backbone computes."""
        return next(self.backbone.vit.parameters()).device

    @property
    def prefix_layer(self) -> int:
        """The layer below which nothing changes any more, where cached passes start: by default the lowest slot's."""
        return 0 if self.trains_backbone else min(map(int, self.backbone.slots), default=self.backbone.depth)

    def outputs(self, f: Callable[[Any], T], data: TaskData, size: int, **how: Any) -> Iterator[tuple[T, Tensor]]:
        """(f(images), labels) of every batch of at most `size` images, for passes that do not train.

        The images are on the device, or Activations in their place where they are cached; the backbone takes either.
        f gives a tensor [B, ...], or a list, tuple or dict of them, with one row a sample. `how`: `epoch` and `draw` name
        the random draws; `augment` (True) and `shuffle` (True); `keep` False caches nothing of this pass."""
        device = self.device
        for images, labels, index in self._batches(data, size, shard=True, **how):
            with stopwatch.section("data"):
                images = images.to(device, non_blocking=True)
            result = f(images)
            if parallel.world() > 1:
                interrupt.raise_if_requested(together=True)
                result, labels = parallel.gather((result, labels), parallel.counts(len(index)))
            yield result, labels

    def averaged(self, x: Tensor) -> Tensor:
        """In `after_step`: the mean over the batch, from a mean over this rank's shard of it."""
        return parallel.mean(x, self.shard_sizes)

    def summed(self, x: Tensor) -> Tensor:
        """In `after_step`: the sum over the batch, from a sum over this rank's shard of it."""
        return x if parallel.world() == 1 else parallel.total(x * (self.shard_sizes[parallel.rank()] > 0))

    # What the package itself uses ------------------------------------------------------------------------------------

    def _batches(
        self,
        data: TaskData,
        size: int,
        *,
        epoch: int = 0,
        draw: str = "train",
        augment: bool = True,
        shuffle: bool = True,
        shard: bool = False,
        keep: bool = True,
    ) -> Iterable[tuple[Any, Tensor, Tensor]]:
        """(images, labels, positions) as `data.batches`; Activations replace images that are cached (`prefix_cache`).

        Augmented images are fresh in each epoch, or with `train_views` the view of that epoch. `keep` false: images, and
        nothing is cached. `shard`: of each batch this rank's shard [b]. A shard without images is one image as padding,
        with no positions."""
        if not keep or not isinstance(data, TaskData):
            how = {"shard": True} if shard and parallel.world() > 1 else {}
            return data.batches(size, epoch=epoch, draw=draw, augment=augment, shuffle=shuffle, **how)
        if self._cache is None:
            self._cache = self._new_cache(self.backbone, "cache")
        with stopwatch.section("prefix"):  # what is missing is computed here
            return self._cache.batches(
                data,
                size,
                self.prefix_layer,
                epoch=epoch,
                draw=draw,
                augment=augment,
                shuffle=shuffle,
                views=getattr(self.cfg, "train_views", 0),
                shard=shard and parallel.world() > 1,
            )

    def _new_cache(self, backbone: SlottedViT, name: str, shared_by: int = 1) -> PrefixCache:
        """A cache as the settings ask for it; its files would lie in the run folder's `name`."""
        cfg, log = self.cfg, self.log
        if log is None:  # a finished run is read, and its folder stays as it is
            storage: Storage = "off" if cfg.prefix_cache == "off" else "memory"
            return PrefixCache(backbone, storage, cfg.prefix_cache_gb * GIB, shared_by=shared_by)
        # a folder for each rank: a cache removes what it does not know from its folder
        folder = log.folder / (name if parallel.is_first() else f"{name}_rank_{parallel.rank()}")
        return PrefixCache(
            backbone, cfg.prefix_cache, cfg.prefix_cache_gb * GIB, folder, say=log.info, shared_by=shared_by
        )
