"""SimpleCIL: the nearest class mean in the frozen backbone's features (Zhou et al., IJCV 2024, arXiv 2303.07338).

Nothing is trained: everything is the class statistics that the base gathers at the end of a task. With `head` "ridge" and
`head_projection_dim` this is RanPAC without its first-session training (McDonnell et al., NeurIPS 2023, arXiv 2307.02251).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from models.learner.base import Learner as Base
from utils.config.schema import Experiment
from utils.data.tasks import Task


class Settings(Experiment):
    """Training keys of LAMDA-PILOT's file are accepted without effect: its code ignores them too."""

    features_move: ClassVar[bool] = False
    ignored: ClassVar[frozenset[str]] = frozenset(
        {
            "optimizer",
            "init_lr",
            "init_epoch",
            "weight_decay",
            "min_lr",
            "init_milestones",
            "init_lr_decay",
            "init_weight_decay",
        }
        | {"use_simplecil", "tuned_epoch"}
    )

    head: Literal["ncm", "ridge", "lda"] = Field(
        "ncm",
        description="what predicts: the nearest class mean, or ridge regression or discriminant analysis on class statistics",
    )

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        yield from self.has_no_effect("simplecil, which trains nothing", True, "batch_size")


class Learner(Base):
    """The frozen backbone and its class statistics."""

    cfg: Settings
    trains_features: ClassVar[bool] = False

    def trainable(self) -> list[nn.Parameter]:
        return []

    def learn(self, task: Task) -> None:
        """Trains nothing; `consolidate` reads each image once."""
        self.seen = task.total
