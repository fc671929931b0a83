"""Joint training: a fresh adapter a layer and head on all data seen so far, again after every task.

The upper bound: it keeps every image, so it is no continual learner. Same parts and keys as `finetune`. With `max_rounds` it
trains until held-out training images say that more does not help (rounds as the warm restarts of Loshchilov and Hutter, ICLR
2017, arXiv 1608.03983), so that it is a bound and not only a budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from backbone.adapters.adapter import Adapter
from backbone.heads.heads import LinearHead
from models.learner.base import Learner as Base
from models.learner.fit import fit
from models.learner.held_out import held_out_score, hold_out
from models.learner.losses import Loss, cross_entropy_among
from utils.config.schema import Trained
from utils.data.batches import TaskData
from utils.data.tasks import Task


class Settings(Trained):
    """Keys of joint training."""

    features_move: ClassVar[bool] = False  # all statistics are gathered anew after each task
    epochs: int = Field(
        20, ge=0, description="epochs: passes over the training images of all tasks so far, repeated after every task"
    )
    ffn_num: int = Field(16, ge=1, le=4096, description="rank of the adapter in each layer")
    max_rounds: int = Field(
        1,
        ge=1,
        le=100,
        description="most rounds of `epochs` passes, the learning rate from its start in each; above 1 they end when held-out "
        "training images score no better than after the round before, and one more round trains on all images",
    )
    held_out_ratio: float = Field(
        0.1,
        gt=0,
        le=0.5,
        description="share of each class's training images that rounds are judged on (max_rounds above 1)",
    )

    @property
    def held_out(self) -> float:
        return self.held_out_ratio if self.max_rounds > 1 else 0.0

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        yield from self.has_no_effect("max_rounds 1", self.max_rounds == 1, "held_out_ratio")


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

        def train(phase: str, data: TaskData) -> None:
            fit(self, task, step, self.trainable(), phase=phase, epochs=epochs, lr=lr, data=data)

        if self.cfg.max_rounds == 1:
            return train("joint", everything)
        key, ratio = "held_out_ratio", self.cfg.held_out_ratio
        training, held = hold_out(self, task, ratio, key=key, draw="joint", purpose="rounds", data=everything)
        if held is None:
            self.log.warn(f"task {task.index + 1}: no image can be held out, rounds are judged on training images")
        best = 0.0
        for number in range(1, self.cfg.max_rounds + 1):
            train(f"joint {number}", training)
            loss, accuracy = held_out_score(self, held or training, 0, task.total)
            self.log.row("round", task=task.index, round=number, loss=loss, accuracy=100 * accuracy)
            if accuracy <= best:
                break
            best = accuracy
        return train("joint all", everything)
