"""SEMA the plain way, with which `benchmarks/sema_run.py` compares: straightforward, and as its authors' code behaves.

Loops over adapters; every pass goes from the image through the whole network; after every epoch of both phases all test images
seen so far are scored; the descriptor phase runs the whole network in each epoch and back-propagates through it, in the first
task down to the adapters of all layers below. It learns the same as `models/sema.py` at its defaults, up to rounding
(tests/benchmarks/test_sema_run.py): data, augmentation, start values, modules and order of steps are the same, the computation
is not.
Shapes: B batch, N tokens, D width, C classes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.adapters.adapter import Adapter
from backbone.experts.descriptor import Descriptor
from backbone.experts.router import RouterColumn
from backbone.heads.heads import LinearHead
from backbone.vit import SlottedViT
from models.learner.base import Initialiser
from models.learner.layers import layer_range
from utils.data.batches import TaskData
from utils.data.tasks import Task, TaskStream

Plan = Mapping[int, Collection[int]]  # task -> layers that expand in it, whatever their scores are


@dataclass
class Outcome:
    """Mean loss of every epoch, and after each task the accuracy over all test images seen, as a fraction."""

    losses: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)


class PlainLayer(nn.Module):
    """Modules beside one block's MLP: adapters and, in layers that may expand, descriptors and router columns."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters, self.descriptors, self.columns = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Mixture [B, N, D] of the adapters' outputs, and each descriptor's losses [B]."""
        if not self.columns:
            return self.adapters[-1](x), []
        mean = x.mean(dim=1)
        outputs = torch.stack([adapter(x) for adapter in self.adapters])
        gates = torch.softmax(torch.cat([column(mean) for column in self.columns], dim=1), dim=1)
        mixed = (outputs * gates.T[:, :, None, None]).sum(dim=0)
        return mixed, [descriptor(mean) for descriptor in self.descriptors]


class PlainSEMA(nn.Module):
    def __init__(self, cfg: Any, backbone: SlottedViT, num_classes: int, init: Initialiser):
        super().__init__()
        self.cfg, self.backbone, self.init = cfg, backbone.requires_grad_(False), init
        self.expandable = layer_range(cfg.adapt_start_layer, cfg.adapt_end_layer, backbone)
        self.layers = nn.ModuleList(PlainLayer() for _ in range(backbone.depth))
        for layer in range(backbone.depth):
            self.grow(layer)
        self.head = LinearHead(backbone.width, num_classes).to(backbone.mean.dtype)
        init("head", self.head)

    def at(self, layer: int) -> PlainLayer:
        return cast(PlainLayer, self.layers[layer])

    def grow(self, layer: int) -> None:
        cfg, slot, width, name = self.cfg, self.at(layer), self.backbone.width, f"layers.{layer}"
        number = len(slot.adapters)
        parts: list[tuple[nn.ModuleList, Any, str]] = [
            (slot.adapters, Adapter(width, cfg.ffn_num), f"{name}.adapters.{number}.functional")
        ]
        if layer in self.expandable:
            parts += [
                (slot.columns, RouterColumn(width), f"{name}.router.{number}"),
                (slot.descriptors, Descriptor(width, cfg.rd_dim, cfg.buffer_size), f"{name}.adapters.{number}.rd"),
            ]
        for where, module, known_as in parts:
            self.init(known_as, module.to(self.backbone.mean.dtype))
            where.append(module)

    def forward(self, images: Tensor) -> tuple[Tensor, dict[int, list[Tensor]]]:
        """Scores [B, C], and each layer's reconstruction losses."""
        vit, losses = self.backbone.vit, {}
        x = self.backbone.stem(images)
        for layer, block in enumerate(cast(list[Block], list(vit.blocks))):
            x = x + block.ls1(block.attn(block.norm1(x)))
            added, losses[layer] = self.at(layer)(x)
            x = x + block.ls2(block.mlp(block.norm2(x))) + added
        return self.head(vit.forward_head(vit.norm(x), pre_logits=True)), losses


def run(
    cfg: Any, backbone: SlottedViT, stream: TaskStream, init: Initialiser, plan: Plan | None = None
) -> tuple[PlainSEMA, Outcome]:
    """Learns all tasks. A `plan` decides about expansion in place of the scans' scores, which are computed all the same."""
    model, outcome = PlainSEMA(cfg, backbone, len(stream.order), init), Outcome()
    for index in range(len(stream)):
        task, tests = stream.task(index), [stream.test(k) for k in range(index + 1)]
        if index == 0:
            train_added(model, task, tests, list(range(backbone.depth)), "", outcome)
        elif not scan_and_expand(model, task, tests, plan, outcome):
            train(model, task, tests, [], "func", outcome)
        model.requires_grad_(False)
        outcome.accuracy.append(score(model, task, tests))
    return model, outcome


