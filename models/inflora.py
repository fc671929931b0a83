"""InfLoRA: each task's low-rank update of keys and values stays out of the input directions that old tasks rely on.

Liang and Li, CVPR 2024, arXiv 2404.00228; facts of the authors' code (github.com/liangyanshuo/InfLoRA) from
tests/fixtures/parity/inflora. In every block a task adds B_t A_t x to keys and values, x the output of norm1. A_t is computed
before training, from what the task's images excite outside the old tasks' directions (DualGPM,
backbone/adapters/gradient_memory.py),
and only B_t and the task's rows of the head are trained. Every image uses all updates: no task id is needed.

Departures from the authors' code, each with a key that brings it back: Adam's cosine begins to fall with the second epoch
(`late_schedule`), and after the first task the memory holds as many directions as the threshold asks for, or the rest
where these are more than half (`short_first_basis`). Without a key: directions that nothing excites are 0 instead of
arbitrary, and a k-means whose centres were never used is left out. Shapes: B batch, N tokens, D width, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, Literal, cast

from pydantic import Field
from torch import Tensor, nn

from backbone.adapters.gradient_memory import GradientMemory
from backbone.adapters.lora_qkv import FixedDown, QKVUpdates, sizes_of, slots_of
from backbone.heads.heads import LinearHead
from models.learner.base import Learner as Base
from models.learner.fit import fit
from models.learner.groups import Recipe, count
from models.learner.layers import moments
from models.learner.losses import Loss, cross_entropy_among, rows_of
from models.settings.rates import TaskRateSettings
from utils.data.tasks import Task, task_sizes

PART = "kv"  # keys and values share A


class Settings(TaskRateSettings):
    """Keys of the authors' files that have no effect, or repeat what backbone and split say, are accepted."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        {"net_type", "embd_dim", "num_heads", "total_sessions", "EPSILON", "init_lr_decay", "lrate_decay"}
        | {"init_weight_decay"}
    )

    optimizer: Literal["sgd", "adam"] = Field(
        "adam",
        description="sgd (momentum 0.9) with a cosine to min_lr, or adam (weight decay in its gradient) with a "
        "quarter cosine to 0",
    )
    init_lr: float = Field(0.0005, gt=0, le=100, description="learning rate at the start of the first task")
    weight_decay: float = Field(0.0, ge=0, le=10, description="L2 penalty; 0 in the authors' files")
    rank: int = Field(10, ge=1, le=4096, description="rank R of each task's update; at most the backbone's width")
    lamb: float = Field(
        0.95,
        gt=0,
        le=1,
        description="share of a layer's input energy that the protected directions cover after the first task",
    )
    lame: float = Field(
        1.0,
        gt=0,
        le=1,
        description="limit towards which lamb rises: task t of T, counted from 0, needs lamb + (lame - lamb) t / T",
    )
    late_schedule: bool = Field(
        False,
        description="with adam, start the cosine one epoch late and stop one epoch before its end, as the authors' code",
    )
    short_first_basis: bool = Field(
        False,
        description="protect one direction fewer than lamb needs after the first task, and if those are at least half of all, "
        "take them for the unprotected ones, as the authors' code does (which stops at more than half)",
    )

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        yield from self.has_no_effect("optimizer adam, whose cosine ends near 0", self.optimizer == "adam", "min_lr")
        yield from self.has_no_effect("optimizer sgd", self.optimizer == "sgd", "late_schedule")


