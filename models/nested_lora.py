"""Nested LoRA, the chain: one adapter a layer that learns on two time scales, slow and fast, merged at the end of a task.

Design of the public repository motsun1/Nested-LoRA, with its faults left out: skipped slow steps are really skipped, fast
starts anew so that it can learn, and the default merge keeps the function. Each of its choices is a key. Shapes: B batch,
D width, C classes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from backbone.heads.heads import LinearHead
from models.families import nested
from models.learner.base import Learner as Base
from models.learner.fit import fit
from models.learner.groups import Group
from models.learner.layers import layer_range, slot_inputs
from models.learner.losses import Loss, cross_entropy_among, rows_of
from models.settings.nested import SharedAdapterSettings
from utils.data.tasks import Task


class Settings(SharedAdapterSettings):
    """Its keys are all shared: rates, time scales and merging are in models/settings/nested.py."""


class Learner(Base):
    """One nested adapter in each of the layers, one linear head."""

    cfg: Settings

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.layers = layer_range(self.cfg.adapt_start_layer, self.cfg.adapt_end_layer, self.backbone)
        nested.fill(self, self.layers)
        self.head = self.initialise("head", LinearHead(self.backbone.width, self.num_classes))

    # Learning ------------------------------------------------------------------------------------------------------

    def trainable(self) -> list[Group]:
        adapters = list(nested.nested_of(self, self.layers).values())
        head = Group("head", list(self.head.parameters()), self.cfg.rate_head)
        return [*nested.nested_groups(self.cfg, adapters), head]

    def learn(self, task: Task) -> None:
        """Trains slow and fast together, at separate rates, on the cross-entropy among the task's classes."""
        self.seen = task.total
        for adapter in nested.nested_of(self, self.layers).values():
            adapter.use("combined")

        def step(images: Tensor, labels: Tensor) -> Loss:
            return cross_entropy_among(self.head(self.backbone(images)), labels, task.first, task.total)

        self.train()
        rows = [] if self.cfg.decay_other_rows else rows_of(task, self.head)
        fit(self, task, step, self.trainable(), phase="func", epochs=self.cfg.epochs, rows=rows)

    def consolidate(self, task: Task) -> None:
        """Merges fast into slow in every layer where it is due, refits the head on request, and sets what is evaluated."""
        inputs = slot_inputs(self, task, self.layers)
        merges = {
            layer: nested.merge(self, task, f"layers.{layer}", adapter, inputs[layer], where={"layer": layer})
            for layer, adapter in nested.nested_of(self, self.layers).items()
        }
        nested.log_merges(self, task, merges)
        self._show()
        if self.cfg.head_recalibration:
            nested.recalibrate(self, task, self.cfg.epochs)
        super().consolidate(task)

    def _show(self) -> None:
        for adapter in nested.nested_of(self, self.layers).values():
            adapter.use(self.cfg.nested_lora_eval)

    # Prediction is the base's; bookkeeping -------------------------------------------------------------------------

    def structure(self) -> dict[str, Any]:
        return {**super().structure(), "ranks": nested.ranks(self, self.layers)}

    def restore(self, structure: dict[str, Any]) -> None:
        super().restore(structure)
        nested.resize(self, self.layers, structure["ranks"])
        self._show()
