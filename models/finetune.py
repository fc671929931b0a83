"""Sequential fine-tuning: one adapter a layer and a linear head, trained on each task in turn, nothing done about forgetting.

The lower bound every method must beat, and the example to copy for a new one. A method file has the same parts in the same
order: what it is and where it comes from, `Settings` (its JSON keys), `Learner` (what it builds, how it learns, what a
checkpoint must know). LAMDA-PILOT's finetune trains the whole ViT (`trainable` "backbone"), and its first task may have a
recipe of its own. Shapes: B batch, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from backbone.adapters.adapter import Adapter
from backbone.heads.heads import LinearHead
from models.learner.base import Learner as Base
from models.learner.fit import fit
from models.learner.groups import Recipe, stepped
from models.learner.losses import Loss, cross_entropy_among
from models.settings.rates import FirstTaskSettings
from utils.data.tasks import Task


# 1. Settings. `Trained` brings optimizer, rates, batch size and the keys all methods share, `FirstTaskSettings` adds epochs and
# the rates of the first task to it; add only what is new. Every key is typed and bounded, and its description says meaning,
# unit and source: --check shows it.
class Settings(FirstTaskSettings):
    trainable: Literal["adapters", "head", "backbone"] = Field(
        "adapters",
        description="what is trained: adapters and head; the head alone; or backbone and head without adapters, as "
        "LAMDA-PILOT's finetune",
    )
    ffn_num: int = Field(16, ge=1, le=4096, description="rank of the adapter in each layer")
    mask_old_classes: bool = Field(
        False,
        description="cross-entropy over the classes of the task only; false, the naive form: over all classes seen",
    )
    init_weight_decay: float | None = Field(
        None, ge=0, le=10, description="weight_decay of the first task; null: weight_decay"
    )

    def classes_in_loss(self, classes: Sequence[int]) -> Sequence[int]:
        """All classes seen, or with `mask_old_classes` those of the task."""
        return classes if self.mask_old_classes else list(accumulate(classes))

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        yield from self.has_no_effect(f"trainable {self.trainable}", self.trainable != "adapters", "ffn_num")


class Learner(Base):
    cfg: Settings

    # 2. Parts. Build what exists before the first task. `initialise` draws start values from seed and name.
    def __init__(self, *args: Any):
        super().__init__(*args)
        self.trains_backbone = self.cfg.trainable == "backbone"
        if self.cfg.trainable == "adapters":
            for layer in range(self.backbone.depth):
                self.backbone.fill(
                    layer, self.initialise(f"layers.{layer}", Adapter(self.backbone.width, self.cfg.ffn_num))
                )
        self.head = self.initialise("head", LinearHead(self.backbone.width, self.num_classes))

    # 3. Learning. The task brings training data only. What is trained is handed to `fit` as objects; the rest is frozen.
    # `trainable` also tells --check how many parameters that will be.
    def trainable(self) -> list[nn.Parameter]:
        below = self.backbone.vit if self.trains_backbone else self.backbone.slots
        return [*below.parameters(), *self.head.parameters()]

    def learn(self, task: Task) -> None:
        self.seen = task.total
        first = task.first if self.cfg.mask_old_classes else 0

        def step(images: Tensor, labels: Tensor) -> Loss:
            return cross_entropy_among(self.head(self.backbone(images)), labels, first, task.total)

        self.train()
        epochs, lr = self.cfg.passes(task.index), self.cfg.rate(task.index)
        fit(self, task, step, self.trainable(), phase="func", epochs=epochs, lr=lr, recipe=self._recipe(task))

    def _recipe(self, task: Task) -> Recipe:
        cfg, (milestones, decay) = self.cfg, self.cfg.steps_of(task.index)
        recipe = Recipe.of(cfg, stepped(milestones, decay))
        if task.index or cfg.init_weight_decay is None:
            return recipe
        return replace(recipe, weight_decay=cfg.init_weight_decay)

    # 4. Prediction is the base's: `logits(images)` are the `scores` of the `features`, by the head the settings name. A method
    # with other features overrides `features`; it then has every head at once.

    # 5. A method that grows also overrides `structure` and `restore`: docs/writing-a-method.md builds one step by step.
