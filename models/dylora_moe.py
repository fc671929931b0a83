"""Routed low-rank experts, added where a task is new: novelty, spawn or reuse, train, freeze, grow, distil, merge.

The frozen prefix says whether a task resembles what some expert learned (backbone/experts/novelty.py); a router over the
same prefix mixes the experts of all layers in one pass (backbone/experts/routed.py). Design of this project; sources stand
at the parts. Expert e is in every layer one adapter beside the MLP, or one LoRA on each of the linear layers
`lora_target`, with one router column a layer. Every phase is a method of `Learner`, in order; models/families has the
experts themselves (population.py), what they are decided and trained on (experts.py), how their routers start
(router_start.py), how their use is measured (expert_use.py), and what is off by default (rank_growth.py, replay.py).
Shapes: B batch, N tokens, D width, E experts, L layers, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from backbone.experts import novelty, routed
from backbone.experts.router import temperature
from backbone.heads.heads import LinearHead
from backbone.vit import Activations
from models.families.expert_use import ExpertUse, log_use, mean_gates
from models.families.experts import (
    TrainingProgress,
    distance,
    facts_of,
    in_words,
    plateau,
    policy_of,
    routing_terms,
    sentence,
    spawned_at,
)
from models.families.population import Population
from models.families.rank_growth import divide, grow_while_it_helps
from models.families.replay import at_rows, herd_classes
from models.families.router_start import centre, open_columns, router_inputs
from models.learner.base import Learner as Base
from models.learner.copies import Teacher
from models.learner.fit import fit
from models.learner.groups import Group, count, planned
from models.learner.held_out import held_out_score
from models.learner.layers import layer_range
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

    def classes_in_loss(self, classes: Sequence[int]) -> Sequence[int]:
        """Those of the task; with replay later tasks train on all classes seen."""
        return () if self.replay_per_class else classes

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


class Learner(Base):
    """Experts in each of the layers, mixed by a router; a linear head; embeddings of all classes seen.

    With `replay_per_class` it asks for past data and uses only the stored images of them."""

    cfg: Settings
    embeddings: Tensor  # [S, D] means of the prefix over each class's training images
    images: Tensor  # [S] how many those were

    def __init__(self, *args: Any):
        super().__init__(*args)
        cfg, width = self.cfg, self.backbone.width
        self.layers = layer_range(cfg.adapt_start_layer, cfg.adapt_end_layer, self.backbone)
        for layer in self.layers:
            self.backbone.fill(layer, routed.RoutedLinears() if cfg.lora_target else routed.RoutedLayer())
        self.population = Population(self.backbone, self.layers, cfg)
        for _ in range(1 if cfg.grow_experts else cfg.num_experts):
            self.population.add(self.initialise)
        if cfg.use_moe_routing:
            routed.attach_router(self.backbone, cfg.router_scope, cfg.router_granularity)
        self.head = self.initialise("head", LinearHead(width, self.num_classes))
        self.decisions: list[novelty.Decision] = []
        self.uses_past = cfg.replay_per_class > 0
        self.replay_rows: list[int] = []  # rows of the data set, of the images that are replayed
        self.apart_from = 0  # first of the classes whose scores the current task trains
        # of the current task: embeddings, images behind each, rows to replay
        self._pending: tuple[Tensor, Tensor, list[int]] | None = None
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
        self.population.target = decision.skill
        teacher = self.teacher() if self.cfg.distill_coef and task.index else None
        if decision.spawn and task.index > 0:
            self._spawn(task)
        if task.index == 0 and self.cfg.use_moe_routing and self.cfg.router_centre:
            centre(self.population.routers(), router_inputs(self, task, self.layers, self.cfg))
        self.population.mature(self)
        if all(self.population.experts[e].young for e in self._learning()):
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

        outputs = list(self.outputs(mean_token, task.train, size, augment=False, shuffle=False))
        tokens, labels = zip(*outputs, strict=True)
        return torch.cat(tokens), torch.cat(labels).to(tokens[0].device)

    # 2 Spawn or reuse ------------------------------------------------------------------------------------------------

    def _decide(self, task: Task, tokens: Tensor, labels: Tensor) -> novelty.Decision:
        """The decision, logged with all it rests on."""
        policy, generator = policy_of(self.cfg), named_generator("novelty", task.index)
        facts = facts_of(self.cfg, tokens, labels, self.embeddings, self.images, self.population.owners, generator)
        facts |= {"task": task.index, "images": len(task.train), "last_spawn": self.population.last_spawn}
        decision = novelty.decide(policy, **facts)
        self.decisions.append(decision)
        self.log.row("novelty", **asdict(decision))
        if decision.best is not None:
            self.log.info(sentence(decision, policy, facts))
        return decision

    def _spawn(self, task: Task) -> None:
        """Adds an expert in every layer. Its output is 0; its column is opened at once, since training starts now."""
        routers = self.population.routers()
        aims = routers and self.cfg.router_column_start == "prototype"
        inputs = router_inputs(self, task, self.layers, self.cfg) if aims else None
        self.population.add(self.initialise)
        open_columns(routers, inputs)
        self.population.last_spawn = task.index

    # 3 Train: dense while young, top-k once mature -------------------------------------------------------------------

    def _learning(self) -> list[int]:
        """The experts that learn the current task."""
        population = self.population
        chosen = range(len(population)) if self.cfg.train_experts == "open" else [population.target]
        return [e for e in chosen if not population.experts[e].frozen]

    def _train(
        self,
        task: Task,
        data: TaskData,
        teacher: Teacher | None,
        phase: str,
        epochs: int,
        held: TaskData | None,
        measured: list[float],
    ) -> list[float]:
        """One `fit` with the task's experts, columns and head; returns its loss for each epoch.

        The loss of the images `held` is appended to `measured` after each epoch. The temperature falls in the phase `func`;
        in later phases it stays at its end."""
        cfg, population, learning = self.cfg, self.population, self._learning()
        steps = epochs * len(data.batches(cfg.batch_size))
        routers = population.routers()
        routed_slots = zip(population.slots(), routers, strict=True) if routers else ()
        use = ExpertUse(self, task, phase, {layer: (slot.experts(), router) for (layer, slot), router in routed_slots})
        progress = TrainingProgress(population.experts, measured, population.set_routers)

        def set_temperature() -> None:
            start, end = cfg.router_temperature_start, cfg.router_temperature_end
            value = temperature(progress.done, steps, start, end) if phase == "func" and steps else end
            for router in routers:
                router.set_temperature(value)

        def step(images: Tensor, labels: Tensor) -> Loss:
            with self.collecting() as use.routings:
                features = self.backbone(images)
            entropy = cross_entropy_among(self.head(features), labels, self.apart_from, task.total)
            terms = routing_terms(use.routings, population.experts, learning, cfg)
            total = entropy.total + sum(terms.values())
            if teacher is not None:
                terms["distil"] = cfg.distill_coef * distance(
                    self, teacher, features, images, task.first, cfg.distill_on
                )
                total = total + terms["distil"]
            return Loss(total, entropy.correct, {"task_loss": entropy.total, **terms})

        def after_step() -> None:
            progress.done += 1
            use.end_step()
            set_temperature()
            for e in learning:
                population.experts[e].steps += 1
            if cfg.maturity_steps is not None:
                population.mature(self)

        def after_epoch() -> None:
            use.end_epoch()
            if held is not None:
                measured.append(held_out_score(self, held, self.apart_from, task.total)[0])

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
        cfg, population, groups = self.cfg, self.population, []
        if learning:
            groups.append(Group("experts", population.parameters(learning), cfg.init_lr))
        if population.routers() and len(population) > 1:  # the gate of a lone expert is 1 whatever its column
            columns = range(len(population)) if cfg.train_columns == "all" else sorted({*learning, population.target})
            rate = cfg.init_lr if cfg.router_lr is None else cfg.router_lr
            groups.append(Group("router", population.columns(columns), rate))
        return [*groups, Group("head", list(self.head.parameters()), cfg.init_lr)]

    # 4 Grow rank where validation plateaus, off by default ------------------------------------------------------------

    def _train_and_grow(self, task: Task, replayed: Sequence[TaskData], teacher: Teacher | None) -> list[float]:
        """Trains; with `expert_rank_max` on all but the held-out images, and further where the rank of the target grows.
        Returns the loss of each epoch."""
        data, held = divide(self, task, self.cfg)
        if replayed:
            data = data.join(*replayed)

        def train(phase: str, epochs: int, measured: list[float]) -> list[float]:
            return self._train(task, data, teacher, phase, epochs, held, measured)

        measured: list[float] = []
        losses = train("func", self.cfg.epochs, measured)
        if held is not None and self.population.target in self._learning():
            losses += grow_while_it_helps(self, task, self.population, self.cfg, measured, train)
        return losses

    # 5 Replay, off by default ----------------------------------------------------------------------------------------

    @property
    def regathers_statistics(self) -> bool:
        """Never: a few replayed images of a class are no measure of it."""
        return False

    def _replayed(self, task: Task) -> list[TaskData]:
        """The stored images of earlier tasks. With them each step trains the scores of all classes seen, on new and old
        images, as iCaRL does on the union of both (Rebuffi et al. 2017, algorithm 3); without, of the task's classes alone."""
        replayed = at_rows(task.past, self.replay_rows) if self.replay_rows else []
        self.apart_from = 0 if replayed else task.first
        return replayed

    def _store(self, task: Task, rows: Sequence[int]) -> None:
        """Stores the rows of images for replay. Their prefix features have about the mean of their class, so the choice depends
        on no training and no random draw."""
        if self.cfg.replay_per_class:
            self.replay_rows += rows
            self.log.row("replay", task=task.index, added=len(rows), kept=len(self.replay_rows), rows=list(rows))
            self.log.info(
                f"task {task.index + 1}: {len(rows)} images are stored for replay, {len(self.replay_rows)} in all"
            )

    # 6 Freeze what converged -----------------------------------------------------------------------------------------

    def _freeze(self, task: Task, losses: Sequence[float]) -> None:
        """Counts the task for all experts that learned it, and freezes them for good if its loss, terms of routing and
        distillation included, reached a plateau."""
        cfg, learned = self.cfg, self._learning()
        converged = cfg.freeze_on_convergence and plateau(losses, cfg.plateau_epochs, cfg.plateau_tolerance)
        for e in learned:
            self.population.experts[e].tasks += 1
            self.population.experts[e].frozen = converged
        rule = {"epochs": cfg.plateau_epochs, "tolerance": cfg.plateau_tolerance}
        self.log.row("freeze", task=task.index, learned=learned, converged=converged, losses=list(losses), **rule)

    # 7 End of a task: use, merging, embeddings -----------------------------------------------------------------------

    def consolidate(self, task: Task) -> None:
        """Measures the use of experts, merges those that no task used much and stores the task's embeddings.

        Then everything is frozen."""
        gates = log_use(self, task, self.population)
        if gates is not None:
            self.population.merge_unused(self, task, gates, self.cfg.merge_below, lambda: mean_gates(self, task))
        assert self._pending is not None, "consolidate follows learn"
        means, counts, rows = self._pending
        self._place_embeddings(0, means, counts)
        self.population.owners += [(task.index, self.population.target)] * len(means)
        self._store(task, rows)
        self._pending = None
        if task.total == self.num_classes:
            self._replay_decisions()
        super().consolidate(task)

    def _replay_decisions(self) -> None:
        """Logs at which tasks another threshold would have spawned."""
        spawned = spawned_at(self.decisions, policy_of(self.cfg))
        self.log.row("would_spawn", thresholds=list(spawned), tasks=list(spawned.values()))
        self.log.info(in_words(spawned))

    def task_experts(self) -> dict[int, int]:
        return dict(self.population.owners) if self.cfg.grow_experts else {}

    def selections(self) -> list[dict[str, Any]]:
        """The task's decision, from which `novelty.replay` derives what another threshold would have done."""
        return [{"kind": "novelty", **asdict(decision)} for decision in self.decisions[-1:]]

    # Bookkeeping (prediction is the base's) ---------------------------------------------------------------------------

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
            **self.population.structure(),
            "kept": self.replay_rows,
            "decisions": [asdict(decision) for decision in self.decisions],
        }

    def restore(self, structure: dict[str, Any]) -> None:
        super().restore(structure)
        self.population.restore(structure, self.initialise)
        self.replay_rows = list(structure["kept"])
        self.decisions = novelty.decisions(structure["decisions"])
        self._place_embeddings(len(self.population.owners))

    def planned_parameters(self) -> list[tuple[str, int]]:
        if not self.cfg.grow_experts or self.cfg.num_experts == 1:
            return planned(self._groups(self._learning()))
        later = self.sketch()
        later.population.add(later.initialise)
        columns = later.population.columns([1])
        expert = [group for group in later._groups([1]) if group.name == "experts"]
        return [
            ("first task: one expert a layer and the head", count(self._groups([0]))),
            ("each added expert with its router columns", count(expert) + count(columns)),
        ]
