"""CODA-Prompt: prefixes composed of components that an image's query weighs (Smith et al., CVPR 2023, arXiv 2211.13218).

Each task adds components, orthogonal to those before at the start, which then stay fixed; every image uses all of
them, so nothing is selected. Trains the components and a linear head. With `cosine_off_by_one`, `drop_last` and
`decay_other_rows` it is LAMDA-PILOT's to rounding (tests/contract/parity). Shapes: B batch, D width, L length of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from backbone.heads.heads import LinearHead
from backbone.prompts import prefixes as prompts
from backbone.prompts.components import Components, Draws
from backbone.prompts.prefixes import Queried
from backbone.vit import Activations
from models.families.prompts import PromptLearner
from models.learner.fit import fit
from models.learner.groups import Recipe
from models.learner.losses import Loss, cross_entropy_among, rows_of
from models.settings.prompts import PromptSettings
from utils.config.split import Split, named
from utils.data.tasks import Task, task_sizes


class Settings(PromptSettings):
    """Defaults are LAMDA-PILOT's for CIFAR-100; the last two keys bring back faults of its code."""

    tuned_epoch: int = Field(20, ge=0, description="epochs: passes over the training images of each task")
    batch_size: int = Field(128, ge=1, description="training images per step")
    scheduler: Literal["constant", "cosine"] = Field(
        "cosine",
        description="learning rate within a task: constant, or init_lr cos(99 pi e / (200 (E - 1))) in epoch e of E",
    )
    prompt_param: tuple[int, int, float] = Field(
        (100, 8, 0.0),
        description="three numbers: components of a layer, divided evenly among the tasks; length of a prompt in tokens, half "
        "keys and half values; weight of the orthogonality penalty",
    )
    prompt_layer_idx: tuple[int, ...] = Field(
        (0, 1, 2, 3, 4), min_length=1, description="layers that read a prompt, counted from 0"
    )
    cosine_off_by_one: bool = Field(
        False, description="keep the full rate for the first two epochs, as the authors' and LAMDA-PILOT's code"
    )
    drop_last: bool = Field(
        False, description="leave out an incomplete last training batch of an epoch, as LAMDA-PILOT"
    )

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        yield from self.has_no_effect("coda_prompt, whose cosine has a fixed end", True, "min_lr")
        yield from self.has_no_effect("scheduler constant", self.scheduler == "constant", "cosine_off_by_one")

    def remarks_on(self, split: Split) -> Iterator[str]:
        yield from super().remarks_on(split)
        empty = [task for task, images in enumerate(split.images or ()) if images < self.batch_size]
        if self.drop_last and empty:
            yield (
                f"drop_last: {named(empty, len(split))} {'have' if len(empty) > 1 else 'has'} no full batch of "
                f"{self.batch_size} images, and nothing is trained there; lower batch_size or set drop_last to false"
            )

    def cross_checks(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().cross_checks()
        size, length, weight = self.prompt_param
        if size < 1 or length < 2 or length % 2 or not 0 <= weight < math.inf:
            yield (
                ("prompt_param",),
                "prompt_param: [components, length of a prompt, weight] with an even length and a weight of at least 0 is "
                f"expected; got {list(self.prompt_param)}",
            )
        if len(set(self.prompt_layer_idx)) != len(self.prompt_layer_idx) or min(self.prompt_layer_idx, default=0) < 0:
            layers = list(self.prompt_layer_idx)
            yield ("prompt_layer_idx",), f"prompt_layer_idx: different numbers from 0 are expected; got {layers}"


class Learner(PromptLearner):
    cfg: Settings

    def __init__(self, *args: Any):
        super().__init__(*args)
        cfg, width = self.cfg, self.backbone.width
        size, length, _ = cfg.prompt_param
        tasks = len(task_sizes(self.num_classes, min(cfg.init_cls, self.num_classes), cfg.increment))
        self.per_task, self.count = size // tasks, 0  # components of a task, and of all tasks so far
        if not self.per_task:
            raise ValueError(f"prompt_param: {size} components are too few for {tasks} tasks, each needs one")
        self.layers = sorted(cfg.prompt_layer_idx)
        prompts.fill(self.backbone, self.layers, "prompt_layer_idx")
        named = ((f"components.{layer}", Components(size, length, width)) for layer in self.layers)
        self.components = nn.ModuleList(self.initialise(name, part) for name, part in named)
        self.head = self.initialise("head", LinearHead(width, self.num_classes))

    def _components(self) -> list[Components]:
        return cast(list[Components], list(self.components))

    # Learning ------------------------------------------------------------------------------------------------------

    def trainable(self) -> list[nn.Parameter]:
        return [*self.components.parameters(), *self.head.parameters()]

    def learn(self, task: Task) -> None:
        """Trains the task's components and the head on cross-entropy among its classes and the orthogonality penalty."""
        cfg, weight = self.cfg, self.cfg.prompt_param[2]
        self.seen = task.total
        first = self._grow(task.index)
        if cfg.drop_last and len(task.train) < cfg.batch_size:
            self.log.warn(
                f"task {task.index + 1} has {len(task.train)} images and drop_last leaves out what makes no batch of "
                f"{cfg.batch_size}: nothing is trained"
            )

        def step(images: Tensor, labels: Tensor) -> Loss:
            scores = self.head(self._encode(*self.begin(images), first))
            entropy = cross_entropy_among(scores, labels, task.first, task.total)
            if not weight:
                return Loss(entropy.total, entropy.correct, {"task_loss": entropy.total})
            penalty = weight * torch.stack([part.penalty(first, self.count) for part in self._components()]).sum()
            terms = {"task_loss": entropy.total, "orthogonality": penalty}
            return Loss(entropy.total + penalty, entropy.correct, terms)

        rows: list[tuple[nn.Parameter, range]] = []
        if not cfg.decay_other_rows:
            rows = rows_of(task, self.head) + [(p, range(first, self.count)) for p in self.components.parameters()]
        self.train()
        fit(
            self,
            task,
            step,
            self.trainable(),
            phase="prompts",
            epochs=cfg.tuned_epoch,
            lr=cfg.init_lr,
            rows=rows,
            drop_last=cfg.drop_last,
            recipe=self._recipe(),
        )

    def _grow(self, task: int) -> int:
        """Draws the task's components, as many as the pool still has; returns the number of the first."""
        size, length, _ = self.cfg.prompt_param
        first = min(task * self.per_task, size)
        self.count = min(first + self.per_task, size)
        for layer, components in zip(self.layers, self._components(), strict=True):
            draws = Draws(self.count - first, length, self.backbone.width)
            components.grow(self.initialise(f"components.{layer}.task{task}", draws), first)
        return first

    def _recipe(self) -> Recipe:
        cfg = self.cfg
        epochs, late = max(cfg.tuned_epoch - 1, 1), int(cfg.cosine_off_by_one)

        def share(epoch: int) -> float:
            done = min(max(epoch - late, 0), epochs)  # a scheduler also asks for the rate after the last epoch
            return math.cos(99 * math.pi * done / (200 * epochs)) if cfg.scheduler == "cosine" else 1.0

        return Recipe(cfg.optimizer, cfg.weight_decay, share)

    # Prediction ----------------------------------------------------------------------------------------------------

    def features(self, images: Tensor | Activations | Queried) -> Tensor:
        return self._encode(*self.begin(images), self.count)

    def _encode(self, start: Activations, query: Tensor, first: int) -> Tensor:
        """Features [B, D] with each layer's prefix; gradients reach the components from `first` on."""
        prefixes = [part(query, first, self.count) for part in self._components()]
        return self.backbone(start, route=lambda x: prefixes)

    # Bookkeeping ---------------------------------------------------------------------------------------------------

    @classmethod
    def cannot_go_on(cls, cfg: Any) -> str:
        return "coda_prompt divides its components among all tasks when it begins"

    def structure(self) -> dict[str, Any]:
        return {**super().structure(), "components": self.count}

    def restore(self, structure: dict[str, Any]) -> None:
        super().restore(structure)
        self.count = int(structure["components"])
