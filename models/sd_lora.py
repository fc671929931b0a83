"""SD-LoRA: each task adds low-rank directions to queries and values; the magnitudes of old directions go on learning.

Wu et al., ICLR 2025, arXiv 2501.13198; facts of the authors' code (github.com/WuYichen-97/SD-Lora-CL) from
tests/fixtures/parity/sd_lora. In every block queries and values get sum_i s_i B_i A_i x on top, x the output of norm1. Task t
trains B_t and A_t, all magnitudes s_0 .. s_t, one a task for all layers, and its rows of the head. B_i A_i of the tasks
before are frozen directions of unit size. Every image uses all of them: no task id is needed.

Departure from the authors' code: there all magnitudes start again at 0.8 in each task and every pair of factors is divided
by the pair's norms, so that the function just learned changes at once (`restart_magnitudes` brings that back). Here magnitudes
are carried over, and a task's factors are divided by one number, the mean size over all of them, that its magnitude takes in:
the next task starts from the function as it was learned. The orthogonality term that the authors' code computes and never
adds to the loss is left out. Shapes: B batch, N tokens, D width, R rank, T tasks.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from backbone.adapters.lora import LoRA
from backbone.adapters.lora_qkv import QKVUpdates, sizes_of, slots_of
from backbone.heads.heads import LinearHead
from models.learner.base import Learner as Base
from models.learner.fit import fit
from models.learner.groups import Recipe, count, stepped
from models.learner.losses import Loss, cross_entropy_among, rows_of
from models.settings.rates import FirstTaskSettings
from utils.data.tasks import Task

PARTS = ("q", "v")
START = 0.8  # of every magnitude, as in the authors' code


class Settings(FirstTaskSettings):
    """Keys of the authors' files that have no effect there are accepted. `optimizer` and `weight_decay` have one here; the
    authors' code always uses SGD without decay."""

    ignored: ClassVar[frozenset[str]] = frozenset({"scheduler", "tuned_epoch", "init_weight_decay", "filepath"})

    init_lr: float = Field(0.008, gt=0, le=100, description="learning rate at the start of the first task")
    weight_decay: float = Field(
        0.0, ge=0, le=10, description="L2 penalty (sgd) or decoupled decay (adam); none in the paper"
    )
    rank: int = Field(10, ge=1, le=4096, description="rank R of each task's update of queries and of values")
    restart_magnitudes: bool = Field(
        False,
        description="start all magnitudes at 0.8 in every task, and divide a task's two factors by their norms when it ends, "
        "as the authors' code",
    )


class Magnitudes(nn.Module):
    """One scalar for each task, as a Route (backbone/vit.py): the same gates [1, T] for every layer's slot, whatever x is."""

    def __init__(self, layers: int):
        super().__init__()
        self.layers = layers
        self.values = nn.ParameterList()

    def forward(self, x: Tensor) -> list[Tensor]:
        gates = torch.stack(list(self.values)) if len(self.values) else x.new_ones(0)
        return [gates.unsqueeze(0)] * self.layers


class Learner(Base):
    cfg: Settings

    # Parts ---------------------------------------------------------------------------------------------------------

    def __init__(self, *args: Any):
        super().__init__(*args)
        for layer in range(self.backbone.depth):
            sizes_of(self.backbone, layer, "q")
            self.backbone.fill(layer, QKVUpdates(PARTS))
        self.backbone.router = Magnitudes(self.backbone.depth)
        self.head = self.initialise("head", LinearHead(self.backbone.width, self.num_classes))

    def slots(self) -> list[QKVUpdates]:
        return slots_of(self.backbone)

    @property
    def magnitudes(self) -> nn.ParameterList:
        return cast(Magnitudes, self.backbone.router).values

    def newest(self) -> list[LoRA]:
        """The update of the latest task, in every layer and part."""
        return [slot.newest()[part] for slot in self.slots() for part in PARTS]

    def _grow(self) -> None:
        """Adds an update, whose output is 0 at first, to every layer, and its magnitude."""
        for layer, slot in enumerate(self.slots()):
            updates, name = {}, f"tasks.{len(slot)}.layers.{layer}"
            for part in PARTS:
                new = LoRA(*sizes_of(self.backbone, layer, part), self.cfg.rank)
                updates[part] = self.initialise(f"{name}.{part}", new)
            slot.add(updates)
        self.magnitudes.append(nn.Parameter(self.head.weight.new_full((), START)))

    @torch.no_grad()
    def _fix_newest(self) -> None:
        """Makes the latest task's update a direction of unit size. An update that learned nothing stays as it is."""
        sizes = [(lora, float(lora.up.norm() * lora.down.norm())) for lora in self.newest()]
        if self.cfg.restart_magnitudes:
            for lora, size in sizes:
                lora.up.div_(size or 1.0)
            for value in self.magnitudes:
                value.fill_(START)
            return
        mean = sum(size for _, size in sizes) / len(sizes) or 1.0
        for lora, _ in sizes:
            lora.up.div_(mean)
        self.magnitudes[-1].mul_(mean)

    # Learning ------------------------------------------------------------------------------------------------------

    def trainable(self) -> list[nn.Parameter]:
        factors = [p for lora in self.newest() for p in lora.parameters()]
        return [*factors, *self.magnitudes, *self.head.parameters()]

    def learn(self, task: Task) -> None:
        self.seen = task.total
        if len(self.magnitudes):
            self._fix_newest()
        self._grow()

        def step(images: Tensor, labels: Tensor) -> Loss:
            return cross_entropy_among(self.head(self.backbone(images)), labels, task.first, task.total)

        self.train()
        fit(
            self,
            task,
            step,
            self.trainable(),
            phase="func",
            epochs=self.cfg.passes(task.index),
            lr=self.cfg.rate(task.index),
            recipe=self._recipe(task),
            rows=rows_of(task, self.head),
        )
        self.log.row("magnitudes", task=task.index, values=[value.item() for value in self.magnitudes])

    def _recipe(self, task: Task) -> Recipe:
        return Recipe.of(self.cfg, stepped(*self.cfg.steps_of(task.index)))

    # Bookkeeping ---------------------------------------------------------------------------------------------------

    def structure(self) -> dict[str, Any]:
        return {**super().structure(), "updates": len(self.magnitudes)}

    def restore(self, structure: dict[str, Any]) -> None:
        super().restore(structure)
        while len(self.magnitudes) < structure["updates"]:
            self._grow()

    def planned_parameters(self) -> list[tuple[str, int]]:
        sketch, totals = self.sketch(), []
        for _ in range(2):
            sketch._grow()
            totals.append(count(sketch.trainable()) - len(self.magnitudes))
        head = count(list(self.head.parameters()))
        return [
            ("first task", totals[0]),
            ("  of these its update", totals[0] - head - 1),
            ("  of these the head", head),
            ("each later task: one magnitude more than the task before", totals[1]),
        ]
