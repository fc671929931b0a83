"""SimpleCIL: the nearest class mean in the frozen backbone's features (Zhou et al., IJCV 2024, arXiv 2303.07338).

Nothing is trained. Every class gets one prototype, the plain mean of its features; a score is the cosine to it. Shapes:
B batch, D width, C classes seen.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from models.base import Learner as Base
from utils.config import Experiment
from utils.tasks import Task


class Settings(Experiment):
    """No keys of its own. Training keys of LAMDA-PILOT's file are accepted: its code ignores them too."""

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


class Learner(Base):
    """Prototypes [C, D] of the classes seen, as a buffer."""

    cfg: Settings
    prototypes: Tensor

    def __init__(self, *args: Any):
        super().__init__(*args)
        like = next(self.backbone.vit.parameters())
        self.register_buffer("prototypes", torch.zeros(0, self.backbone.width, device=like.device, dtype=like.dtype))

    @torch.no_grad()
    def learn(self, task: Task) -> None:
        """Adds the mean feature of each new class, over its training images under the test transform."""
        self.eval()
        self.seen = task.total
        sums = self.prototypes.new_zeros(task.total - task.first, self.backbone.width)
        for images, labels, *_ in task.train.batches(self.cfg.eval_batch_size, augment=False, shuffle=False):
            features = self.backbone(images.to(sums.device))
            self.views += len(images)
            sums.index_add_(0, (labels - task.first).to(sums.device), features)
        counts = torch.bincount(task.train.labels - task.first, minlength=len(sums)).to(sums)
        self.prototypes = torch.cat([self.prototypes, sums / counts[:, None]])

    def logits(self, images: Tensor) -> Tensor:
        """Cosine of the feature and each prototype, [B, C]."""
        return F.linear(F.normalize(self.backbone(images), dim=1), F.normalize(self.prototypes, dim=1))

    def restore(self, structure: dict[str, Any]) -> None:
        super().restore(structure)
        self.prototypes = self.prototypes.new_zeros(self.seen, self.backbone.width)
