"""SLCA: the whole backbone is trained, slowly; then the classifier is aligned on features drawn from each class's Gaussian.

Zhang et al., ICCV 2023, arXiv 2303.05118, in LAMDA-PILOT's form; facts of its code from tests/fixtures/parity/slca. The slow
learner: the ViT trains at a small fraction of the head's rate, on cross-entropy among the task's classes. Then mean and
covariance of each new class's features are stored, and never renewed. The alignment, from the second task on: all rows of the
head are trained on features drawn from all classes' Gaussians, whose means are shrunk, the oldest most, with normalised
logits. Predictions come from the aligned head; the next task starts from the head as it was before.

Departure from LAMDA-PILOT's code: a class's task is the one it came with, not the quotient of its number and the current
task's size, which is wrong where the first task has another size (`ca_task_by_size` brings that back). Memory: D^2 numbers a
class, 2.4 MB for a ViT-B/16. Shapes: B batch, D width, C classes, S features drawn from each class.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from backbone.heads.alignment import drawn, normalised, shrinking
from backbone.heads.gaussians import ClassGaussians
from backbone.heads.heads import LinearHead
from models.learner.base import Learner as Base
from models.learner.fit import fit
from models.learner.groups import Group, Recipe, count, stepped
from models.learner.losses import Loss, cross_entropy_among, rows_of
from models.learner.table import Table
from models.settings.rates import SteppedSettings
from utils.data.tasks import Task


class Settings(SteppedSettings):
    ignored: ClassVar[frozenset[str]] = frozenset({"model_postfix", "init_epoch", "init_milestones", "init_lr_decay"})

    epochs: int = Field(20, ge=0, description="epochs: passes over the training images of each task")
    lrate: float | None = Field(None, gt=0, le=100, description="learning rate of the head; null: init_lr")
    bcb_lrscale: float = Field(
        0.01, ge=0, le=1, description="learning rate of the backbone, as a fraction of the head's; 0: frozen"
    )
    ca_epochs: int = Field(5, ge=0, description="epochs of the classifier alignment; 0: none")
    ca_with_logit_norm: float = Field(
        0.1,
        ge=0,
        le=100,
        description="temperature of the alignment: logits are divided by it and by their mean norm over tasks; 0: by neither",
    )
    ca_samples: int = Field(
        256, ge=1, description="number S of features drawn from each class in an epoch of the alignment"
    )
    ca_task_by_size: bool = Field(
        False, description="take a class's number divided by the current task's size as its task, as LAMDA-PILOT's code"
    )

    @property
    def rate(self) -> float:
        """Learning rate of the head at the start of a task."""
        return self.init_lr if self.lrate is None else self.lrate

    def cross_checks(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().cross_checks()
        yield from self.must_not_rise("lrate", self.rate, f"the rate {self.rate}")
        if self.milestones is None and self.min_lr <= self.rate:
            slow = self.rate * self.bcb_lrscale
            yield from self.must_not_rise("bcb_lrscale", slow, f"{slow:g}, the backbone's rate (bcb_lrscale)")

    def classes_in_loss(self, classes: Sequence[int]) -> Sequence[int]:
        """Those of the task; with the linear head the alignment makes up for it, on all classes seen."""
        return () if self.head == "linear" and self.ca_epochs else classes

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        yield from self.has_no_effect("lrate", self.lrate is not None, "init_lr")
        alignment = ("ca_samples", "ca_with_logit_norm", "ca_task_by_size")
        yield from self.has_no_effect("ca_epochs 0", not self.ca_epochs, *alignment)
        yield from self.never_reached("milestones", self.milestones, self.epochs)
        if self.head != "linear":
            why = "that of head_align_* takes its place" if self.head == "aligned" else "class statistics predict"
            yield f"the classifier alignment of ca_epochs is skipped with head {self.head}: {why}, not the linear head"


class Head(LinearHead):
    """A linear head that starts small: normal of deviation 0.02, cut off at 2; zero bias."""

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        torch.nn.init.trunc_normal_(self.weight, std=0.02, generator=generator)
        torch.nn.init.zeros_(self.bias)


class Learner(Base):
    cfg: Settings
    trains_backbone = True
    unchanged_while_training: ClassVar[tuple[str, ...]] = (*Base.unchanged_while_training, "gaussians.")
    unaligned: Tensor  # [C, D + 1] weight and bias of the head before the alignment
    task_of: Tensor  # [C] each class's task, -1 before it came

    # Parts ---------------------------------------------------------------------------------------------------------

    def __init__(self, *args: Any):
        super().__init__(*args)
        width = self.backbone.width
        self.head = self.initialise("head", Head(width, self.num_classes))
        self.gaussians = ClassGaussians(self.num_classes, width).to(self.head.weight)
        self.register_buffer("unaligned", self._rows().clone())
        self.register_buffer("task_of", torch.full((self.num_classes,), -1, device=self.head.weight.device))

    def _rows(self) -> Tensor:
        return torch.cat([self.head.weight.detach(), self.head.bias.detach().unsqueeze(1)], dim=1)

    @torch.no_grad()
    def _take_back(self) -> None:
        """Restores the head from before the alignment."""
        self.head.weight.copy_(self.unaligned[:, :-1])
        self.head.bias.copy_(self.unaligned[:, -1])

    # Learning ------------------------------------------------------------------------------------------------------

    def trainable(self) -> list[Group]:
        rate = self.cfg.rate
        return [
            Group("backbone", list(self.backbone.vit.parameters()), rate * self.cfg.bcb_lrscale),
            Group("head", list(self.head.parameters()), rate),
        ]

    def learn(self, task: Task) -> None:
        cfg = self.cfg
        self.seen = task.total
        self.task_of[task.first : task.total] = task.index
        self._take_back()

        def step(images: Tensor, labels: Tensor) -> Loss:
            return cross_entropy_among(self.head(self.backbone(images)), labels, task.first, task.total)

        self.train()
        recipe = Recipe.of(cfg, stepped(cfg.milestones, cfg.lrate_decay))
        rows = rows_of(task, self.head)
        fit(self, task, step, self.trainable(), phase="func", epochs=cfg.epochs, recipe=recipe, rows=rows)
        self.requires_grad_(False)
        self.unaligned.copy_(self._rows())
        self.gaussians.add(*self.features_of(task.train))
        if task.index and self.statistics is None:
            self._align(task)

    def _align(self, task: Task) -> None:
        """Trains all rows of the head on drawn features."""

        def features_of_epoch(epoch: int) -> Table:
            """Features [classes seen * S, D] of all classes seen, mixed; a batch has S of them."""
            normals, order = self._draw(task, epoch)
            features = self.gaussians.sample(normals.to(self.head.weight), self._shrinking(task)).flatten(0, 1)
            labels = torch.arange(self.seen).repeat_interleave(self.cfg.ca_samples)
            return Table(features, labels, order, self.cfg.ca_samples)

        sizes = self.task_of[: self.seen].bincount().tolist()

        def step(features: Tensor, labels: Tensor) -> Loss:
            scores = self.head(features)[:, : self.seen]
            right = (scores.argmax(dim=1) == labels).sum()
            if self.cfg.ca_with_logit_norm:
                scores = normalised(scores, sizes) / self.cfg.ca_with_logit_norm
            return Loss(F.cross_entropy(scores, labels), right)

        self.train()
        epochs, rate = self.cfg.ca_epochs, self.cfg.rate
        fit(
            self,
            task,
            step,
            list(self.head.parameters()),
            phase="align",
            epochs=epochs,
            lr=rate,
            data=features_of_epoch,
        )

    def _draw(self, task: Task, epoch: int) -> tuple[Tensor, Tensor]:
        """Standard normal numbers [classes seen, S, D] and the order [classes seen * S] in which they are shown."""
        generator = torch.Generator().manual_seed(task.train.draws(epoch, "alignment"))
        return drawn(generator, self.seen, self.cfg.ca_samples, self.backbone.width)

    def _shrinking(self, task: Task) -> Tensor:
        """What each seen class's mean is multiplied by, [classes seen]: 1 for the current task's, 0.9 or more for others."""
        task_of = self.task_of[: self.seen]
        if self.cfg.ca_task_by_size:
            task_of = torch.arange(self.seen, device=task_of.device) // (task.total - task.first)
        return shrinking(task_of.to(self.head.weight), task.index)

    # Bookkeeping ---------------------------------------------------------------------------------------------------

    def planned_parameters(self) -> list[tuple[str, int]]:
        vit, head = self.trainable()
        return [
            ("every task", count([vit, head])),
            ("  of these the backbone", count([vit])),
            ("  of these the head", count([head])),
        ]
