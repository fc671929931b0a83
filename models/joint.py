"""Joint training: a fresh adapter a layer and head on all data seen so far, again after every task.

The upper bound: it keeps every image, so it is no continual learner. Same parts and keys as `finetune`.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor, nn

from backbone.adapters.adapter import Adapter
from backbone.heads.heads import LinearHead
from models.learner.base import Learner as Base
from models.learner.fit import fit
from models.learner.losses import Loss, cross_entropy_among
from utils.config.schema import Trained
from utils.data.tasks import Task


class Settings(Trained):
    """Keys of joint training."""

    epochs: int = Field(
        20, ge=0, description="epochs: passes over the training images of all tasks so far, repeated after every task"
    )
    ffn_num: int = Field(16, ge=1, le=4096, description="rank of the adapter in each layer")


class Learner(Base):
    """Asks for past data and starts over from the same initial weights in every task."""

    cfg: Settings
    uses_past = True

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._start()

    def _start(self) -> None:
        width = self.backbone.width
        for layer in range(self.backbone.depth):
            self.backbone.fill(layer, self.initialise(f"layers.{layer}", Adapter(width, self.cfg.ffn_num)))
        self.head = self.initialise("head", LinearHead(width, self.num_classes))

    def trainable(self) -> list[nn.Parameter]:
        return [*self.backbone.slots.parameters(), *self.head.parameters()]

    def learn(self, task: Task) -> None:
        """Trains on the data of all tasks up to this one, over all their classes."""
        self.seen = task.total
        self._start()
        everything = task.train.join(*task.past)

        def step(images: Tensor, labels: Tensor) -> Loss:
            return cross_entropy_among(self.head(self.backbone(images)), labels, 0, task.total)

        self.train()
        epochs, lr = self.cfg.epochs, self.cfg.init_lr
        fit(self, task, step, self.trainable(), phase="joint", epochs=epochs, lr=lr, data=everything)
