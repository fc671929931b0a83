"""Routed low-rank experts that appear where a task is new: novelty, spawn or reuse, train, freeze, grow, distil, merge.

The frozen prefix says whether a task resembles what some expert learned (backbone/experts/novelty.py); a router over
the same prefix
mixes the experts of all layers in one pass (backbone/experts/routed.py). Design of this project; sources stand at the parts.
Expert e is in every layer one adapter beside the MLP, or one LoRA on each of the linear layers `lora_target`, with one router
column a layer. Every phase is a method of `Learner`, in order; what they compute is in models/families/experts.py and
experts.py. Shapes: B batch, N tokens, D width, E experts, L layers, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.adapters import lora
from backbone.adapters.adapter import Adapter
from backbone.experts import novelty, routed
from backbone.experts.router import Routing, temperature
from backbone.heads.heads import LinearHead
from backbone.vit import Activations
from models.families.expert_use import ExpertUse, use_of
from models.families.experts import (
    Expert,
    TrainingProgress,
    at_rows,
    facts_of,
    herd_classes,
    in_words,
    plateau,
    policy_of,
    routing_terms,
    score_distance,
    spawned_at,
    told,
)
from models.learner.base import Learner as Base
from models.learner.copies import Teacher
from models.learner.fit import fit
from models.learner.groups import Group, count, planned
from models.learner.held_out import hold_out
from models.learner.layers import layer_range, slot_inputs
from models.learner.losses import Loss, cross_entropy_among, rows_of
from models.settings.experts import GateSettings, LifeSettings, NoveltySettings
from utils.data.batches import TaskData
from utils.data.tasks import Task
from utils.process.seeds import named_generator


class Settings(LifeSettings, GateSettings, NoveltySettings):
    """The other keys are in models/settings/experts.py; benchmarks/routed.md has the runs that the defaults rest on."""

    train_experts: Literal["open", "target"] = Field(
        "open", description="experts that train in a task: all that are not frozen, or only the task's expert"
    )
    replay_per_class: int = Field(
        0,
        ge=0,
        le=10_000,
        description="stored training images of each earlier class, on which later tasks train too, with cross-entropy over "
        "all classes seen; above 0 the run is not rehearsal-free",
    )

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        if self.replay_per_class:
            yield f"replay_per_class {self.replay_per_class}: training images are stored, so the run is not rehearsal-free"

    def cross_checks(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().cross_checks()
        if not self.grow_experts and self.train_experts == "target":
            yield (
                ("grow_experts", "train_experts"),
                "train_experts: with grow_experts false all experts exist from the start, and target would "
                "train only one of them; "
                "open is expected",
            )
        if self.merge_below and not self.use_moe_routing:
            yield (
                ("merge_below", "use_moe_routing"),
                "merge_below: measures use by the router's gates, but use_moe_routing is false; remove one of the two",
            )


USE_IMAGES = 512  # training images on which the use of experts is measured at the end of a task


class Learner(Base):
    """Experts in each of the layers, mixed by a router; a linear head; embeddings of all classes seen.

    With `replay_per_class` it asks for past data and takes the kept images alone from them."""

    cfg: Settings
    embeddings: Tensor  # [S, D] means of the prefix over each class's training images
    images: Tensor  # [S] how many those were

    def __init__(self, *args: Any):
        super().__init__(*args)
        cfg, width = self.cfg, self.backbone.width
        self.layers = layer_range(cfg.adapt_start_layer, cfg.adapt_end_layer, self.backbone)
        for layer in self.layers:
            self.backbone.fill(layer, routed.RoutedLinears() if cfg.lora_target else routed.RoutedLayer())
        self.experts: list[Expert] = []
        self.created = 0  # experts ever, so that each has start values of its own
        for _ in range(1 if cfg.grow_experts else cfg.num_experts):
            self._add_expert()
        if cfg.use_moe_routing:
            routed.attach_router(self.backbone, cfg.router_scope, cfg.router_granularity)
        self.head = self.initialise("head", LinearHead(width, self.num_classes))
        self.last_spawn, self.target = 0, 0
        self.owners: list[tuple[int, int]] = []  # task and skill of each stored embedding
        self.decisions: list[novelty.Decision] = []
        self.uses_past = cfg.replay_per_class > 0
        self.kept: list[int] = []  # rows of the data set, of the images that are replayed
        self.apart_from = 0  # first of the classes the current task's are told apart from
        self._pending: tuple[Tensor, Tensor, list[int]] | None = None  # embeddings and kept rows of the current task
        self._place_embeddings(0)

    # 1 Embed the task ------------------------------------------------------------------------------------------------

    def learn(self, task: Task) -> None:
        """Novelty first; then the experts that learn the task, their router columns and the head, with further epochs where
        the target grows; then what converged is frozen."""
        self.seen = task.total
        with self.timed("detect"):
            tokens, labels = self._embed(task)
            decision = self._decide(task, tokens, labels)
        chosen = herd_classes(tokens, labels, self.cfg.replay_per_class)
        self._pending = (*novelty.class_means(tokens, labels), task.train.rows[chosen].tolist())
        self.target = decision.skill
        teacher = self.teacher() if self.cfg.distill_coef and task.index else None
        if decision.spawn and task.index > 0:
            self._spawn(task)
        if task.index == 0 and self.cfg.use_moe_routing and self.cfg.router_centre:
            self._centre(task)
        self._set_modes()
        if all(self.experts[e].young for e in self._learning()):
            teacher = None  # distil only while a mature expert continues to learn
        if self.cfg.distill_coef:
            self.log.row("distil", task=task.index, teacher=teacher is not None, on=self.cfg.distill_on)
        losses = self._train_and_grow(task, self._replayed(task), teacher)
        self._freeze(task, losses)

    @torch.no_grad()
    def _embed(self, task: Task) -> tuple[Tensor, Tensor]:
        """Mean tokens [n, D] that the first layer reads, and labels [n], of the task's images under the test transform."""
        self.eval()
        first, size = self.layers[0], self.cfg.eval_batch_size

        def mean_token(images: Tensor | Activations) -> Tensor:
            return self.backbone.mean_tokens(images, [first])[first]

        found = list(self.outputs(mean_token, task.train, size, augment=False, shuffle=False))
        tokens, labels = zip(*found, strict=True)
        return torch.cat(tokens), torch.cat(labels).to(tokens[0].device)

    # 2 Spawn or reuse ------------------------------------------------------------------------------------------------

    def _decide(self, task: Task, tokens: Tensor, labels: Tensor) -> novelty.Decision:
        """The decision, logged with all it was made on."""
        policy, generator = policy_of(self.cfg), named_generator("novelty", task.index)
        facts = facts_of(self.cfg, tokens, labels, self.embeddings, self.images, self.owners, generator)
        facts |= {"task": task.index, "images": len(task.train), "last_spawn": self.last_spawn}
        decision = novelty.decide(policy, **facts)
        self.decisions.append(decision)
        self.log.row("novelty", **asdict(decision))
        if decision.best is not None:
            self.log.info(told(decision, policy, facts))
        return decision

    def _spawn(self, task: Task) -> None:
        """Adds an expert in every layer. Its adapters add 0; its column is opened at once, since training starts now."""
        routers = routed.routers_of(self.backbone)
        aims = routers and self.cfg.router_column_start == "prototype"
        inputs = self._router_inputs(task) if aims else [None] * len(routers)
        self._add_expert()
        for router, own in zip(routers, inputs, strict=True):
            router.grow()
            if own is None or not router.sees(own - router.center):
                router.set_offset(len(router) - 1, 0.0)
            else:
                router.aim(len(router) - 1, own - router.center)
        self.last_spawn = task.index

    def _add_expert(self) -> None:
        for layer, slot in self._slots():
            slot.add(self._expert(layer, self.cfg.ffn_num, f"adapters.{self.created}"))
        self.experts.append(Expert())
        self.created += 1

    def _expert(self, layer: int, rank: int, name: str) -> nn.Module:
        """A layer's part of an expert, with start values of its own, which add 0."""
        targets = self.cfg.lora_target
        made = lora.bundle(self.backbone, layer, targets, rank) if targets else Adapter(self.backbone.width, rank)
        return self.initialise(f"layers.{layer}.{name}", made)

    def _centre(self, task: Task) -> None:
        """Routers read x minus the mean token of the first task: of the first layer's, or of each layer's own input."""
        for router, inputs in zip(routed.routers_of(self.backbone), self._router_inputs(task), strict=True):
            router.set_center(inputs.mean(dim=0))

    def _router_inputs(self, task: Task) -> list[Tensor]:
        """What each layer's router reads of a sample of the task's images, before centring: tokens or mean tokens [n, D]."""
        tokens = slot_inputs(self, task, self.layers)
        if self.cfg.router_granularity == "sample":
            count = self.backbone.tokens
            tokens = {layer: rows.unflatten(0, (-1, count)).mean(dim=1) for layer, rows in tokens.items()}
        shared = self.cfg.router_scope == "shared"
        return [tokens[self.layers[0] if shared else layer] for layer in self.layers]

    # 3 Train: dense while young, top-k once mature -------------------------------------------------------------------

    def _learning(self) -> list[int]:
        """The experts that learn the current task."""
        chosen = range(len(self.experts)) if self.cfg.train_experts == "open" else [self.target]
        return [e for e in chosen if not self.experts[e].frozen]

    def _set_modes(self) -> None:
        """Who is mature by now, and what follows: young experts act always, `top_k_experts` of the mature."""
        for e, expert in enumerate(self.experts):
            mature = expert.is_mature(self.cfg)
            if expert.young and mature:
                self.log.row("mature", expert=e, tasks=expert.tasks, steps=expert.steps, frozen=expert.frozen)
            expert.young = not mature
        self._apply_modes()

    def _apply_modes(self) -> None:
        young = [expert.young for expert in self.experts]
        for router in routed.routers_of(self.backbone):
            router.top_k = self.cfg.top_k_experts + sum(young)
            # above any probability: a young expert takes its place whatever the router thinks of it
            router.selection_bias.copy_(2.0 * torch.tensor(young))

    def _train(self, task: Task, data: TaskData, teacher: Teacher | None, phase: str, **how: Any) -> list[float]:
        """One `fit` with the task's experts, columns and head; returns its loss for each epoch.

        `how`: `epochs`; `held`, images whose loss is `measured` after each epoch. In the first phase the
        temperature falls, in later ones it stays at its end."""
        cfg, epochs, held, measured = self.cfg, how["epochs"], how.get("held"), how.get("measured", [])
        learning = self._learning()
        steps = epochs * len(data.batches(cfg.batch_size))
        routers = routed.routers_of(self.backbone)
        routed_slots = zip(self._slots(), routers, strict=True) if routers else ()
        use = ExpertUse(self, task, phase, {layer: (slot.experts(), router) for (layer, slot), router in routed_slots})
        progress = TrainingProgress(self.experts, measured, self._apply_modes)

        def set_temperature() -> None:
            start, end = cfg.router_temperature_start, cfg.router_temperature_end
            value = temperature(progress.done, steps, start, end) if phase == "func" and steps else end
            for router in routers:
                router.set_temperature(value)

        def step(images: Tensor, labels: Tensor) -> Loss:
            with self.collecting() as use.routings:
                features = self.backbone(images)
            entropy = cross_entropy_among(self.head(features), labels, self.apart_from, task.total)
            terms = routing_terms(use.routings, self.experts, learning, cfg)
            total = entropy.total + sum(terms.values())
            if teacher is not None:
                terms["distil"] = cfg.distill_coef * self._distance(features, images, teacher, task)
                total = total + terms["distil"]
            return Loss(total, entropy.correct, {"task_loss": entropy.total, **terms})

        def after_step() -> None:
            progress.done += 1
            use.end_step()
            set_temperature()
            for e in learning:
                self.experts[e].steps += 1
            if cfg.maturity_steps is not None:
                self._set_modes()

        def after_epoch() -> None:
            use.end_epoch()
            if held is not None:
                measured.append(self._held_out_loss(task, held))

        set_temperature()
        self.train()
        history = fit(
            self,
            task,
            step,
            self._groups(learning),
            phase=phase,
            epochs=epochs,
            data=data,
            rows=[] if cfg.decay_other_rows else rows_of(replace(task, first=self.apart_from), self.head),
            after_step=after_step,
            after_epoch=after_epoch,
            stateful=[use, progress],
        ).losses
        per_epoch = len(history) // epochs if epochs else 1
        return [sum(history[i : i + per_epoch]) / per_epoch for i in range(0, len(history), per_epoch)]

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
        return [*groups, Group("head", list(self.head.parameters()), cfg.init_lr)]

    # 4 Distil from mature experts ------------------------------------------------------------------------------------

    def _distance(self, features: Tensor, images: Tensor, teacher: Teacher, task: Task) -> Tensor:
        """How far the features [B, D] of images moved from the teacher's, or the old classes' scores from its own."""
        before = teacher.features(images)
        if self.cfg.distill_on == "features":
            return F.mse_loss(features, before)
        return score_distance(teacher.head(before)[:, : task.first], self.head(features)[:, : task.first])

    # 5 Grow rank where validation stalls -----------------------------------------------------------------------------

    def _train_and_grow(self, task: Task, replayed: Sequence[TaskData], teacher: Teacher | None) -> list[float]:
        """Trains; with `expert_rank_max` on a part of the images. If the loss of the rest stalls, the target gets neurons and
        further epochs, and again as long as that helps. Returns the loss for each epoch."""
        cfg = self.cfg
        data, held = self._divide(task)
        if replayed:
            data = data.join(*replayed)
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
        ratio, key = self.cfg.rank_growth_val_ratio, "rank_growth_val_ratio"
        return hold_out(self, task, ratio, key=key, draw="rank growth", purpose="rank growth")

    @torch.no_grad()
    def _held_out_loss(self, task: Task, held: TaskData) -> float:
        """Mean cross-entropy on held-out training images, among the classes it is trained on."""
        self.eval()
        total = 0.0

        def scored(images: Tensor | Activations) -> Tensor:
            return self.head(self.backbone(images))

        for scores, labels in self.outputs(scored, held, self.cfg.eval_batch_size, augment=False, shuffle=False):
            loss = cross_entropy_among(scores, labels.to(scores.device), self.apart_from, task.total)
            total += loss.total.item() * len(labels)
        self.train()
        return total / len(held)

    def _room(self) -> int:
        """How many neurons the target may get now."""
        rank = self._ranks()[0][self.target]
        return max(min(self.cfg.rank_growth_step, (self.cfg.expert_rank_max or 0) - rank), 0)

    def _grow_rank(self, by: int, name: str) -> int:
        """Adds `by` neurons to the target in every layer, with fresh down rows and zero up columns: the same function."""
        for layer, slot in self._slots():
            old = slot.adapters[self.target]
            slot.adapters[self.target] = slot.join(old, self._expert(layer, by, f"grown.{name}"), 1.0)
            for parameter in old.parameters():  # its place is taken: what was trained is counted once
                self.trained.pop(id(parameter), None)
        return self._ranks()[0][self.target]

    # 6 Replay, off by default ----------------------------------------------------------------------------------------

    @property
    def regathers_statistics(self) -> bool:
        """Never: a few replayed images of a class are no measure of it."""
        return False

    def _replayed(self, task: Task) -> list[TaskData]:
        """The kept images of earlier tasks. With them each step tells apart all seen classes, new and old images alike, as
        iCaRL does on the union of both (Rebuffi et al. 2017, algorithm 3); without, the task's classes alone."""
        found = at_rows(task.past, self.kept) if self.kept else []
        self.apart_from = 0 if found else task.first
        return found

    def _keep(self, task: Task, rows: Sequence[int]) -> None:
        """Keeps these images of the task: those whose prefix features have the mean of their class, so that the choice
        depends on no training and no random draw."""
        if self.cfg.replay_per_class:
            self.kept += rows
            self.log.row("replay", task=task.index, added=len(rows), kept=len(self.kept), rows=list(rows))
            self.log.info(f"task {task.index + 1}: {len(rows)} images are kept for replay, {len(self.kept)} in all")

    # 7 Freeze what converged -----------------------------------------------------------------------------------------

    def _freeze(self, task: Task, losses: Sequence[float]) -> None:
        """Counts the task for all experts that learned it, and freezes them for good if its loss, terms of routing and
        distillation included, reached a plateau."""
        cfg, learned = self.cfg, self._learning()
        converged = cfg.freeze_on_convergence and plateau(losses, cfg.plateau_epochs, cfg.plateau_tolerance)
        for e in learned:
            self.experts[e].tasks += 1
            self.experts[e].frozen = converged
        rule = {"epochs": cfg.plateau_epochs, "tolerance": cfg.plateau_tolerance}
        self.log.row("freeze", task=task.index, learned=learned, converged=converged, losses=list(losses), **rule)

    # 8 End of a task: use, merging, embeddings -----------------------------------------------------------------------

    def consolidate(self, task: Task) -> None:
        """Measures who is used, merges whom no task ever used much, stores the task's embeddings; then freezes everything."""
        gates = self._log_use(task)
        if gates is not None:
            for expert, gate in zip(self.experts, gates.mean(dim=0).tolist(), strict=True):
                expert.peak = max(expert.peak, gate)
            self._merge_unused(task, gates)
        assert self._pending is not None, "consolidate follows learn"
        means, counts, rows = self._pending
        self._place_embeddings(0, means, counts)
        self.owners += [(task.index, self.target)] * len(means)
        self._keep(task, rows)
        self._pending = None
        if task.total == self.num_classes:
            self._replay_decisions()
        super().consolidate(task)

    @torch.no_grad()
    def _log_use(self, task: Task) -> Tensor | None:
        """Mean gate [L, E] of every expert on the task's images, logged with shares and entropy; None without a router."""
        found = self._routings(task)
        if not found:
            return None
        use = use_of(found)
        self.log.row(
            "routing",
            task=task.index,
            target=self.target,
            layers=list(self.layers),
            **use,
            temperature=float(routed.routers_of(self.backbone)[0].temperature),
            experts=[asdict(expert) for expert in self.experts],
            ranks=self._ranks(),
        )
        return torch.tensor(use["gate"])

    @torch.no_grad()
    def _routings(self, task: Task) -> list[list[Routing]]:
        """What each layer's router chose, batch by batch, on up to USE_IMAGES of the task's images (test transform)."""
        self.eval()
        data = task.train.subset(task.train.order(0, "use")[:USE_IMAGES])

        def routed_by(images: Tensor | Activations) -> list[Routing]:
            with self.collecting() as routings:
                self.backbone(images)
            return routings

        passes = self.outputs(routed_by, data, self.cfg.eval_batch_size, augment=False, shuffle=False)
        found = [routings for routings, _ in passes]
        return [list(of_layer) for of_layer in zip(*found, strict=True)]

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
            gates = torch.tensor(use_of(self._routings(task))["gate"])

    def _merge(self, gone: int, into: int, gates: Tensor) -> list[int]:
        """Expert `into` takes over what `gone` added on average, with the mean gates [L, E] of the task. Returns the ranks of
        `into`, layer by layer."""
        routed.merge_experts(self.backbone, gone, into, gates)
        del self.experts[gone]

        def renamed(e: int) -> int:
            return renamed(into) if e == gone else e - (e > gone)

        self.owners = [(task, renamed(skill)) for task, skill in self.owners]
        self.target = renamed(self.target)
        self._apply_modes()
        return [ranks[renamed(into)] for ranks in self._ranks()]

    def _replay_decisions(self) -> None:
        """Tells at which tasks another threshold would have spawned."""
        spawned = spawned_at(self.decisions, policy_of(self.cfg))
        self.log.row("would_spawn", thresholds=list(spawned), tasks=list(spawned.values()))
        self.log.info(in_words(spawned))

    def task_experts(self) -> dict[int, int]:
        return dict(self.owners) if self.cfg.grow_experts else {}

    def selections(self) -> list[dict[str, Any]]:
        """The task's decision, from which `novelty.replay` tells what another threshold would have done."""
        return [{"kind": "novelty", **asdict(decision)} for decision in self.decisions[-1:]]

    # Prediction is the base's; bookkeeping -------------------------------------------------------------------------

    def _slots(self) -> list[tuple[int, routed.RoutedSlot]]:
        return list(zip(self.layers, routed.routed_layers(self.backbone), strict=True))

    def _ranks(self) -> list[list[int]]:
        """The rank of every expert, layer by layer."""
        return [slot.ranks() for _, slot in self._slots()]

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
            "owners": [list(pair) for pair in self.owners],
            "kept": self.kept,
            "decisions": [asdict(decision) for decision in self.decisions],
        }

    def restore(self, structure: dict[str, Any]) -> None:
        super().restore(structure)
        while len(self.experts) < len(structure["experts"]):
            self._add_expert()
            for router in routed.routers_of(self.backbone):
                router.grow()
        while len(self.experts) > len(structure["experts"]):  # some of those at the start were merged
            self.experts.pop()
            for _, slot in self._slots():
                del slot.adapters[-1]
            for router in routed.routers_of(self.backbone):
                router.drop(len(router) - 1)
        for (layer, slot), ranks in zip(self._slots(), structure["ranks"], strict=True):
            for e, (rank, wanted) in enumerate(zip(slot.ranks(), ranks, strict=True)):
                if rank != wanted:
                    slot.adapters[e] = self._expert(layer, wanted, "resized")
        self.experts = [Expert(**facts) for facts in structure["experts"]]
        self.created, self.last_spawn = int(structure["created"]), int(structure["last_spawn"])
        self.owners = [(task, skill) for task, skill in structure["owners"]]
        self.kept = list(structure["kept"])
        self.decisions = novelty.decisions(structure["decisions"])
        self._place_embeddings(len(self.owners))
        self._apply_modes()

    def planned_parameters(self) -> list[tuple[str, int]]:
        if not self.cfg.grow_experts or self.cfg.num_experts == 1:
            return planned(self._groups(self._learning()))
        later = self.sketch()
        later._add_expert()
        for router in routed.routers_of(later.backbone):
            router.grow()
        columns = [p for router in routed.routers_of(later.backbone) for p in router.parameters_of(1)]
        expert = [group for group in later._groups([1]) if group.name == "experts"]
        return [
            ("first task: one expert a layer and the head", count(self._groups([0]))),
            ("each added expert with its router columns", count(expert) + count(columns)),
        ]
