"""APER with adapters: class means of the frozen model's features beside those of one adapted to the first task.

Zhou et al., IJCV 2024, "Revisiting Class-Incremental Learning with Pre-Trained Models: Generalizability and Adaptivity are
All You Need" (arXiv 2303.07338), its adapter variant; formerly ADAM. The first task trains an adapter in every layer with a
cosine head that is then dropped; later tasks only add class means. tests/contract/parity holds it to LAMDA-PILOT's code.
Shapes: B batch, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import Field

from backbone.adapters.adapter import Adapter
from backbone.heads.heads import StatisticsHead
from backbone.heads.subspaces import PLAIN, SubspaceSlot
from models.families.sessions import planned_once, train_session
from models.families.spaces import SpacesLearner
from models.learner.new_heads import Statistics, statistics_head
from models.settings.sessions import SESSION_KEYS, SessionSettings
from utils.data.tasks import Task


class Settings(SessionSettings):
    """LAMDA-PILOT's keys. Nothing differs from its code; the adapter's factor and dropout, fixed there, are keys."""

    tuned_epoch: int = Field(20, ge=0, description="epochs of the first task; 0: nothing is adapted, as SimpleCIL")
    head: Literal["ncm", "ridge", "lda"] = Field(
        "ncm",
        description="what predicts from both models' features, concatenated: the nearest class mean, which is APER; or "
        "ridge regression or discriminant analysis on class statistics",
    )

    def classes_in_loss(self, classes: Sequence[int]) -> Sequence[int]:
        """None with tuned_epoch 0, where nothing is trained."""
        return super().classes_in_loss(classes) if self.tuned_epoch else ()

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        yield from self.has_no_effect("tuned_epoch 0", not self.tuned_epoch, *SESSION_KEYS)


class Learner(SpacesLearner):
    """Plain and adapted features, and their class statistics; the first task's session is over before any are gathered."""

    cfg: Settings

    def __init__(self, *args: Any):
        super().__init__(*args)
        cfg, width = self.cfg, self.backbone.width
        for layer in range(self.backbone.depth):
            slot = SubspaceSlot()
            adapter = Adapter(width, cfg.ffn_num, cfg.ffn_adapter_scalar, cfg.ffn_adapter_dropout)
            slot.adapters.append(self.initialise(f"layers.{layer}.adapter", adapter))
            self.backbone.fill(layer, slot)

    def new_statistics(self, kind: Statistics) -> StatisticsHead:
        cfg = self.cfg
        return statistics_head(cfg, kind, 2 * self.backbone.width, self.num_classes, cfg.head_projection_dim)

    def learn(self, task: Task) -> None:
        self.seen = task.total
        if task.index == 0:
            epochs, lr = self.cfg.tuned_epoch, self.cfg.init_lr
            train_session(self, task, self.backbone.slots.values(), name="head", epochs=epochs, lr=lr)

    def subspaces(self) -> list[int]:
        """The frozen model's features and the adapted ones: two passes, raw side by side."""
        return [PLAIN, 0]

    def planned_parameters(self) -> list[tuple[str, int]]:
        return planned_once(self)
