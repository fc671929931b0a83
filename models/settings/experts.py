"""JSON keys of experts that come and go, one group a phase: novelty, gates, and the life of an expert after its birth.

Imports nothing heavy, so that bad input is refused before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from models.settings.rates import RoutedSettings


class ExpertSettings(RoutedSettings):
    """Experts. How large, how many, and where in a block they act."""

    ffn_num: int = Field(16, ge=1, le=4096, description="rank of a new expert")
    num_experts: int = Field(8, ge=1, le=64, description="most experts in a layer; the first task brings one")
    grow_experts: bool = Field(
        True, description="add an expert where a task is new; false: all num_experts from the start, as a control"
    )
    lora_target: tuple[Literal["qkv", "proj", "fc1", "fc2"], ...] | None = Field(
        None, description="linear layers of the block on which experts are LoRA; null: adapters beside the MLP"
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

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        mode = self.novelty_threshold_mode
        acting = {"adaptive": "novelty_delta", "calibrated": "novelty_quantile"}
        silent = [key for kind, key in acting.items() if kind != mode]
        yield from self.has_no_effect(f"novelty_threshold_mode {mode}", True, *silent)
        if mode == "calibrated" and self.is_set("novelty_threshold"):
            yield "novelty_threshold acts with novelty_threshold_mode calibrated only while no task had two classes"
        yield from self.has_no_effect("novelty_confidence 0", not self.novelty_confidence, "novelty_resamples")
        why = "num_experts 1" if self.num_experts == 1 else "grow_experts false"
        grows = self.num_experts > 1 and self.grow_experts
        yield from self.has_no_effect(why, not grows, *self._named("novelty_"))


class GateSettings(ExpertSettings):
    """Router and gates. How experts are mixed, and when an expert is mature enough to be left out."""

    train_columns: Literal["trained", "all"] = Field(
        "trained",
        description="router columns that learn a task: those of the experts that do and of the target, or all",
    )
    use_moe_routing: bool = Field(True, description="mix experts by a router; false: their plain sum, as a control")
    router_scope: Literal["shared", "layer"] = Field(
        "shared", description="gates of all layers from the first layer's input, or each layer's from its own"
    )
    router_granularity: Literal["token", "sample"] = Field("token", description="what is routed")
    router_column_start: Literal["zero", "prototype"] = Field(
        "zero",
        description="router column of an added expert: zero, an even share of everything; or the linear discriminant of the "
        "new task against the first, so that old images stay with the old experts",
    )
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

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        if not self.use_moe_routing:
            silent = [*self._named("router_", "maturity_", "top_k"), "train_columns"]
            yield from self.has_no_effect("use_moe_routing false", True, *silent)
        elif self.num_experts == 1:
            yield from self.has_no_effect("num_experts 1", True, *self._named("router_"), "train_columns")
        elif self.maturity_tasks is None and self.maturity_steps is None:
            yield from self.has_no_effect("maturity_tasks and maturity_steps null", True, "top_k_experts")

    def cross_checks(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().cross_checks()
        if self.router_column_start == "prototype" and not self.router_centre:
            yield (
                ("router_column_start", "router_centre"),
                "router_column_start: prototype tells a new task from the first one's mean token, so router_centre true is "
                "expected",
            )
        if self.top_k_experts > self.num_experts and self.is_set("top_k_experts"):
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
        yield from self.must_not_rise("router_lr", self.router_lr)


class LifeSettings(ExpertSettings):
    """Life of an expert. What happens after it was added: distillation, rank growth, freezing, merging."""

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

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        yield from self.has_no_effect("distill_coef 0", not self.distill_coef, "distill_on")
        yield from self.has_no_effect(
            "expert_rank_max null", self.expert_rank_max is None, *self._named("rank_growth_")
        )
        if self.expert_rank_max is not None and self.epochs <= self.plateau_epochs:
            yield f"no rank ever grows: {self.epochs} epochs cannot show a stall over plateau_epochs {self.plateau_epochs}"
        given = [key for key in self._named("plateau_") if self.is_set(key)]
        if self.freeze_on_convergence and given and self.epochs <= self.plateau_epochs and self.expert_rank_max is None:
            yield f"no expert ever freezes: {self.epochs} epochs show no plateau over plateau_epochs {self.plateau_epochs}"
        unused = not self.freeze_on_convergence and self.expert_rank_max is None
        yield from self.has_no_effect("freeze_on_convergence false", unused, *self._named("plateau_"))

    def cross_checks(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().cross_checks()
        if self.expert_rank_max is not None and self.expert_rank_max <= self.ffn_num:
            yield (
                ("expert_rank_max", "ffn_num"),
                f"expert_rank_max: {self.expert_rank_max} leaves nothing to grow above ffn_num {self.ffn_num}",
            )