def scan_and_expand(
    model: PlainSEMA, task: Task, tests: list[TaskData], plan: Plan | None, outcome: Outcome
) -> list[int]:
    expanded: list[int] = []
    for scan in itertools.count():
        before = len(expanded)
        for images, *_ in task.train.batches(model.cfg.detect_batch_size, epoch=scan, draw="detect"):
            asking = [n for n in scan_batch(model, task, images, plan) if n not in expanded]
            if asking:
                expanded.append(asking[0])
                model.grow(asking[0])
                train_added(model, task, tests, asking[:1], f" {len(expanded)}", outcome)
        if len(expanded) == before:
            return expanded
    raise AssertionError("unreachable")


@torch.no_grad()
def scan_batch(model: PlainSEMA, task: Task, images: Tensor, plan: Plan | None) -> list[int]:
    """The layers in which every descriptor's score is above the threshold."""
    model.eval()
    _, losses = model(images)
    scores = {
        n: min(
            float(d.z_scores(of_d).abs().mean())
            for d, of_d in zip(cast(list[Descriptor], list(model.at(n).descriptors)), losses[n], strict=True)
        )
        for n in model.expandable
    }
    if plan is not None:
        return sorted(plan.get(task.index, ()))
    return [n for n, value in scores.items() if value > model.cfg.exp_threshold]


def train_added(
    model: PlainSEMA, task: Task, tests: list[TaskData], layers: list[int], suffix: str, outcome: Outcome
) -> None:
    train(model, task, tests, layers, f"func{suffix}", outcome)
    if any(n in model.expandable for n in layers):
        train(model, task, tests, layers, f"rd{suffix}", outcome)
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = None


def train(model: PlainSEMA, task: Task, tests: list[TaskData], layers: list[int], phase: str, outcome: Outcome) -> None:
    """One phase. Gradients are computed for everything new in both phases; the optimizer has the phase's parameters only."""
    cfg, described = model.cfg, [n for n in layers if n in model.expandable]
    functional = [model.at(n).adapters[-1] for n in layers] + [model.at(n).columns[-1] for n in described]
    descriptors = {n: cast(Descriptor, model.at(n).descriptors[-1]) for n in described}
    learning = nn.ModuleList([*functional, model.head]), nn.ModuleList(descriptors.values())
    model.requires_grad_(False)
    for part in learning:
        part.requires_grad_(True)
    is_func = phase.startswith("func")
    parameters, epochs, rate = (
        (learning[0].parameters(), cfg.func_epoch, cfg.init_lr)
        if is_func
        else (learning[1].parameters(), cfg.rd_epoch, cfg.rd_lr)
    )
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=cfg.weight_decay)
        if cfg.optimizer == "sgd"
        else torch.optim.AdamW(parameters, lr=rate, weight_decay=cfg.weight_decay)
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(epochs, 1), eta_min=cfg.min_lr)
    for epoch in range(epochs):
        model.train()
        losses = []
        for images, labels, _ in task.train.batches(cfg.batch_size, epoch=epoch, draw=phase):
            scores, reconstruction = model(images)
            if is_func:
                seen = scores[:, : task.total].clone()
                seen[:, : task.first] = -math.inf
                loss = F.cross_entropy(seen, labels)
            else:
                loss = torch.stack([reconstruction[n][-1].mean() for n in described]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for n, descriptor in descriptors.items():
                descriptor.observe([reconstruction[n][-1].detach()])
            losses.append(loss.item())
        scheduler.step()
        outcome.losses.append(sum(losses) / len(losses))
        score(model, task, tests)


@torch.no_grad()
def score(model: PlainSEMA, task: Task, tests: list[TaskData]) -> float:
    """Accuracy over all test images so far, as a fraction."""
    model.eval()
    right = 0
    for data in tests:
        for images, labels, _ in data.batches(model.cfg.eval_batch_size, augment=False, shuffle=False):
            right += int((model(images)[0][:, : task.total].argmax(dim=1) == labels).sum())
    return right / sum(len(data) for data in tests)