class Learner(Base):
    cfg: Settings
    unchanged_while_training: ClassVar[tuple[str, ...]] = (*Base.unchanged_while_training, "memories.")

    # Parts ---------------------------------------------------------------------------------------------------------

    def __init__(self, *args: Any):
        super().__init__(*args)
        if self.cfg.rank > self.backbone.width:
            raise ValueError(
                f"rank: {self.cfg.rank} directions do not exist, the backbone's width is {self.backbone.width}"
            )
        for layer in range(self.backbone.depth):
            sizes_of(self.backbone, layer, PART)
            self.backbone.fill(layer, QKVUpdates([PART]))
        like = next(self.backbone.vit.parameters())
        self.memories = nn.ModuleList(GradientMemory(self.backbone.width) for _ in self.slots()).to(like.device)
        self.head = self.initialise("head", LinearHead(self.backbone.width, self.num_classes))
        self.tasks = len(task_sizes(self.num_classes, self.cfg.init_cls, self.cfg.increment))

    def slots(self) -> list[QKVUpdates]:
        return slots_of(self.backbone)

    def memory(self, layer: int) -> GradientMemory:
        return cast(GradientMemory, self.memories[layer])

    def _grow(self) -> None:
        """Adds an update to every layer; its output is 0 at first."""
        for layer, slot in enumerate(self.slots()):
            new = FixedDown(*sizes_of(self.backbone, layer, PART), self.cfg.rank)
            slot.add({PART: self.initialise(f"tasks.{len(slot)}.layers.{layer}.{PART}", new)})

    # Learning ------------------------------------------------------------------------------------------------------

    def _newest(self) -> list[FixedDown]:
        """The task's update in every layer."""
        return [cast(FixedDown, slot.newest()[PART]) for slot in self.slots()]

    def trainable(self) -> list[nn.Parameter]:
        return [*(update.up for update in self._newest()), *self.head.parameters()]

    def learn(self, task: Task) -> None:
        self.seen = task.total
        self._grow()
        updates = self._newest()
        for layer, moment in enumerate(self._moments(task, "moments before")):
            rows, values = self.memory(layer).directions(moment, self.cfg.rank)
            updates[layer].down.data.copy_(rows / math.sqrt(3))
            self.log.row("directions", task=task.index, layer=layer, values=values.tolist())

        def step(images: Tensor, labels: Tensor) -> Loss:
            return cross_entropy_among(self.head(self.backbone(images)), labels, task.first, task.total)

        self.train()
        epochs = self.cfg.passes(task.index)
        share = partial(falling, epochs=epochs, late=self.cfg.late_schedule)
        fit(
            self,
            task,
            step,
            self.trainable(),
            phase="func",
            epochs=epochs,
            lr=self.cfg.rate(task.index),
            recipe=Recipe("adam", self.cfg.weight_decay, share) if self.cfg.optimizer == "adam" else None,
            rows=rows_of(task, self.head),
        )
        self._remember(task)

    def _remember(self, task: Task) -> None:
        """Adds the directions of the task, as the trained model reads them, to the memory of every layer."""
        threshold = self.cfg.lamb + (self.cfg.lame - self.cfg.lamb) * min(task.index / self.tasks, 1)
        for layer, moment in enumerate(self._moments(task, "moments after")):
            memory = self.memory(layer)
            memory.update(moment, threshold, short_start=self.cfg.short_first_basis)
            facts = {"dim": int(memory.dim), "retains": bool(memory.retains), "threshold": threshold}
            self.log.row("memory", task=task.index, layer=layer, **facts)

    def _moments(self, task: Task, draw: str) -> list[Tensor]:
        """The mean of x x^T [D, D] of what each layer's qkv reads."""
        blocks = cast("Any", self.backbone.vit.blocks)
        return moments(self, task, [block.attn.qkv for block in blocks], draw)

    # Bookkeeping ---------------------------------------------------------------------------------------------------

    @classmethod
    def cannot_go_on(cls, cfg: Any) -> str:
        return "inflora's threshold in each task depends on the number of all tasks"

    def structure(self) -> dict[str, Any]:
        return {**super().structure(), "updates": len(self.slots()[0])}

    def restore(self, structure: dict[str, Any]) -> None:
        super().restore(structure)
        while len(self.slots()[0]) < structure["updates"]:
            self._grow()

    def planned_parameters(self) -> list[tuple[str, int]]:
        later = self.sketch()
        later._grow()
        head = count(list(later.head.parameters()))
        total = count(later.trainable())
        return [("every task", total), ("  of these its update", total - head), ("  of these the head", head)]


def falling(epoch: int, epochs: int, late: bool) -> float:
    """The share of the full rate in an epoch, from 0: a cosine that all but reaches 0 in the last one."""
    step = max(epoch - 1, 0) if late else epoch
    return math.cos(0.99 * math.pi / 2 * step / max(epochs - 1, 1))
