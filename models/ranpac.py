"""RanPAC: ridge regression on random features of a model that was adapted to the first task.

McDonnell et al., NeurIPS 2023, "RanPAC: Random Projections and Pre-trained Models for Continual Learning" (arXiv 2307.02251).
The first task trains as APER's does; then features are lifted to ReLU(x W) with a fixed random W of `M` columns, and one
closed-form solution over all tasks predicts. Scores are the paper's, linear in the lifted features; LAMDA-PILOT's are a key.
tests/contract/parity holds both families to their code. Shapes: B batch, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from backbone.adapters.adapter import Adapter
from backbone.heads.heads import HELD_OUT, StatisticsHead
from models.families.sessions import planned_once, train_session
from models.learner.base import Learner as Base
from models.learner.new_heads import Statistics, statistics_head
from models.settings.sessions import SESSION_KEYS, SessionSettings
from utils.data.batches import TaskData
from utils.data.tasks import Task


class Settings(SessionSettings):
    """LAMDA-PILOT's keys; `ranpac_scores` and `ranpac_ridge` bring back where it and the authors' code differ."""

    ignored: ClassVar[frozenset[str]] = frozenset({"use_simplecil"})

    tuned_epoch: int = Field(
        20, ge=0, description="epochs of the first task; 0: nothing is adapted (without phase 1 of the paper)"
    )
    use_RP: bool = Field(
        True, description="apply the random projection to the features; false: the ablation without it"
    )
    M: int = Field(
        10_000, ge=1, le=50_000, description="number M of random features; ridge stores 8 M^2 bytes, 800 MB for 10,000"
    )
    head: Literal["ridge", "ncm", "lda"] = Field(
        "ridge",
        description="what predicts: ridge regression, which is RanPAC; the nearest class mean of the projected features, its "
        "ablation without decorrelation; or discriminant analysis of them",
    )
    ranpac_scores: Literal["linear", "cosine"] = Field(
        "linear",
        description="scores of ridge: linear as in the paper and the authors' code; or cosine times the trained sigma as "
        "LAMDA-PILOT, which ignores the norms of the solution's rows",
    )
    ranpac_ridge: Literal["all", "task"] = Field(
        "all",
        description="how lambda is chosen: all, fitted on all tasks so far, with a fifth of each new class held out; task, as "
        "both codes, on the task alone, with the last fifth of its images in one random order held out",
    )

    def classes_in_loss(self, classes: Sequence[int]) -> Sequence[int]:
        """None with tuned_epoch 0, where nothing is trained."""
        return super().classes_in_loss(classes) if self.tuned_epoch else ()

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        yield from self.has_no_effect("use_RP false", not self.use_RP, "M")
        yield from self.has_no_effect("tuned_epoch 0", not self.tuned_epoch, *SESSION_KEYS)

    def cross_checks(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().cross_checks()
        if self.head_projection_dim is not None:
            yield (
                ("head_projection_dim",),
                "head_projection_dim: the width of ranpac's projection is M; remove this key",
            )
        for key in ("ranpac_scores", "ranpac_ridge"):
            if self.head != "ridge" and self.is_set(key):
                yield (key, "head"), f'{key}: has an effect with head "ridge" only; remove it'


class Learner(Base):
    """Adapters trained once, then class statistics of lifted features."""

    cfg: Settings
    trains_features: ClassVar[bool] = False  # after the first task's session, before any statistics are gathered
    sigma: Tensor | None

    def __init__(self, *args: Any):
        super().__init__(*args)
        cfg, width = self.cfg, self.backbone.width
        for layer in range(self.backbone.depth):
            adapter = Adapter(width, cfg.ffn_num, cfg.ffn_adapter_scalar, cfg.ffn_adapter_dropout)
            self.backbone.fill(layer, self.initialise(f"layers.{layer}.adapter", adapter))
        like = next(self.backbone.vit.parameters())
        self.register_buffer("sigma", like.new_ones(1) if cfg.ranpac_scores == "cosine" else None)

    def new_statistics(self, kind: Statistics) -> StatisticsHead:
        cfg = self.cfg
        size, cosine = cfg.M if cfg.use_RP else None, cfg.ranpac_scores == "cosine"
        return statistics_head(cfg, kind, self.backbone.width, self.num_classes, size, cosine=cosine)

    def learn(self, task: Task) -> None:
        self.seen = task.total
        if task.index > 0:
            return
        cfg, slots = self.cfg, self.backbone.slots.values()
        head = train_session(self, task, slots, name="head", epochs=cfg.tuned_epoch, lr=cfg.init_lr)
        if self.sigma is not None:
            self.sigma.copy_(head.sigma.detach())

    def scores(self, features: Tensor) -> Tensor:
        scores = super().scores(features)
        return scores if self.sigma is None else self.sigma * scores

    def _choose_ridge(self, task: Task, head: StatisticsHead, data: TaskData, features: Tensor) -> dict[str, Any]:
        if self.cfg.ranpac_ridge == "all" or len(data) < 2:  # where nothing can be held out the base says so
            return super()._choose_ridge(task, head, data, features)
        order, trained = data.order(0, "ridge"), int((1 - HELD_OUT) * len(data))
        held_out = torch.ones(len(data), dtype=torch.bool, device=features.device)
        held_out[order[:trained]] = False
        errors = head.choose_ridge(features, data.labels.to(features.device), held_out, alone=True)
        return {"ridge": float(head.ridge), "errors": errors}

    @property
    def prefix_layer(self) -> int:
        """After the first task's session nothing changes any more: finished features are cached."""
        learning = any(p.requires_grad for p in self.backbone.slots.parameters())
        return 0 if learning else self.backbone.depth

    def planned_parameters(self) -> list[tuple[str, int]]:
        return planned_once(self)
