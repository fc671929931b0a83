"""What APER and EASE share: predictions from several feature spaces of one backbone, which stay as they are once learned.

So un-augmented images pass each space once in a run, and only finished features are stored (`prefix_cache`): after task t of T
EASE makes one pass over earlier test images, not t. Shapes: B batch, D width, S subspaces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from backbone.heads.subspaces import PLAIN, SubspaceSlot, features_in
from backbone.prefix_cache import PrefixCache
from backbone.vit import Activations, SlottedViT
from models.learner.base import Learner as Base
from utils.data.batches import TaskData
from utils.process import parallel, stopwatch

Space = tuple[SlottedViT, PrefixCache]


class SpacesLearner(Base):
    """A learner whose slots are SubspaceSlots; it says which `subspaces` there are."""

    trains_features: ClassVar[bool] = False  # a subspace never changes after its task: means in it do not age

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._spaces: dict[int, Space] = {}

    def subspaces(self) -> list[int]:
        """Numbers of the adapter sets, or PLAIN, in the order of their features."""
        raise TypeError(f"{type(self).__name__} does not say which subspaces it has")

    def most_subspaces(self) -> int:
        """How many there will be at the end of the run, which share `prefix_cache_gb`."""
        return len(self.subspaces())

    def slots(self) -> list[SubspaceSlot]:
        return [slot for slot in self.backbone.slots.values() if isinstance(slot, SubspaceSlot)]

    def features(self, images: Tensor | Activations) -> Tensor:
        """Features in all subspaces side by side, [B, S D]."""
        if isinstance(images, Activations) and images.layer == self.backbone.depth:
            return images.x[:, 0]
        return features_in(self.backbone, images, self.subspaces())

    def _batches(
        self, data: TaskData, size: int, *, augment: bool = True, keep: bool = True, **how: Any
    ) -> Iterable[tuple[Any, Tensor, Tensor]]:
        """Like the base's. Without augmentation: Activations with all subspaces' features, if each can be cached."""
        learning = any(p.requires_grad for slot in self.slots() for p in slot.parameters())
        if not augment and keep and not learning and isinstance(data, TaskData) and self.cfg.prefix_cache != "off":
            spaces = [self._space(number) for number in self.subspaces()]
            if all(cache.keeps(data, self.backbone.depth) for _, cache in spaces):
                return self._finished(spaces, data, size, **how)
        return super()._batches(data, size, augment=augment, keep=keep, **how)

    def _space(self, number: int) -> Space:
        """The backbone with this adapter set alone in its slots, and the cache of its features."""
        if number not in self._spaces:
            alone = self.backbone.without_slots()
            if number != PLAIN:
                for layer, slot in enumerate(self.slots()):
                    alone.fill(layer, slot.adapters[number])
            name = f"cache_{'plain' if number == PLAIN else number}"
            self._spaces[number] = alone, self._new_cache(alone, name, shared_by=self.most_subspaces())
        return self._spaces[number]

    def _finished(
        self, spaces: list[Space], data: TaskData, size: int, *, shard: bool = False, **how: Any
    ) -> Iterator[tuple[Activations, Tensor, Tensor]]:
        depth, device = self.backbone.depth, self.backbone.mean.device
        with stopwatch.section("prefix"):  # computes the features that are not cached yet
            several = shard and parallel.world() > 1
            cached = [cache.batches(data, size, depth, augment=False, shard=several, **how) for _, cache in spaces]
        for batches in zip(*cached, strict=True):
            # activations at `depth` are passed on unchanged; images, where files could not be written, pass the network
            features = [alone(images.to(device)) for (alone, _), (images, *_) in zip(spaces, batches, strict=True)]
            _, labels, positions = batches[0]
            yield Activations(depth, torch.cat(features, dim=1).unsqueeze(1)), labels, positions
