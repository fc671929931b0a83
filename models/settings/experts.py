"""Keys of experts that are added, trained, frozen and merged, in groups: novelty, router and gates, life of an expert.

Imports nothing heavy, so that bad input is refused before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from models.settings.rates import RoutedSettings
from utils.config.split import Split


class ExpertSettings(RoutedSettings):
    """Experts. How large, how many, and where in a block they act."""

    ffn_num: int = Field(16, ge=1, le=4096, description="rank of a new expert")
    num_experts: int = Field(8, ge=1, le=64, description="most experts in a layer; the first task adds one")
    grow_experts: bool = Field(
        True, description="add an expert when a task is new; false: all num_experts from the start, as a control"
    )
    lora_target: tuple[Literal["qkv", "proj", "fc1", "fc2"], ...] | None = Field(
        None,
        description="linear layers of the block to which experts are LoRA updates; null: experts are adapters beside the MLP",
    )

    def cross_checks(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().cross_checks()
        targets = self.lora_target
        if targets is not None and (not targets or len(set(targets)) < len(targets)):
            yield (
                ("lora_target",),
                f"lora_target: a list of different layers among qkv, proj, fc1, fc2 or null is expected; got {list(targets)}",
            )

    def _named(self, *starts: str) -> list[str]:
        return [key for key in type(self).model_fields if key.startswith(starts)]


class NoveltySettings(ExpertSettings):
    """Novelty. Whether a task gets a new expert."""

    novelty_threshold_mode: Literal["fixed", "adaptive", "calibrated"] = Field(
        "calibrated",
        description="similarity below which a task is new. fixed: novelty_threshold; adaptive: novelty_threshold - "
        "novelty_delta log(1 + experts); calibrated: the novelty_quantile of the similarities among the classes of one task",
    )
    novelty_threshold: float = Field(
        0.5,
        ge=-2,
        le=2,
        description="threshold on the similarity, a cosine after the mean of the past was subtracted; 2 adds an expert in "
        "every task, -2 never; calibrated uses it until a task had two classes",
    )
    novelty_delta: float = Field(
        0.1, ge=0, le=2, description="adaptive: how fast the threshold falls with the number of experts"
    )
    novelty_quantile: float = Field(0.5, ge=0, le=1, description="calibrated: the quantile that is the threshold")
    novelty_similarity: Literal["max", "median"] = Field(
        "max",
        description="similarity of a class to an expert: the largest or the median cosine to the classes it learned",
    )
    novelty_min_samples: int = Field(1, ge=1, description="training images that a task needs to be new")
    novelty_cooldown: int = Field(0, ge=0, description="number of tasks after a new expert in which none is added")
    novelty_confidence: float = Field(
        0.95,
        ge=0,
        lt=1,
        description="confidence of the bootstrap interval that must lie below the threshold; 0: compare the estimate itself",
    )
    novelty_resamples: int = Field(200, ge=10, le=100_000, description="number of bootstrap resamples")

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        mode = self.novelty_threshold_mode
        acting = {"adaptive": "novelty_delta", "calibrated": "novelty_quantile"}
        silent = [key for kind, key in acting.items() if kind != mode]
        yield from self.has_no_effect(f"novelty_threshold_mode {mode}", True, *silent)
        if mode == "calibrated" and self.is_set("novelty_threshold"):
            yield "novelty_threshold has an effect with novelty_threshold_mode calibrated only until a task had two classes"
        yield from self.has_no_effect("novelty_confidence 0", not self.novelty_confidence, "novelty_resamples")
        why = "num_experts 1" if self.num_experts == 1 else "grow_experts false"
        grows = self.num_experts > 1 and self.grow_experts
        yield from self.has_no_effect(why, not grows, *self._named("novelty_"))

    def remarks_on(self, split: Split) -> Iterator[str]:
        yield from super().remarks_on(split)
        if self.num_experts == 1 or not self.grow_experts or len(split) == 1:
            return
        if self.novelty_cooldown >= len(split) - 1:
            yield (
                f"novelty_cooldown: after the expert of the first task none is added for {self.novelty_cooldown} tasks, and "
                f"only {len(split) - 1} follow: no expert is ever added; lower it"
            )
        largest = max(split.images[1:]) if split.images else self.novelty_min_samples
        if largest < self.novelty_min_samples:
            yield (
                f"novelty_min_samples: {self.novelty_min_samples} images are needed, and no task after the first has more "
                f"than {largest}: no expert is ever added; lower it"
            )


class GateSettings(ExpertSettings):
    """Router and gates. How experts are mixed, and when an expert is mature enough to be left out."""

    train_columns: Literal["trained", "all"] = Field(
        "trained",
        description="router columns trained in a task: those of the experts that train and of the task's expert, or all",
    )
    use_moe_routing: bool = Field(True, description="mix experts by a router; false: their sum, as a control")
    router_scope: Literal["shared", "layer"] = Field(
        "shared",
        description="one router that reads the first adapted layer's input, or a router in each layer that reads "
        "that layer's input",
    )
    router_granularity: Literal["token", "sample"] = Field(
        "token", description="gates for each token, or one set of gates for a whole image"
    )
    router_column_start: Literal["zero", "prototype"] = Field(
        "zero",
        description="router column of a new expert: zero, an equal share of every image; prototype, the linear discriminant "
        "of the new task against the first, so that old images stay with the old experts",
    )
    router_centre: bool = Field(True, description="subtract the mean token of the first task from the router's input")
    router_lr: float | None = Field(None, gt=0, le=100, description="learning rate of the router; null: init_lr")
    router_aux_loss_coef: float = Field(
        0.01,
        ge=0,
        le=100,
        description="weight of the balance loss among mature experts that train (Switch Transformer, arXiv 2101.03961, eq. 4)",
    )
    router_entropy_coef: float = Field(
        0.01,
        ge=0,
        le=100,
        description="weight of the entropy loss (LIMoE, arXiv 2206.02770) in place of the balance loss while every "
        "expert is used",
    )
    router_z_loss_coef: float = Field(
        0.001, ge=0, le=100, description="weight of the z-loss (ST-MoE, arXiv 2202.08906, eq. 5)"
    )
    router_temperature_start: float = Field(
        2.0, gt=0, le=100, description="softmax temperature of the router at a task's first step"
    )
    router_temperature_end: float = Field(
        1.0, gt=0, le=100, description="temperature at a task's last step and in evaluation; it falls geometrically"
    )
    top_k_experts: int = Field(
        2, ge=1, le=64, description="mature experts used for an input; young experts are always used"
    )
    maturity_tasks: int | None = Field(
        1,
        ge=1,
        description="an expert is mature at the start of a task after training in this many tasks; null: tasks do not count",
    )
    maturity_steps: int | None = Field(
        None,
        ge=1,
        description="an expert is mature after this many training steps, also within a task; null: steps do not count",
    )

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        if not self.use_moe_routing:
            silent = [*self._named("router_", "maturity_", "top_k"), "train_columns"]
            yield from self.has_no_effect("use_moe_routing false", True, *silent)
        elif self.num_experts == 1:
            yield from self.has_no_effect("num_experts 1", True, *self._named("router_"), "train_columns")
        elif self.maturity_tasks is None and self.maturity_steps is None:
            yield from self.has_no_effect("maturity_tasks and maturity_steps null", True, "top_k_experts")

    def remarks_on(self, split: Split) -> Iterator[str]:
        yield from super().remarks_on(split)
        limited = self.use_moe_routing and self.num_experts > 1 and (self.maturity_tasks or self.maturity_steps)
        if not limited or len(split) == 1:
            return
        most = min(self.num_experts, len(split)) if self.grow_experts else self.num_experts
        if self.is_set("top_k_experts") and most <= self.top_k_experts < self.num_experts:
            yield (
                f"top_k_experts: {self.top_k_experts} never chooses, since {len(split)} tasks add up to {most} experts at most"
            )
        steps = split.steps(self.epochs, self.batch_size)
        tasks = self.maturity_tasks is None or self.maturity_tasks >= len(split)
        if tasks and (self.maturity_steps is None or (steps is not None and self.maturity_steps > sum(steps))):
            lengths = {
                "maturity_tasks": (self.maturity_tasks, f"{len(split)} tasks"),
                "maturity_steps": (self.maturity_steps, f"{sum(steps or ())} training steps"),
            }
            for key, (needed, there) in lengths.items():
                if needed is not None:
                    yield (
                        f"{key}: an expert needs {needed}, and the run has {there}: until it is frozen no expert is mature, "
                        "and all act; lower it"
                    )

    def cross_checks(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().cross_checks()
        if self.router_column_start == "prototype" and not self.router_centre:
            yield (
                ("router_column_start", "router_centre"),
                "router_column_start: prototype compares a new task with the mean token of the first, so router_centre true is "
                "expected",
            )
        if self.top_k_experts > self.num_experts and self.is_set("top_k_experts"):
            yield (
                ("top_k_experts", "num_experts"),
                f"top_k_experts: {self.top_k_experts} is above num_experts {self.num_experts}; set it to at most that",
            )
        if self.router_temperature_end > self.router_temperature_start:
            yield (
                ("router_temperature_start", "router_temperature_end"),
                f"router_temperature_end: {self.router_temperature_end:g} is above router_temperature_start "
                f"{self.router_temperature_start:g}, but temperatures fall",
            )
        yield from self.must_not_rise("router_lr", self.router_lr)


class LifeSettings(ExpertSettings):
    """Life of an expert. What happens after it was added: distillation, rank growth, freezing, merging."""

    distill_coef: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="weight of the distillation loss towards the previous model, while mature experts train; 0: none",
    )
    distill_on: Literal["features", "logits"] = Field(
        "features",
        description="distil features by mean squared error, or the old classes' logits by KL divergence (LwF, "
        "arXiv 1606.09282)",
    )
    expert_rank_max: int | None = Field(
        None,
        ge=2,
        le=4096,
        description="rank up to which a task's expert grows when its loss on held-out images has plateaued; null: never",
    )
    rank_growth_step: int = Field(
        4, ge=1, le=4096, description="ranks added at once; the expert's output stays the same"
    )
    rank_growth_epochs: int = Field(2, ge=1, description="epochs of training after each growth")
    rank_growth_val_ratio: float = Field(
        0.1, gt=0, lt=1, description="share of each class's training images held out to measure that loss"
    )
    freeze_on_convergence: bool = Field(
        True, description="freeze an expert for good after a task in which it trained and the loss plateaued"
    )
    plateau_epochs: int = Field(2, ge=1, description="epochs without improvement after which a loss has plateaued")
    plateau_tolerance: float = Field(
        0.01, ge=0, lt=1, description="relative decrease of the loss that counts as improvement"
    )
    merge_below: float = Field(
        0.0,
        ge=0,
        le=1,
        description="merge an expert into the most used one if its mean gate was below this value in every task; 0: never",
    )

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        yield from self.has_no_effect("distill_coef 0", not self.distill_coef, "distill_on")
        yield from self.has_no_effect(
            "expert_rank_max null", self.expert_rank_max is None, *self._named("rank_growth_")
        )
        if self.expert_rank_max is not None and self.epochs <= self.plateau_epochs:
            yield f"no rank ever grows: {self.epochs} epochs cannot show a plateau of plateau_epochs {self.plateau_epochs}"
        changed = any(self.is_set(key) for key in self._named("plateau_"))
        if (
            self.freeze_on_convergence
            and changed
            and self.epochs <= self.plateau_epochs
            and self.expert_rank_max is None
        ):
            yield f"no expert ever freezes: {self.epochs} epochs cannot show a plateau of plateau_epochs {self.plateau_epochs}"
        unused = not self.freeze_on_convergence and self.expert_rank_max is None
        yield from self.has_no_effect("freeze_on_convergence false", unused, *self._named("plateau_"))

    def cross_checks(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().cross_checks()
        if self.expert_rank_max is not None and self.expert_rank_max <= self.ffn_num:
            yield (
                ("expert_rank_max", "ffn_num"),
                f"expert_rank_max: {self.expert_rank_max} leaves nothing to grow above ffn_num {self.ffn_num}",
            )
