"""EASE: an adapter set and a feature subspace for every task, and one prototype classifier over all subspaces.

Zhou et al., CVPR 2024, "Expandable Subspace Ensemble for Pre-Trained Model-Based Class-Incremental Learning" (arXiv
2403.12030). Each task trains fresh adapters with a cosine head of the task's classes, which is then dropped; its classes get
their means in every subspace so far, and old classes, whose images are gone, get theirs in the new subspace from similar new
classes (backbone/heads/subspaces.py). S subspaces cost S passes, each once a run (models/families/spaces.py).
tests/contract/parity holds it to the authors' code. Shapes: B batch, D width, S subspaces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from backbone.adapters.adapter import Adapter
from backbone.heads.heads import StatisticsHead
from backbone.heads.subspaces import PLAIN, SubspaceHead, SubspaceSlot
from models.families.sessions import planned_session, train_session
from models.families.spaces import SpacesLearner
from models.learner.groups import Recipe
from models.learner.new_heads import Statistics
from models.settings.sessions import SessionSettings
from utils.data.tasks import Task, task_sizes


class Settings(SessionSettings):
    """The authors' keys, which LAMDA-PILOT shares."""

    ignored: ClassVar[frozenset[str]] = frozenset({"pretrained", "adapter_num"})
    only: ClassVar[dict[str, Any]] = SessionSettings.only | {
        "scheduler": "cosine",  # from init_lr to min_lr, stepped once an epoch
        "recalc_sim": True,  # all missing prototypes are filled in again after every task
        "use_reweight": True,  # subspaces are weighted by alpha and beta
        "use_diagonal": False,  # a variant of the original
        "use_old_data": False,  # true keeps old images
        "moni_adam": False,  # true stops adding adapters
    }

    # more values than Trained has: each method's adam is that of its original
    optimizer: Literal["sgd", "adam", "adamw"] = Field(  # type: ignore[assignment]
        "sgd", description="sgd (momentum 0.9); adam, with weight decay in its gradient as in the original; or adamw"
    )
    init_epochs: int = Field(20, ge=0, description="epochs of the first task")
    later_epochs: int | None = Field(
        None,
        ge=0,
        description="epochs of each later task; null: init_epochs, as the original where all tasks have one size",
    )
    later_lr: float | None = Field(
        None,
        gt=0,
        le=100,
        description="learning rate of later tasks; null: init_lr, as the original where all tasks have one size",
    )
    use_init_ptm: bool = Field(False, description="use the frozen model's features as a subspace too")
    alpha: float = Field(
        0.1,
        ge=0,
        le=1e6,
        description="weight of the mean score in the subspaces of other tasks' adapters; the class's task has weight 1",
    )
    beta: float = Field(
        0.0, ge=0, le=1e6, description="weight of the score in the frozen model's subspace (use_init_ptm)"
    )
    head: Literal["ncm"] = Field(
        "ncm", description="the nearest class mean over all subspaces, weighted by alpha and beta"
    )

    def classes_in_loss(self, classes: Sequence[int]) -> Sequence[int]:
        """Each task has a session with a cosine head of its classes."""
        return classes

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        if self.use_init_ptm != bool(self.beta):
            yield "beta and use_init_ptm have an effect together only: beta is the weight of the frozen model's subspace"

    def cross_checks(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().cross_checks()
        if self.head_projection_dim is not None:
            yield ("head_projection_dim",), "head_projection_dim: ease has no random projection; remove this key"
        yield from self.must_not_rise("later_lr", self.later_lr)


class Learner(SpacesLearner):
    """Grows an adapter in every layer and a subspace in the head with each task; old ones stay as they are."""

    cfg: Settings
    statistics: SubspaceHead

    def __init__(self, *args: Any):
        super().__init__(*args)
        for layer in range(self.backbone.depth):
            self.backbone.fill(layer, SubspaceSlot())

    def new_statistics(self, kind: Statistics) -> StatisticsHead:
        cfg = self.cfg
        return SubspaceHead(self.backbone.width, self.num_classes, cfg.use_init_ptm, cfg.alpha, cfg.beta)

    def _adapter(self) -> Adapter:
        cfg = self.cfg
        return Adapter(self.backbone.width, cfg.ffn_num, cfg.ffn_adapter_scalar, cfg.ffn_adapter_dropout)

    def _grow(self) -> None:
        number = self.statistics.tasks
        for layer, slot in enumerate(self.slots()):
            slot.adapters.append(self.initialise(f"task{number}.adapters.{layer}", self._adapter()))
        self.statistics.grow()

    def _newest(self) -> list[nn.Module]:
        """The task's adapter in every layer."""
        return [slot.adapters[-1] for slot in self.slots()]

    def learn(self, task: Task) -> None:
        self.seen = task.total
        self._grow()
        cfg, first = self.cfg, task.index == 0
        train_session(
            self,
            task,
            self._newest(),
            name=f"task{task.index}.local_head",
            epochs=cfg.init_epochs if first or cfg.later_epochs is None else cfg.later_epochs,
            lr=cfg.init_lr if first or cfg.later_lr is None else cfg.later_lr,
            recipe=Recipe(cfg.optimizer, cfg.weight_decay),
        )

    def subspaces(self) -> list[int]:
        return [*([PLAIN] if self.cfg.use_init_ptm else []), *range(self.statistics.tasks)]

    def most_subspaces(self) -> int:
        return self.cfg.use_init_ptm + len(task_sizes(self.num_classes, self.cfg.init_cls, self.cfg.increment))

    def structure(self) -> dict[str, Any]:
        return {**super().structure(), "tasks": self.statistics.tasks}

    def restore(self, structure: dict[str, Any]) -> None:
        super().restore(structure)
        while self.statistics.tasks < structure["tasks"]:
            self._grow()

    def planned_parameters(self) -> list[tuple[str, int]]:
        later, (first, *others) = self.sketch(), task_sizes(self.num_classes, self.cfg.init_cls, self.cfg.increment)
        later._grow()
        lines = [("task 1: adapters and a cosine head of its classes", planned_session(later, later._newest(), first))]
        if isinstance(self.cfg.increment, int):
            size = planned_session(later, later._newest(), self.cfg.increment)
            return [*lines, ("each later task, the same", size)]
        sizes = [(n, planned_session(later, later._newest(), n)) for n in sorted(set(others))]
        return [*lines, *((f"each later task with {n} classes, the same", size) for n, size in sizes)]
