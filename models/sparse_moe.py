"""Sparse mixture of SwiGLU experts beside each frozen MLP, top-1 or top-2 a token, with its use measured honestly.

Switch Transformer (Fedus et al. 2021, arXiv 2101.03961) and Mixtral (Jiang et al. 2024, arXiv 2401.04088) as an added layer;
balance loss as Switch, z-loss as ST-MoE (Zoph et al. 2022, arXiv 2202.08906). One layer's size is that of a dense adapter.
Shapes: B batch, N tokens, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from backbone.adapters.adapter import Adapter
from backbone.experts import balance
from backbone.experts.moe import SparseMoE, hidden_for, rank_for
from backbone.heads.heads import LinearHead
from models.families.expert_use import ExpertUse
from models.learner.base import Learner as Base
from models.learner.fit import fit
from models.learner.groups import Group
from models.learner.layers import layer_range, slot_inputs
from models.learner.losses import Loss, cross_entropy_among, rows_of
from models.settings.rates import RoutedSettings
from utils.config.split import Split, named
from utils.data.tasks import Task


class Settings(RoutedSettings):
    """Keys of the sparse mixture."""

    num_experts: int = Field(4, ge=1, le=256, description="experts in each layer")
    top_k_experts: int = Field(
        2, ge=1, le=256, description="experts used for a token: 1 as Switch Transformer, 2 as Mixtral"
    )
    ffn_num: int = Field(
        64, ge=1, le=4096, description="rank of the adapter that has as many parameters as a layer's experts"
    )
    expert_hidden: int | None = Field(
        None,
        ge=1,
        le=16384,
        description="hidden size of an expert; null: the size at which the layer has the parameters of ffn_num",
    )
    router_lr: float | None = Field(None, gt=0, le=100, description="learning rate of the router; null: init_lr")
    router_warmup: int = Field(
        0,
        ge=0,
        description="training steps at the start of each task over which the router's learning rate rises to its full value",
    )
    router_aux_loss_coef: float = Field(
        0.01, ge=0, le=100, description="weight of the balance loss (Switch Transformer, arXiv 2101.03961, eq. 4)"
    )
    router_z_loss_coef: float = Field(
        0.001, ge=0, le=100, description="weight of the z-loss (ST-MoE, arXiv 2202.08906, eq. 5)"
    )
    router_bias_rate: float = Field(
        0.0,
        ge=0,
        le=1,
        description="balance by a bias that affects the choice of experts alone and moves by this much a step "
        "(arXiv 2408.15664); 0: none",
    )
    router_granularity: Literal["token", "sample"] = Field(
        "token", description="gates for each token, or one set of gates for a whole image"
    )
    router_noisy: bool = Field(
        False, description="noisy top-k in training (Shazeer et al. 2017, arXiv 1701.06538, eq. 4)"
    )
    router_centre: bool = Field(
        True,
        description="subtract the mean token of the first task from the router's input; without it top-1 may collapse",
    )
    fixed_routing: Literal["none", "uniform", "expert"] = Field(
        "none",
        description="control without a learned router: equal gates for all experts, or the expert fixed_expert alone",
    )
    fixed_expert: int = Field(0, ge=0, description="number of that expert, counted from 0")
    expert_capacity: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="most tokens of an expert in training, in multiples of an equal share; tokens above it skip "
        "the expert; null: no limit",
    )
    moe_dispatch: Literal["auto", "dense", "loop", "grouped"] = Field(
        "auto",
        description="how experts are computed: all give the same numbers up to rounding; auto: by size and device",
    )

    def cross_checks(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().cross_checks()
        if self.top_k_experts > self.num_experts and self.is_set("top_k_experts"):
            yield (
                ("top_k_experts", "num_experts"),
                f"top_k_experts: {self.top_k_experts} is above num_experts {self.num_experts}; set it to at most that",
            )
        if self.expert_capacity is not None and self.router_granularity == "sample":
            yield (
                ("expert_capacity", "router_granularity"),
                "expert_capacity: counts tokens, and whole images cannot be cut; null is expected with "
                "router_granularity sample",
            )
        if self.fixed_expert >= self.num_experts:
            yield (
                ("fixed_expert", "num_experts"),
                f"fixed_expert: {self.fixed_expert} does not exist, experts are 0..{self.num_experts - 1}",
            )
        yield from self.must_not_rise("router_lr", self.router_lr)

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        learned = ("lr", "warmup", "aux_loss_coef", "z_loss_coef", "noisy", "bias_rate", "centre")
        keys = [*(f"router_{name}" for name in learned), "top_k_experts"]
        yield from self.has_no_effect(f"fixed_routing {self.fixed_routing}", self.fixed_routing != "none", *keys)
        yield from self.has_no_effect("fixed_routing uniform", self.fixed_routing == "uniform", "expert_capacity")
        yield from self.has_no_effect(
            f"fixed_routing {self.fixed_routing}", self.fixed_routing != "expert", "fixed_expert"
        )
        yield from self.has_no_effect("expert_hidden", self.expert_hidden is not None, "ffn_num")

    def remarks_on(self, split: Split) -> Iterator[str]:
        yield from super().remarks_on(split)
        steps = split.steps(self.epochs, self.batch_size) or ()
        if short := [task for task, count in enumerate(steps) if count < self.router_warmup]:
            yield (
                f"router_warmup: {self.router_warmup} is more than the {max(steps[t] for t in short)} training steps of "
                f"{named(short, len(split))}: the router's rate never rises to its full value there; lower it"
            )


class Learner(Base):
    """One layer of experts in each of the chosen blocks, shared by all tasks, and a linear head."""

    cfg: Settings

    def __init__(self, *args: Any):
        super().__init__(*args)
        cfg, width = self.cfg, self.backbone.width
        self.layers = layer_range(cfg.adapt_start_layer, cfg.adapt_end_layer, self.backbone)
        hidden = cfg.expert_hidden or hidden_for(width, cfg.ffn_num, cfg.num_experts, noisy=cfg.router_noisy)
        for layer in self.layers:
            moe = SparseMoE(
                width,
                hidden,
                cfg.num_experts,
                cfg.top_k_experts,
                noisy=cfg.router_noisy,
                granularity=cfg.router_granularity,
                capacity=cfg.expert_capacity,
                dispatch=cfg.moe_dispatch,
            )
            moe.fix({"none": None, "uniform": "uniform", "expert": cfg.fixed_expert}[cfg.fixed_routing])
            self.backbone.fill(layer, self.initialise(f"layers.{layer}", moe))
        self.head = self.initialise("head", LinearHead(width, self.num_classes))

    def experts(self) -> dict[int, SparseMoE]:
        """The layer of experts in each block."""
        slots = {layer: self.backbone.slots[str(layer)] for layer in self.layers}
        return {layer: slot for layer, slot in slots.items() if isinstance(slot, SparseMoE)}

    # Learning ------------------------------------------------------------------------------------------------------

    def learn(self, task: Task) -> None:
        """Trains experts, router and head on the cross-entropy among the task's classes, plus the two routing losses."""
        self.seen = task.total
        cfg, moes = self.cfg, self.experts()
        if task.index == 0 and cfg.router_centre:
            for layer, inputs in slot_inputs(self, task, self.layers).items():
                moes[layer].router.set_center(inputs.mean(dim=0))
        use = ExpertUse(self, task, "func", {layer: (list(moe.experts), moe.router) for layer, moe in moes.items()})

        def step(images: Tensor, labels: Tensor) -> Loss:
            routings = use.routings = []
            for moe in moes.values():
                moe.collect = routings
            scores = self.head(self.backbone(images))
            for moe in moes.values():
                moe.collect = None
            entropy = cross_entropy_among(scores, labels, task.first, task.total)
            total, terms = entropy.total, {"task_loss": entropy.total}
            if cfg.fixed_routing == "none":
                terms["balance"] = cfg.router_aux_loss_coef * balance.over_layers(balance.balance_loss, routings)
                terms["z"] = cfg.router_z_loss_coef * balance.over_layers(balance.z_loss, routings)
                total = total + terms["balance"] + terms["z"]
            return Loss(total, entropy.correct, terms)

        def after_step() -> None:
            if cfg.router_bias_rate and cfg.fixed_routing == "none":
                for moe, routing in zip(moes.values(), use.routings, strict=True):
                    moe.router.update_bias(self.summed(balance.assignments(routing)), cfg.router_bias_rate)
            use.end_step()

        self.train()
        fit(
            self,
            task,
            step,
            self.trainable(),
            phase="func",
            epochs=cfg.epochs,
            rows=[] if cfg.decay_other_rows else rows_of(task, self.head),
            after_step=after_step,
            after_epoch=use.end_epoch,
            stateful=[use],
        )

    def trainable(self) -> list[Group]:
        cfg, moes = self.cfg, list(self.experts().values())
        groups = [Group("experts", [p for m in moes for p in m.experts.parameters()], cfg.init_lr)]
        if cfg.fixed_routing == "none":
            rate = cfg.init_lr if cfg.router_lr is None else cfg.router_lr
            routers = [p for m in moes for p in m.router.parameters()]
            groups.append(Group("router", routers, rate, warmup=cfg.router_warmup))
        return [*groups, Group("head", list(self.head.parameters()), cfg.init_lr)]

    # Prediction is the base's; bookkeeping -------------------------------------------------------------------------

    def planned_parameters(self) -> list[tuple[str, int]]:
        sizes = [sum(p.numel() for p in module.parameters()) for module in self.experts().values()]
        first = next(iter(self.experts().values()))
        rank = rank_for(first.width, first.hidden, len(first.experts), noisy=self.cfg.router_noisy)
        dense = sum(p.numel() for p in Adapter(first.width, rank).parameters())
        return [
            *super().planned_parameters(),
            (f"  a layer; a dense adapter of rank {rank} is nearest with {dense:,}", sizes[0]),
        ]
