"""Routed low-rank experts that appear where a task is new: novelty, spawn or reuse, train, freeze, grow, distil, merge.

The frozen prefix says whether a task resembles what some expert learned (backbone/novelty.py); a router over the same prefix
mixes the experts of all layers in one pass (backbone/routed.py). Design of this project; sources stand at the parts.
Expert e is one adapter in every layer, with one router column a layer. Every phase is a method of `Learner`, in order.
Shapes: B batch, N tokens, D width, E experts, L layers, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from backbone import balance, consolidation, novelty, routed
from backbone.adapter import Adapter
from backbone.heads import LinearHead
from backbone.router import Routing, temperature
from backbone.vit import SlottedViT
from models.base import Learner as Base
from models.base import layer_range, slot_inputs
from models.settings import LayerSettings
from models.training import Group, cross_entropy_among, fit, keep_other_rows
from utils.runtime import named_generator
from utils.tasks import Task, TaskData


class Settings(LayerSettings):
    """Keys of the parts in the order in which they act. Defaults are provisional until the study of issue 4."""

    ffn_num: int = Field(16, ge=1, le=4096, description="rank of a new expert")
    num_experts: int = Field(8, ge=1, le=64, description="most experts in a layer; the first task brings one")

    novelty_threshold_mode: Literal["fixed", "adaptive", "calibrated"] = Field(
        "fixed",
        description="similarity below which a task is new: novelty_threshold; less novelty_delta log(1 + experts); or the "
        "novelty_quantile of how similar the classes of one task are to each other",
    )
    novelty_threshold: float = Field(
        0.5,
        ge=-2,
        le=2,
        description="similarity, a cosine around the mean of the past; 2 spawns always, -2 never; for calibrated the value "
        "while no task had two classes",
    )
    novelty_delta: float = Field(0.1, ge=0, le=2, description="adaptive: how fast the threshold falls with the experts")
    novelty_quantile: float = Field(0.5, ge=0, le=1, description="calibrated: which quantile is the threshold")
    novelty_similarity: Literal["max", "median"] = Field(
        "max", description="which of the cosines between a class and a skill's stored classes counts"
    )
    novelty_min_samples: int = Field(1, ge=1, description="a task with fewer training images is never new")
    novelty_cooldown: int = Field(0, ge=0, description="tasks after a spawn that spawn nothing")
    novelty_confidence: float = Field(
        0.95, ge=0, lt=1, description="bootstrap interval that must lie below the threshold; 0: the estimate alone"
    )
    novelty_resamples: int = Field(200, ge=10, le=100_000, description="bootstrap resamples")

    train_experts: Literal["open", "target"] = Field(
        "open", description="experts that learn a task: all that are not frozen, or only the task's own"
    )
    train_columns: Literal["trained", "all"] = Field(
        "trained",
        description="router columns that learn a task: those of the experts that do and of the target, or all",
    )
    use_moe_routing: bool = Field(True, description="mix experts by a router; false: their plain sum, as a control")
    router_scope: Literal["shared", "layer"] = Field(
        "shared", description="gates of all layers from the first layer's input, or each layer's from its own"
    )
    router_granularity: Literal["token", "sample"] = Field("token", description="what is routed")
    router_centre: bool = Field(True, description="route by the distance from the mean token of the first task")
    router_lr: float | None = Field(None, gt=0, le=100, description="learning rate of the router; null: init_lr")
    router_aux_loss_coef: float = Field(
        0.01, ge=0, le=100, description="weight of the balance loss among mature experts that learn (Switch, eq. 4)"
    )
    router_entropy_coef: float = Field(
        0.01, ge=0, le=100, description="weight of the entropy loss that replaces it while all experts act"
    )
    router_z_loss_coef: float = Field(0.001, ge=0, le=100, description="weight of the z-loss (ST-MoE, eq. 5)")
    router_temperature_start: float = Field(2.0, gt=0, le=100, description="temperature at a task's first step")
    router_temperature_end: float = Field(
        1.0, gt=0, le=100, description="temperature at its last step and in evaluation, approached geometrically"
    )
    top_k_experts: int = Field(2, ge=1, le=64, description="mature experts that act; young ones act always")
    maturity_tasks: int | None = Field(
        1, ge=1, description="an expert is mature at the start of a task if it learned this many; null: not by tasks"
    )
    maturity_steps: int | None = Field(
        None, ge=1, description="an expert is mature after this many steps, also within a task; null: not by steps"
    )

    distill_coef: float = Field(
        0.0, ge=0, le=1000, description="weight of staying at the previous model's output while mature experts learn"
    )
    distill_on: Literal["features", "logits"] = Field(
        "features", description="mean squared error of the features, or divergence of the old classes' scores (LwF)"
    )
    expert_rank_max: int | None = Field(
        None, ge=2, le=4096, description="rank up to which a target grows when its held-out loss stalls; null: never"
    )
    rank_growth_step: int = Field(4, ge=1, le=4096, description="neurons added at once; the function stays")
    rank_growth_epochs: int = Field(2, ge=1, description="passes over the task after each growth")
    rank_growth_val_ratio: float = Field(
        0.1, gt=0, lt=1, description="share of each class held out of training to see the stall"
    )
    freeze_on_convergence: bool = Field(
        True, description="freeze an expert for good after a task in which it learned and the loss reached a plateau"
    )
    plateau_epochs: int = Field(2, ge=1, description="epochs without improvement that make a plateau or stall")
    plateau_tolerance: float = Field(0.01, ge=0, lt=1, description="share of the loss below which nothing improved")
    merge_below: float = Field(
        0.0,
        ge=0,
        le=1,
        description="merge an expert into the most used one if its mean gate was below this in every task; 0: never",
    )

    @property
    def rate_head(self) -> float:
        return self.init_lr

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        routing = [k for k in type(self).model_fields if k.startswith(("router_", "maturity_", "top_k"))]
        mode = f"novelty_threshold_mode {self.novelty_threshold_mode}"
        silent = {
            "use_moe_routing false": [] if self.use_moe_routing else [*routing, "train_columns"],
            mode: [
                *([] if self.novelty_threshold_mode == "adaptive" else ["novelty_delta"]),
                *([] if self.novelty_threshold_mode == "calibrated" else ["novelty_quantile"]),
            ],
            "novelty_confidence 0": [] if self.novelty_confidence else ["novelty_resamples"],
            "distill_coef 0": [] if self.distill_coef else ["distill_on"],
            "expert_rank_max null": []
            if self.expert_rank_max
            else [k for k in type(self).model_fields if k.startswith("rank_growth_")],
            "num_experts 1": [k for k in type(self).model_fields if k.startswith("novelty_")]
            if self.num_experts == 1
            else [],
        }
        for why, keys in silent.items():
            if given := [key for key in keys if self.departs(key)]:
                yield f"these keys do not act with {why}: {', '.join(given)}"
        if self.expert_rank_max is not None and self.epochs <= self.plateau_epochs:
            yield f"no rank ever grows: {self.epochs} epochs cannot show a stall over plateau_epochs {self.plateau_epochs}"

    def cross_checks(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().cross_checks()
        if self.top_k_experts > self.num_experts:
            yield (
                ("top_k_experts", "num_experts"),
                f"top_k_experts: {self.top_k_experts} of num_experts {self.num_experts} cannot act",
            )
        if self.router_temperature_end > self.router_temperature_start:
            yield (
                ("router_temperature_start", "router_temperature_end"),
                f"router_temperature_end: {self.router_temperature_end:g} is above router_temperature_start "
                f"{self.router_temperature_start:g}, but temperatures fall",
            )
        if self.router_lr is not None and self.router_lr < self.min_lr:
            yield ("min_lr", "router_lr"), f"min_lr: {self.min_lr} is above router_lr {self.router_lr}"
        if self.expert_rank_max is not None and self.expert_rank_max <= self.ffn_num:
            yield (
                ("expert_rank_max", "ffn_num"),
                f"expert_rank_max: {self.expert_rank_max} leaves nothing to grow above ffn_num {self.ffn_num}",
            )
        if self.merge_below and not self.use_moe_routing:
            yield (
                ("merge_below", "use_moe_routing"),
                "merge_below: tells low use from the router's gates, and use_moe_routing is false",
            )


USE_IMAGES = 512  # training images on which the use of experts is measured at the end of a task
LWF_TEMPERATURE = 2.0  # of Learning without Forgetting (Li and Hoiem 2016)


@dataclass
class Expert:
    """What is known of an expert beside its weights."""

    tasks: int = 0  # in which it learned
    steps: int = 0
    young: bool = True
    frozen: bool = False
    peak: float = 0.0  # largest mean gate in any task since it was there


class Learner(Base):
    """Experts in each of the layers, mixed by a router; a linear head; embeddings of all classes seen."""

    cfg: Settings
    embeddings: Tensor  # [S, D] means of the prefix over each class's training images
    images: Tensor  # [S] how many those were

    def __init__(self, *args: Any):
        super().__init__(*args)
        cfg, width = self.cfg, self.backbone.width
        self.layers = layer_range(cfg.adapt_start_layer, cfg.adapt_end_layer, self.backbone)
        for layer in self.layers:
            self.backbone.fill(layer, routed.RoutedLayer())
        self.experts: list[Expert] = []
        self.created = 0  # experts ever, so that each has start values of its own
        self._add_expert()
        if cfg.use_moe_routing:
            routed.attach_router(self.backbone, cfg.router_scope, cfg.router_granularity)
        self.head = self.place("head", LinearHead(width, self.num_classes))
        self.last_spawn, self.target = 0, 0
        self.owners: list[list[int]] = []  # (task, skill) of each stored embedding
        self._pending: tuple[Tensor, Tensor] | None = None  # embeddings of the current task
        self._place_embeddings(0)

    # 1 Embed the task ------------------------------------------------------------------------------------------------

    def learn(self, task: Task) -> None:
        """Novelty first; then the experts that learn the task, their router columns and the head, with further epochs where
        the target grows; then what converged is frozen."""
        self.seen = task.total
        with self.timed("detect"):
            tokens, labels = self._embed(task)
            decision = self._decide(task, tokens, labels)
        self._pending = novelty.class_means(tokens, labels)
        self.target = decision.skill
        teacher = self._teacher(task)
        if decision.spawn and task.index > 0:
            self._spawn(task)
        if task.index == 0 and self.cfg.use_moe_routing and self.cfg.router_centre:
            self._centre(task)
        self._set_modes()
        if all(self.experts[e].young for e in self._learning()):
            teacher = None  # nobody who learned enough to be kept learns on
        losses = self._train_and_grow(task, teacher)
        self._freeze(task, losses)

    @torch.no_grad()
    def _embed(self, task: Task) -> tuple[Tensor, Tensor]:
        """Mean tokens [n, D] that the first layer reads, and labels [n], of the task's images under the test transform."""
        self.eval()
        first, device = self.layers[0], self.head.weight.device
        found = [
            (self.backbone.mean_tokens(images.to(device), [first])[first], labels.to(device))
            for images, labels, *_ in task.train.batches(self.cfg.eval_batch_size, augment=False, shuffle=False)
        ]
        tokens, labels = zip(*found, strict=True)
        return torch.cat(tokens), torch.cat(labels)

    # 2 Spawn or reuse ------------------------------------------------------------------------------------------------

    def _decide(self, task: Task, tokens: Tensor, labels: Tensor) -> novelty.Decision:
        """The decision, logged with all it was made on."""
        cfg = self.cfg
        facts: dict[str, Any] = {}
        if self.owners:
            skills = [skill for _, skill in self.owners]
            middle = novelty.centre(self.embeddings, self.images)
            means, _ = novelty.class_means(tokens, labels)
            known = self.embeddings, skills, middle, cfg.novelty_similarity
            facts["similar"] = novelty.similarities(means, *known).tolist()
            if cfg.novelty_threshold_mode == "calibrated":
                tasks = [owner for owner, _ in self.owners]
                facts["calibrated"] = novelty.calibrate(
                    self.embeddings, tasks, middle, cfg.novelty_similarity, cfg.novelty_quantile
                )
            if cfg.novelty_confidence:
                facts["bounds"] = novelty.interval(
                    tokens,
                    labels,
                    *known,
                    confidence=cfg.novelty_confidence,
                    resamples=cfg.novelty_resamples,
                    generator=named_generator("novelty", task.index),
                )
        decision = novelty.decide(
            policy_of(cfg), task=task.index, images=len(task.train), last_spawn=self.last_spawn, **facts
        )
        self.log.row("novelty", **asdict(decision))
        if decision.best is not None:
            self.log.info(
                f"task {task.index + 1}: similarity {decision.best:.3f} ({decision.low:.3f} to {decision.high:.3f}) against "
                f"threshold {decision.threshold:.3f}: {decision.reason}, expert {decision.skill} "
                f"{'is new' if decision.spawn else 'goes on'}"
            )
        return decision

    def _spawn(self, task: Task) -> None:
        """Adds an expert in every layer. Its adapters add 0; its column is opened at once, since training starts now."""
        self._add_expert()
        for router in routed.routers_of(self.backbone):
            router.grow()
            router.set_offset(len(router) - 1, 0.0)
        self.last_spawn = task.index

    def _add_expert(self) -> None:
        for layer, slot in self._slots():
            adapter = Adapter(self.backbone.width, self.cfg.ffn_num)
            slot.add(self.place(f"layers.{layer}.adapters.{self.created}", adapter))
        self.experts.append(Expert())
        self.created += 1

    def _centre(self, task: Task) -> None:
        """Routers read x minus the mean token of the first task: of the first layer's, or of each layer's own input."""
        inputs = slot_inputs(self, task, self.layers)
        first = self.layers[0]
        for layer, router in zip(self.layers, routed.routers_of(self.backbone), strict=True):
            router.set_center(inputs[first if self.cfg.router_scope == "shared" else layer].mean(dim=0))

    # 3 Train: dense while young, top-k once mature -------------------------------------------------------------------

    def _learning(self) -> list[int]:
        """The experts that learn the current task."""
        chosen = range(len(self.experts)) if self.cfg.train_experts == "open" else [self.target]
        return [e for e in chosen if not self.experts[e].frozen]

    def _set_modes(self) -> None:
        """Who is mature by now, and what follows: young experts act always, `top_k_experts` of the mature."""
        cfg = self.cfg
        for expert in self.experts:
            by_tasks = cfg.maturity_tasks is not None and expert.tasks >= cfg.maturity_tasks
            by_steps = cfg.maturity_steps is not None and expert.steps >= cfg.maturity_steps
            expert.young = not (by_tasks or by_steps)
        self._apply_modes()

    def _apply_modes(self) -> None:
        young = [expert.young for expert in self.experts]
        for router in routed.routers_of(self.backbone):
            router.top_k = self.cfg.top_k_experts + sum(young)
            # above any probability: a young expert takes its place whatever the router thinks of it
            router.selection_bias.copy_(2.0 * torch.tensor(young))

    def _dense(self) -> bool:
        return self.cfg.top_k_experts + sum(e.young for e in self.experts) >= len(self.experts)

    def _train(self, task: Task, data: TaskData, teacher: SlottedViT | None, phase: str, **how: Any) -> list[float]:
        """One `fit` with the task's experts, columns and head; returns its loss for each epoch.

        `how`: `epochs`; `held`, images whose loss is `measured` after each epoch. In the first phase the
        temperature falls, in later ones it stays at its end."""
        cfg, epochs, held, measured = self.cfg, how["epochs"], how.get("held"), how.get("measured", [])
        learning = self._learning()
        steps = epochs * len(data.batches(cfg.batch_size))
        done = 0

        def set_temperature() -> None:
            start, end = cfg.router_temperature_start, cfg.router_temperature_end
            value = temperature(done, steps, start, end) if phase == "func" and steps else end
            for router in routed.routers_of(self.backbone):
                router.set_temperature(value)

        def step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            routings: list[Routing] = []
            routed.collect(self.backbone, routings)
            features = self.backbone(images)
            routed.collect(self.backbone, None)
            loss, right = cross_entropy_among(self.head(features), labels, task.first, task.total)
            loss = loss + self._routing_loss(routings, learning)
            if teacher is not None:
                loss = loss + cfg.distill_coef * self._distance(features, images, teacher, task)
            return loss, right

        keep = None if cfg.decay_other_rows else keep_other_rows(self.head, task)

        def after_step() -> None:
            nonlocal done
            done += 1
            if keep is not None:
                keep()
            set_temperature()
            for e in learning:
                self.experts[e].steps += 1
            if cfg.maturity_steps is not None:
                self._set_modes()

        def batches(epoch: int) -> Any:
            if held is not None and epoch:
                measured.append(self._held_out_loss(task, held))
            return data.batches(cfg.batch_size, epoch=epoch, stream=phase)

        set_temperature()
        self.train()
        history = fit(
            self, task, step, self._groups(learning), phase=phase, epochs=epochs, batches=batches, after_step=after_step
        )
        if held is not None and epochs:
            measured.append(self._held_out_loss(task, held))
        per_epoch = len(history) // epochs if epochs else 1
        return [sum(history[i : i + per_epoch]) / per_epoch for i in range(0, len(history), per_epoch)]

    def _routing_loss(self, routings: Sequence[Routing], learning: Sequence[int]) -> Tensor | float:
        """Balance, or entropy while all experts act, among the experts that learn; and the z-loss. Mean over layers.

        Young experts beside top-k act always: their share says nothing, so they stay out of the balance."""
        cfg, dense = self.cfg, self._dense()
        if not routings or len(self.experts) == 1:
            return 0.0
        among = torch.zeros(len(self.experts), dtype=torch.bool, device=routings[0].gates.device)
        for e in learning:
            among[e] = dense or not self.experts[e].young
        loss = cfg.router_z_loss_coef * balance.over_layers(balance.z_loss, routings)
        if among.sum() > 1:
            kind = balance.entropy_loss if dense else balance.balance_loss
            weight = cfg.router_entropy_coef if dense else cfg.router_aux_loss_coef
            loss = loss + weight * balance.over_layers(kind, routings, [among] * len(routings))
        return loss

    def _groups(self, learning: Sequence[int]) -> list[Group]:
        cfg, groups = self.cfg, []
        if learning:
            parameters = [p for _, slot in self._slots() for e in learning for p in slot.adapters[e].parameters()]
            groups.append(Group("experts", parameters, cfg.init_lr))
        routers = routed.routers_of(self.backbone)
        if routers and len(self.experts) > 1:  # the gate of a lone expert is 1 whatever its column
            columns = range(len(self.experts)) if cfg.train_columns == "all" else sorted({*learning, self.target})
            rate = cfg.init_lr if cfg.router_lr is None else cfg.router_lr
            groups.append(Group("router", [p for r in routers for e in columns for p in r.parameters_of(e)], rate))
        return [*groups, Group("head", list(self.head.parameters()), cfg.rate_head)]

    # 4 Distil from mature experts ------------------------------------------------------------------------------------

    def _teacher(self, task: Task) -> SlottedViT | None:
        """The model as it is before the task, over the same frozen ViT."""
        if not self.cfg.distill_coef or task.index == 0:
            return None
        made: SlottedViT = copy.deepcopy(self.backbone, {id(self.backbone.vit): self.backbone.vit})
        return made.requires_grad_(False).eval()

    def _distance(self, features: Tensor, images: Tensor, teacher: SlottedViT, task: Task) -> Tensor:
        """How far the features [B, D] of new images moved from the teacher's, or what that does to the old classes' scores:
        T^2 KL at temperature T (Hinton et al. 2015, as Learning without Forgetting)."""
        with torch.no_grad():
            before = teacher(images)
        if self.cfg.distill_on == "features":
            return F.mse_loss(features, before)
        was, now = ((self.head(f)[:, : task.first] / LWF_TEMPERATURE).log_softmax(dim=1) for f in (before, features))
        return F.kl_div(now, was.detach(), reduction="batchmean", log_target=True) * LWF_TEMPERATURE**2

    # 5 Grow rank where validation stalls -----------------------------------------------------------------------------

    def _train_and_grow(self, task: Task, teacher: SlottedViT | None) -> list[float]:
        """Trains; with `expert_rank_max` on a part of the images. If the loss of the rest stalls, the target gets neurons and
        further epochs, and again as long as that helps. Returns the loss for each epoch."""
        cfg = self.cfg
        data, held = self._divide(task)
        measured: list[float] = []
        losses = self._train(task, data, teacher, "func", epochs=cfg.epochs, held=held, measured=measured)
        grows = held is not None and plateau(measured, cfg.plateau_epochs, cfg.plateau_tolerance)
        rounds = 0
        while grows and self.target in self._learning() and (by := self._room()):
            rounds, best = rounds + 1, min(measured)
            rank = self._grow_rank(by, f"task{task.index}.{rounds}")
            measured = []
            how = {"epochs": cfg.rank_growth_epochs, "held": held, "measured": measured}
            losses += self._train(task, data, teacher, f"grow {rounds}", **how)
            grows = min(measured) < (1 - cfg.plateau_tolerance) * best
            facts = {"expert": self.target, "rank": rank, "before": best, "after": min(measured), "helped": grows}
            self.log.row("rank", task=task.index, **facts)
            measured.append(best)  # the next growth must better the best so far
        return losses

    def _divide(self, task: Task) -> tuple[TaskData, TaskData | None]:
        if self.cfg.expert_rank_max is None:
            return task.train, None
        try:
            train, held = task.train.split(self.cfg.rank_growth_val_ratio, stream="rank growth")
        except ValueError as error:
            raise ValueError(f"rank_growth_val_ratio: no images to see a stall on: {error}") from None
        self.log.row("held_out", task=task.index, purpose="rank growth", samples=held.rows.tolist())
        return train, held

    @torch.no_grad()
    def _held_out_loss(self, task: Task, held: TaskData) -> float:
        """Mean cross-entropy among the task's classes on held-out training images."""
        self.eval()
        total = 0.0
        for images, labels, *_ in held.batches(self.cfg.eval_batch_size, augment=False, shuffle=False):
            scores = self.head(self.backbone(images.to(self.head.weight.device)))
            loss, _ = cross_entropy_among(scores, labels.to(scores.device), task.first, task.total)
            total += loss.item() * len(labels)
        self.train()
        return total / len(held)

    def _room(self) -> int:
        """How many neurons the target may get now."""
        rank = self._slots()[0][1].experts()[self.target].rank
        return max(min(self.cfg.rank_growth_step, (self.cfg.expert_rank_max or 0) - rank), 0)

    def _grow_rank(self, by: int, name: str) -> int:
        """Adds `by` neurons to the target in every layer, with fresh down rows and zero up columns: the same function."""
        for layer, slot in self._slots():
            old = slot.experts()[self.target]
            fresh = self.place(f"layers.{layer}.grown.{name}", Adapter(self.backbone.width, by))
            slot.adapters[self.target] = consolidation.consolidate(old, fresh, "concat", 1.0)
            for parameter in old.parameters():  # its place is taken: what was trained is counted once
                self.trained.pop(id(parameter), None)
        return self._slots()[0][1].experts()[self.target].rank

    # 6 Freeze what converged -----------------------------------------------------------------------------------------

    def _freeze(self, task: Task, losses: Sequence[float]) -> None:
        """Counts the task for all experts that learned it, and freezes them for good if its loss reached a plateau."""
        cfg, learned = self.cfg, self._learning()
        converged = cfg.freeze_on_convergence and plateau(losses, cfg.plateau_epochs, cfg.plateau_tolerance)
        for e in learned:
            self.experts[e].tasks += 1
            self.experts[e].frozen = converged
        self.log.row("freeze", task=task.index, learned=learned, converged=converged, losses=list(losses))

    # 7 End of a task: use, merging, embeddings -----------------------------------------------------------------------

    def consolidate(self, task: Task) -> None:
        """Measures who is used, merges whom no task ever used much, stores the task's embeddings; then freezes everything."""
        gates = self._log_use(task)
        if gates is not None:
            for expert, gate in zip(self.experts, gates.mean(dim=0).tolist(), strict=True):
                expert.peak = max(expert.peak, gate)
            self._merge_unused(task, gates)
        assert self._pending is not None, "consolidate follows learn"
        self._place_embeddings(0, *self._pending)
        self.owners += [[task.index, self.target]] * len(self._pending[0])
        self._pending = None
        super().consolidate(task)

    @torch.no_grad()
    def _log_use(self, task: Task) -> Tensor | None:
        """Mean gate [L, E] of every expert on the task's images, logged with shares and entropy; None without a router."""
        found = self._routings(task)
        if not found:
            return None
        uses = [balance.utilisation(own) for own in found]
        entropy = [
            torch.cat([torch.special.entr(r.probabilities.flatten(0, -2)).sum(dim=-1) for r in own]).mean()
            for own in found
        ]
        gates = torch.stack([use.gate for use in uses])
        self.log.row(
            "routing",
            task=task.index,
            target=self.target,
            layers=list(self.layers),
            share=[use.share.tolist() for use in uses],
            gate=gates.tolist(),
            entropy=torch.stack(entropy).tolist(),
            temperature=float(routed.routers_of(self.backbone)[0].temperature),
            experts=[asdict(expert) for expert in self.experts],
            ranks=self._ranks(),
        )
        return gates

    @torch.no_grad()
    def _routings(self, task: Task) -> list[list[Routing]]:
        """What each layer's router chose, batch by batch, on up to USE_IMAGES of the task's images (test transform)."""
        routings: list[Routing] = []
        self.eval()
        routed.collect(self.backbone, routings)
        try:
            size = min(self.cfg.eval_batch_size, USE_IMAGES)
            for number, (images, *_) in enumerate(task.train.batches(size, stream="use", augment=False)):
                if number * size >= USE_IMAGES:
                    break
                self.backbone(images.to(self.head.weight.device))
        finally:
            routed.collect(self.backbone, None)
        layers = len(routed.routers_of(self.backbone))
        return [routings[i::layers] for i in range(layers)]

    @torch.no_grad()
    def _merge_unused(self, task: Task, gates: Tensor) -> None:
        """Merges one after the other, the least used first; never the task's own expert."""
        while len(self.experts) > 1:
            peaks = {e: expert.peak for e, expert in enumerate(self.experts) if e != self.target}
            gone = min(peaks, key=lambda e: peaks[e])
            if peaks[gone] >= self.cfg.merge_below:
                return
            mean = gates.mean(dim=0)
            into = max((e for e in range(len(self.experts)) if e != gone), key=lambda e: float(mean[e]))
            ranks = self._merge(gone, into, gates)
            facts = {"expert": gone, "into": into, "peak": peaks[gone], "gates": mean.tolist(), "ranks": ranks}
            self.log.row("merge", task=task.index, **facts)
            self.log.info(f"task {task.index + 1}: expert {gone} was hardly used and joins expert {into}")
            gates = torch.stack(
                [torch.cat([r.gates.flatten(0, -2) for r in own]).mean(0) for own in self._routings(task)]
            )

    def _merge(self, gone: int, into: int, gates: Tensor) -> list[int]:
        """f_into + (g_gone / g_into) f_gone takes the place of expert `into`, with the layer's mean gates g [L, E] of the task:
        what the two add together on average. The column of `gone` is dropped, whose share goes to all that are left.
        Returns the ranks of `into`, layer by layer."""
        for (_, slot), g in zip(self._slots(), gates, strict=True):
            first, second = slot.experts()[into], slot.experts()[gone]
            weight = float(g[gone] / g[into]) if g[into] > 0 else 0.0
            if weight > 0:
                slot.adapters[into] = consolidation.consolidate(first, second, "concat", weight)
            del slot.adapters[gone]
        for router in routed.routers_of(self.backbone):
            router.drop(gone)
        del self.experts[gone]

        def renamed(e: int) -> int:
            return renamed(into) if e == gone else e - (e > gone)

        self.owners = [[task, renamed(skill)] for task, skill in self.owners]
        self.target = renamed(self.target)
        self._apply_modes()
        return [slot.experts()[renamed(into)].rank for _, slot in self._slots()]

    # Prediction is the base's; bookkeeping -------------------------------------------------------------------------

    def _slots(self) -> list[tuple[int, routed.RoutedLayer]]:
        return list(zip(self.layers, routed.routed_layers(self.backbone), strict=True))

    def _ranks(self) -> list[list[int]]:
        """The rank of every expert, layer by layer."""
        return [[expert.rank for expert in slot.experts()] for _, slot in self._slots()]

    def _place_embeddings(self, count: int, more: Tensor | None = None, images: Tensor | None = None) -> None:
        """Appends to the stored embeddings; without `more`, makes room for `count`."""
        device = next(self.backbone.vit.parameters()).device
        if more is None or images is None:
            more = torch.zeros(count, self.backbone.width, dtype=torch.float64, device=device)
            images = torch.zeros(count, dtype=torch.float64, device=device)
        else:
            more, images = torch.cat([self.embeddings, more]), torch.cat([self.images, images])
        self.register_buffer("embeddings", more)
        self.register_buffer("images", images)

    def structure(self) -> dict[str, Any]:
        return {
            **super().structure(),
            "experts": [asdict(expert) for expert in self.experts],
            "ranks": self._ranks(),
            "created": self.created,
            "last_spawn": self.last_spawn,
            "owners": self.owners,
        }

    def restore(self, structure: dict[str, Any]) -> None:
        super().restore(structure)
        while len(self.experts) < len(structure["experts"]):
            self._add_expert()
            for router in routed.routers_of(self.backbone):
                router.grow()
        for (_, slot), ranks in zip(self._slots(), structure["ranks"], strict=True):
            for e, (expert, rank) in enumerate(zip(slot.experts(), ranks, strict=True)):
                if expert.rank != rank:
                    slot.adapters[e] = self.place("resized", Adapter(self.backbone.width, rank))
        self.experts = [Expert(**facts) for facts in structure["experts"]]
        self.created, self.last_spawn = int(structure["created"]), int(structure["last_spawn"])
        self.owners = [list(pair) for pair in structure["owners"]]
        self._place_embeddings(len(self.owners))
        self._apply_modes()

    def planned_parameters(self) -> list[tuple[str, int]]:
        def size(*groups: Group) -> int:
            return sum(p.numel() for group in groups for p in group.parameters)

        *experts, head = self._groups([0])
        column = self.backbone.width * len(routed.routers_of(self.backbone))
        return [
            ("first task: one expert a layer and the head", size(*experts, head)),
            ("each added expert with its router columns", size(*experts) + column),
        ]


def policy_of(cfg: Settings) -> novelty.Policy:
    """The keys that decide on a spawn."""
    return novelty.Policy(
        cfg.novelty_threshold,
        cfg.novelty_threshold_mode,
        cfg.novelty_delta,
        cfg.novelty_min_samples,
        cfg.novelty_cooldown,
        cfg.num_experts,
    )


def plateau(losses: Sequence[float], epochs: int, tolerance: float) -> bool:
    """Whether the last `epochs` losses bring no improvement by the share `tolerance` over the best before them."""
    if len(losses) <= epochs:
        return False
    return min(losses[-epochs:]) >= (1 - tolerance) * min(losses[:-epochs])
