"""SEMA: self-expansion of a frozen model with a mixture of adapters (Wang et al., CVPR 2025, arXiv 2403.18886).

Every layer has functional adapters; those in `adapt_start_layer..adapt_end_layer` also have descriptors that recognise
their inputs and a router that mixes them. A new task is scanned: where all descriptors of a layer find a batch strange,
that layer grows an adapter. The defaults reproduce the authors' code to rounding (tests/contract/parity), its known faults
included; each fault is a key, see `Settings`. Shapes: B batch, N tokens, D width, E adapters of a layer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from backbone.adapters.adapter import Adapter
from backbone.adapters.nested import Active, NestedLoRAAdapter
from backbone.experts.descriptor import Descriptor, finite, lowest, shift_scores
from backbone.experts.expandable import ExpandableLayer
from backbone.experts.router import RouterColumn
from backbone.heads.heads import LinearHead
from models.families import detection
from models.families import nested as nesting
from models.learner.base import Learner as Base
from models.learner.fit import fit
from models.learner.groups import Group, count
from models.learner.layers import layer_range, slot_inputs
from models.learner.losses import Loss, cross_entropy_among, rows_of
from models.settings.detection import DetectionSettings
from models.settings.nested import NestedSettings
from utils.config.split import Split
from utils.data.tasks import Task
from utils.process import stopwatch


class Settings(DetectionSettings, NestedSettings):
    """Keys of SEMA, beside those of detection in models/settings/detection.py and of rates and merging in nested.py there.

    Some correct faults of the original one by one; the defaults reproduce it.

    The keys of slow and fast adapters need ffn_adapter_type nested_lora, and are refused without it."""

    ffn_adapter_type: Literal["adaptmlp", "nested_lora"] = Field(
        "adaptmlp", description="functional adapter: the AdaptFormer bottleneck, or slow and fast adapters in its place"
    )
    router_lr: float | None = Field(None, ge=0, le=100, description="learning rate of router columns; null: init_lr")
    ffn_num: int = Field(16, ge=1, le=4096, description="rank of each functional adapter")
    func_epoch: int = Field(20, ge=0, description="epochs of each phase that trains adapters, router and head")
    adapt_start_layer: int | None = Field(
        None,
        ge=0,
        description="first layer that may add adapters, counted from 0; null: the last three layers may, as in the paper",
    )
    adapt_end_layer: int | None = Field(
        None, ge=0, description="last layer that may add adapters; null: the backbone's last"
    )
    ffn_adapter_scalar: float = Field(
        1.0,
        gt=0,
        le=1e6,
        description="factor on every adapter's output; the original's files say 0.1, which its code ignores",
    )
    ffn_adapter_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="dropout probability in the bottleneck; the original's files say 0.1, which its code ignores",
    )
    train_first_router_column: bool = Field(
        False,
        description="train the first adapter's router column from the second adapter on; the original never trains it",
    )
    decay_other_rows: bool = Field(
        True,
        description="weight decay also shrinks the head's rows of other tasks, as the original; false: they stay unchanged",
    )

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        why = "ffn_adapter_type nested_lora, whose rank is nested_lora_rank"
        yield from self.has_no_effect(why, self.ffn_adapter_type == "nested_lora", "ffn_num")

    def remarks_on(self, split: Split) -> Iterator[str]:
        yield from super().remarks_on(split)
        if self.ffn_adapter_type == "nested_lora":
            yield from self.never_due(split, self.func_epoch)

    def cross_checks(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().cross_checks()
        if (self.adapt_start_layer or 0) > (self.adapt_end_layer if self.adapt_end_layer is not None else math.inf):
            yield (
                ("adapt_start_layer", "adapt_end_layer"),
                f"adapt_start_layer: {self.adapt_start_layer} lies above adapt_end_layer {self.adapt_end_layer}",
            )
        yield from self.must_not_rise("router_lr", self.router_lr)
        plain = self.ffn_adapter_type == "adaptmlp"
        for key in filter(self.is_set, type(self).model_fields):
            if plain and (key.startswith("nested_lora_") or key == "head_recalibration"):
                yield (
                    (key, "ffn_adapter_type"),
                    f'{key}: is for slow and fast adapters only; set ffn_adapter_type to "nested_lora" or remove it',
                )
            elif not plain and key in ("ffn_adapter_scalar", "ffn_adapter_dropout"):
                yield (key, "ffn_adapter_type"), f"{key}: has no effect on nested_lora adapters; remove it"


class Learner(Base):
    """Expands layer by layer where a task is new; trains only what was added, and the head."""

    cfg: Settings

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.expandable = layer_range(self.cfg.adapt_start_layer, self.cfg.adapt_end_layer, self.backbone)
        self.is_nested = self.cfg.ffn_adapter_type == "nested_lora"
        self.unmerged: list[tuple[int, int]] = []  # (layer, index) of nested adapters trained since the last merge
        for layer in range(self.backbone.depth):
            self.backbone.fill(layer, ExpandableLayer())
            self._grow(layer)
        self.head = self.initialise("head", LinearHead(self.backbone.width, self.num_classes))

    def _layer(self, layer: int) -> ExpandableLayer:
        slot = self.backbone.slots[str(layer)]
        assert isinstance(slot, ExpandableLayer)
        return slot

    def _grow(self, layer: int) -> None:
        """Adds an adapter, with its descriptor and router column where the layer may expand."""
        cfg, slot, width = self.cfg, self._layer(layer), self.backbone.width
        name = f"layers.{layer}.adapters.{len(slot)}"
        adapter = (
            nesting.new_nested(cfg, width)
            if self.is_nested
            else Adapter(width, cfg.ffn_num, cfg.ffn_adapter_scalar, cfg.ffn_adapter_dropout)
        )
        if layer in self.expandable:
            slot.router.columns.append(self.initialise(f"layers.{layer}.router.{len(slot)}", RouterColumn(width)))
            slot.descriptors.append(self.initialise(f"{name}.rd", Descriptor(width, cfg.rd_dim, cfg.buffer_size)))
        slot.adapters.append(self.initialise(f"{name}.functional", adapter))

    # Learning ------------------------------------------------------------------------------------------------------

    def learn(self, task: Task) -> None:
        """The first task trains one adapter in every layer; a later one expands where it is new, else trains the head."""
        self.seen = task.total
        self._use("combined")
        if task.index == 0:
            self._train_added(task, list(range(self.backbone.depth)), "")
        elif not self._scan_and_expand(task):
            self._train_func(task, [], "func")

    def _scan_and_expand(self, task: Task) -> set[int]:
        """Scans until nothing is added; the lowest layer that asks expands at once, each at most once a task. Returns them."""
        threshold = self.cfg.exp_threshold
        expanded: set[int] = set()
        for scan in itertools.count():
            highest: dict[int, Tensor] = {}  # each layer's most extreme scores, for the log
            grown: dict[int, Tensor] = {}  # the scores at which it expanded
            for scores in self._scan(task, scan):
                asking = [n for n, s in scores.items() if n not in expanded and s.min() > threshold]
                for layer, new in scores.items():
                    if layer not in highest or lowest(new) > lowest(highest[layer]):
                        highest[layer] = new
                if asking:
                    layer = asking[0]
                    expanded.add(layer)
                    grown[layer] = scores[layer]
                    self._expand(task, layer, scan, scores[layer], len(expanded))
                if len(expanded) == len(self.expandable):
                    break  # nothing is left that could grow
            for layer, seen in highest.items():
                values = finite(grown.get(layer, seen))
                fields = {"scores": values, "threshold": threshold, "expanded": layer in grown}
                self.log.row("detect", task=task.index, scan=scan, layer=layer, **fields)
            if not grown or len(expanded) == len(self.expandable):
                break
        return expanded

    def _expand(self, task: Task, layer: int, scan: int, scores: Tensor, number: int) -> None:
        index, threshold = len(self._layer(layer)), self.cfg.exp_threshold
        text = ", ".join(f"{s:.2f}" for s in scores.tolist())
        above = f"scores {text} are all" if len(scores) > 1 else f"score {text} is"
        self.log.info(f"layer {layer}: {above} above {threshold:g}, adapter {index} is added and trained")
        fields = {"adapter": index, "scores": finite(scores), "threshold": threshold}
        self.log.row("expand", task=task.index, scan=scan, layer=layer, **fields)
        self._grow(layer)
        self._train_added(task, [layer], f" {number}")

    def _scan(self, task: Task, scan: int) -> Iterator[dict[int, Tensor]]:
        """Scores [E] of each layer, for one batch after the other or once for the whole task (`detect_scope`).

        A score is the mean over samples of how many deviations a reconstruction loss lies from those remembered."""
        totals: dict[int, Tensor] = {}
        count = 0
        batches = self.outputs(self._shifts, task.train, self.cfg.detect_batch_size, epoch=scan, draw="detect")
        while True:
            with self.timed("detect"):
                if (batch := next(batches, None)) is None:
                    break
                scores = self._layer_scores(batch[0])
            if self.cfg.detect_scope == "batch":
                yield scores
            else:
                totals = {n: totals.get(n, 0) + s * len(batch[0]) for n, s in scores.items()}
                count += len(batch[0])
        if totals:
            yield {n: s / count for n, s in totals.items()}

    def _layer_scores(self, shifts: Tensor) -> dict[int, Tensor]:
        """Means over the batch of `shifts` [B, E of all layers], for each layer [E], on the CPU."""
        scores = shifts.T.contiguous().mean(dim=1).cpu()
        return dict(zip(self.expandable, scores.split([len(self._layer(n)) for n in self.expandable]), strict=True))

    @torch.no_grad()
    def _shifts(self, images: Tensor) -> Tensor:
        """Shift scores [B, E of all layers] of images [B, 3, H, W]."""
        self.eval()
        means = self.backbone.mean_tokens(images, self.expandable)
        descriptors = [cast(list[Descriptor], list(self._layer(n).descriptors)) for n in self.expandable]
        scores = shift_scores(descriptors, [means[n] for n in self.expandable], self.cfg.detect_std_floor)
        return scores.abs() if self.cfg.detect_sign == "absolute" else scores

    def _train_added(self, task: Task, layers: list[int], suffix: str) -> None:
        """Trains the newest adapter of `layers` with the head, then its descriptor; then all is frozen."""
        losses = self._train_func(task, layers, f"func{suffix}")
        descriptors = self._newest_descriptors(layers)
        if descriptors:
            with stopwatch.section("detection"):
                later = detection.train(self, task, descriptors, self.cfg, f"rd{suffix}")
                for layer, descriptor in descriptors.items():
                    if self.cfg.record_when == "training":
                        name = f"rd.{layer}"
                        descriptor.observe([*losses.get(name, ()), *later.get(name, ())])
                if self.cfg.record_when == "end":
                    detection.record(self, task, descriptors, self.cfg, f"record{suffix}")
        self.requires_grad_(False)

    def _newest_descriptors(self, layers: Sequence[int]) -> dict[int, Descriptor]:
        return {n: cast(Descriptor, self._layer(n).descriptors[-1]) for n in layers if n in self.expandable}

    def _train_func(self, task: Task, layers: list[int], phase: str) -> dict[str, list[Tensor]]:
        """Trains the new adapters and router columns of `layers`, and the head, on the masked cross-entropy.

        Returns the losses [B] of the new descriptors at every step: the original remembers those too."""
        watched = self._newest_descriptors(layers) if self.cfg.record_when == "training" else {}
        if self.is_nested:
            self.unmerged += [(layer, len(self._layer(layer)) - 1) for layer in layers]

        def step(images: Tensor, labels: Tensor) -> Loss:
            features, means = self.backbone.encode(images, tap=list(watched))
            with torch.no_grad():
                losses = {f"rd.{layer}": descriptor(means[layer]) for layer, descriptor in watched.items()}
            entropy = cross_entropy_among(self.head(features), labels, task.first, task.total)
            return Loss(entropy.total, entropy.correct, remember=losses)

        self.train()
        rows = [] if self.cfg.decay_other_rows else rows_of(task, self.head)
        return fit(
            self, task, step, self._groups(layers), phase=phase, epochs=self.cfg.func_epoch, rows=rows
        ).remembered

    def _groups(self, layers: Sequence[int]) -> list[Group]:
        """The newest adapters of `layers` (or their slow and fast parts), router columns and head, each with its rate."""
        cfg, groups = self.cfg, []
        adapters = [self._layer(layer).adapters[-1] for layer in layers]
        columns = [column for layer in layers for column in self._layer(layer).router.columns[-1:]]
        if cfg.train_first_router_column:
            columns += [self._layer(n).router.columns[0] for n in layers if len(self._layer(n).router) == 2]
        if adapters and self.is_nested:
            groups += nesting.nested_groups(cfg, [a for a in adapters if isinstance(a, NestedLoRAAdapter)])
        elif adapters:
            groups.append(Group("adapters", [p for a in adapters for p in a.parameters()], cfg.init_lr))
        if columns:
            rate = cfg.init_lr if cfg.router_lr is None else cfg.router_lr
            groups.append(Group("router", [p for c in columns for p in c.parameters()], rate))
        return [*groups, Group("head", list(self.head.parameters()), cfg.rate_head)]

    def consolidate(self, task: Task) -> None:
        """Merges fast into slow, where it is due, in the nested adapters trained since the last merge; freezes everything."""
        if self.unmerged:
            inputs = slot_inputs(self, task, sorted({layer for layer, _ in self.unmerged}))
            merges, not_merged = {}, []
            for layer, index in self.unmerged:
                adapter, name = self._layer(layer).adapters[index], f"layers.{layer}.adapters.{index}.functional"
                assert isinstance(adapter, NestedLoRAAdapter)
                where = {"layer": layer, "adapter": index}
                merges[layer, index] = nesting.merge(self, task, name, adapter, inputs[layer], where=where)
                above = [p for part in adapter.adapters()[1:] for p in part.up_proj.parameters()]
                if self.cfg.nested_lora_use_consolidation and any(p.any() for p in above):
                    not_merged.append((layer, index))
            nesting.log_merges(self, task, merges)
            self.unmerged = not_merged
        self._use(self.cfg.nested_lora_eval)
        if self.cfg.head_recalibration:
            nesting.recalibrate(self, task, self.cfg.func_epoch)
        super().consolidate(task)

    def _use(self, part: Active) -> None:
        """Sets which part of every nested adapter is evaluated from now on."""
        for slot in map(self._layer, range(self.backbone.depth)):
            for adapter in slot.adapters:
                if isinstance(adapter, NestedLoRAAdapter):
                    adapter.use(part)

    @property
    def prefix_layer(self) -> int:
        """Below the layers that may expand nothing changes once the first task's adapters are frozen."""
        start = self.expandable.start
        learning = any(p.requires_grad for n in range(start) for p in self._layer(n).parameters())
        return 0 if learning else start

    # Prediction is the base's; bookkeeping -------------------------------------------------------------------------

    def structure(self) -> dict[str, Any]:
        nested = {"ranks": self._ranks(), "unmerged": self.unmerged} if self.is_nested else {}
        return {**super().structure(), "adapters": self.adapters_per_layer(), **nested}

    def _ranks(self) -> list[list[list[int]]]:
        """Ranks of every nested adapter, layer by layer."""
        slots = map(self._layer, range(self.backbone.depth))
        return [[a.ranks() for a in slot.adapters if isinstance(a, NestedLoRAAdapter)] for slot in slots]

    def restore(self, structure: dict[str, Any]) -> None:
        super().restore(structure)
        for layer, adapters in enumerate(structure["adapters"]):
            while len(self._layer(layer)) < adapters:
                self._grow(layer)
        if self.is_nested:
            self.unmerged = [(layer, index) for layer, index in structure["unmerged"]]
            for layer, ranks in enumerate(structure["ranks"]):
                for adapter, ranks_of_adapter in zip(self._layer(layer).adapters, ranks, strict=True):
                    assert isinstance(adapter, NestedLoRAAdapter)
                    adapter.resize(ranks_of_adapter)
            self._use(self.cfg.nested_lora_eval)

    def planned_parameters(self) -> list[tuple[str, int]]:
        def size(learner: Learner, layers: Sequence[int]) -> int:
            descriptors = learner._newest_descriptors(layers)
            return count(learner._groups(layers)) + count(detection.parameters_of(descriptors))

        later, layer, head = self.sketch(), self.expandable[0], size(self, [])
        for _ in range(2):  # the second one may train the first one's router column as well
            later._grow(layer)
        return [
            ("task 1: one adapter a layer, descriptors, router, head", size(self, range(self.backbone.depth))),
            ("later task that adds nothing: the head", head),
            ("each added adapter with descriptor and router column", size(later, [layer]) - head),
        ]
