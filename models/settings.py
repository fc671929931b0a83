"""JSON keys that several methods share: of layers that are adapted, and of slow and fast adapters in them (Nested LoRA).

Imports nothing heavy, so that bad input is refused before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from utils.config import Trained


class TaskRateSettings(Trained):
    """Keys of methods whose first task has passes and a rate of its own, in LAMDA-PILOT's names."""

    epochs: int = Field(20, ge=0, description="passes over each task")
    init_epoch: int | None = Field(None, ge=0, description="passes over the first task; null: epochs")
    lrate: float | None = Field(None, gt=0, le=100, description="learning rate in later tasks; null: init_lr")

    def passes(self, task: int) -> int:
        return self.epochs if task or self.init_epoch is None else self.init_epoch

    def rate(self, task: int) -> float:
        return self.init_lr if not task or self.lrate is None else self.lrate

    def cross_checks(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().cross_checks()
        yield from self.falls("lrate", self.lrate)


class SteppedSettings(Trained):
    """Keys of methods whose rate falls in steps, in LAMDA-PILOT's names."""

    milestones: tuple[int, ...] | None = Field(
        None,
        description="epochs, counted from 0, from which on the rate is lrate_decay times lower; null: cosine to min_lr",
    )
    lrate_decay: float = Field(0.1, ge=0, le=1, description="what the rate is multiplied by at each of milestones")

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        if self.milestones is not None and self.departs("min_lr"):
            yield "min_lr does not act with milestones: the rate falls in steps"
        yield from self.idle("milestones null", self.milestones is None, "lrate_decay")


class LayerSettings(Trained):
    """Keys of methods that train something in a range of layers, shared by all tasks."""

    epochs: int = Field(20, ge=0, description="passes over each task")
    adapt_start_layer: int | None = Field(
        None, ge=0, description="first layer that is adapted, counted from 0; null: the last three"
    )
    adapt_end_layer: int | None = Field(None, ge=0, description="last layer that is adapted; null: the backbone's last")
    decay_other_rows: bool = Field(
        False, description="weight decay also shrinks the head rows of other tasks, as in the originals"
    )


class RoutedSettings(LayerSettings):
    """Keys of methods whose experts are gated by a learned router."""

    routing_controls: bool = Field(
        True,
        description="after the last task, score the same model with uniform and random routing and with each expert alone: "
        "E + 2 more passes over the test images, which the learner never sees; not with one expert or no learned router",
    )


class NestedSettings(Trained):
    """Keys of slow and fast adapters, of what merges them, and of rates by parameter group."""

    head_lr: float | None = Field(None, gt=0, le=100, description="learning rate of the head; null: init_lr")
    nested_lora_rank: int = Field(16, ge=1, le=4096, description="rank of each slow and each fast adapter")
    nested_lora_activation: Literal["relu", "none"] = Field(
        "relu", description="between the two projections: relu, as SEMA's adapter, or none, the true LoRA"
    )
    nested_lora_levels: int = Field(
        2,
        ge=1,
        le=8,
        description="time scales: 1 a single adapter (the control), 2 slow and fast, more: some in between",
    )
    nested_lora_lr_fast: float | None = Field(
        None, ge=0, le=100, description="learning rate of the fast adapters; null: init_lr, 0: frozen"
    )
    nested_lora_lr_slow: float | None = Field(
        None,
        ge=0,
        le=100,
        description="learning rate of the slow adapter; null: a tenth of the fast rate (init_lr with 1 level), 0: frozen",
    )
    nested_lora_update_interval_slow: int = Field(1, ge=1, description="the slow adapter steps at every n-th step only")
    nested_lora_skipped_gradients: Literal["drop", "accumulate"] = Field(
        "drop", description="slow gradients of the steps between: dropped, or accumulated and their mean taken"
    )
    nested_lora_level_lrs: tuple[float, ...] | None = Field(
        None, description="rates of the levels between, from slow to fast; null: geometric between slow and fast"
    )
    nested_lora_level_intervals: tuple[int, ...] | None = Field(
        None, description="step intervals of the levels between, from slow to fast; null: geometric, rounded"
    )
    nested_lora_use_consolidation: bool = Field(
        True, description="merge fast into slow at the end of a task; false: both go on as they are"
    )
    nested_lora_consolidation_method: Literal["task_arithmetic", "pam_lite", "concat", "svd", "ema", "ties", "pam"] = (
        Field("concat", description="how fast is merged into slow, see backbone/consolidation.py")
    )
    nested_lora_consolidation_alpha: float = Field(
        1.0,
        ge=0,
        le=10,
        description="weight of fast in the merge; 1 keeps the function the head was trained on, but ema at 1 keeps fast alone",
    )
    nested_lora_consolidation_interval: int = Field(1, ge=1, description="tasks between two merges")
    nested_lora_consolidation_rank: int | None = Field(
        None,
        ge=1,
        description="largest rank of slow after concat, svd, ema or ties; null: concat grows, the others keep slow's",
    )
    nested_lora_reset: Literal["fresh", "zero"] = Field(
        "fresh",
        description="fast after a merge: fresh LoRA start values, or all zero as the original, which can never learn again",
    )
    nested_lora_eval: Literal["combined", "slow", "fast"] = Field(
        "combined", description="which part is evaluated: slow and fast together, or one alone"
    )
    head_recalibration: bool = Field(
        False, description="refit the task's rows of the linear head on the merged features of its training images"
    )

    @property
    def rate_slow(self) -> float:
        default = self.init_lr if self.nested_lora_levels == 1 else self.rate_fast / 10
        return default if self.nested_lora_lr_slow is None else self.nested_lora_lr_slow

    @property
    def rate_fast(self) -> float:
        return self.init_lr if self.nested_lora_lr_fast is None else self.nested_lora_lr_fast

    @property
    def rate_head(self) -> float:
        return self.init_lr if self.head_lr is None else self.head_lr

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        why, keys = "", [f"nested_lora_consolidation_{name}" for name in ("method", "alpha", "interval", "rank")]
        keys.append("nested_lora_reset")
        if self.nested_lora_levels == 1:
            why, keys = "nested_lora_levels 1", ["nested_lora_use_consolidation", *keys]
        elif not self.nested_lora_use_consolidation:
            why = "nested_lora_use_consolidation false"
        elif self.nested_lora_consolidation_method == "ema" and self.nested_lora_consolidation_alpha == 1:
            yield "nested_lora_consolidation_alpha 1 with ema keeps fast alone: every merge throws slow away; 0.5 is usual"
        if why and (given := [key for key in keys if self.departs(key)]):
            yield f"these keys do not act with {why}: {', '.join(given)}"
        if self.nested_lora_eval == "fast" and self.nested_lora_use_consolidation:
            yield (
                "nested_lora_eval fast: right after a merge fast has output 0, so those tasks are scored without adapters; "
                "set nested_lora_use_consolidation to false to see what fast learned"
            )
        every = self.nested_lora_update_interval_slow == 1 and self.nested_lora_level_intervals is None
        if self.nested_lora_skipped_gradients == "accumulate" and every:
            yield "nested_lora_skipped_gradients does not act: with nested_lora_update_interval_slow 1 no step is skipped"

    def cross_checks(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().cross_checks()
        method, activation = self.nested_lora_consolidation_method, self.nested_lora_activation
        if method == "ties" and activation == "relu" and self.nested_lora_use_consolidation:
            yield (
                ("nested_lora_consolidation_method", "nested_lora_activation"),
                "nested_lora_consolidation_method: ties elects signs in the product of the two projections, which is the "
                'function only for nested_lora_activation "none"; set that, or take concat, svd or ema',
            )
        if method == "ema" and self.nested_lora_consolidation_alpha > 1 and self.nested_lora_use_consolidation:
            yield (
                ("nested_lora_consolidation_alpha", "nested_lora_consolidation_method"),
                "nested_lora_consolidation_alpha: ema averages slow and fast, so at most 1 is expected; got "
                f"{self.nested_lora_consolidation_alpha:g}",
            )
        if self.nested_lora_consolidation_rank is not None and method in ("task_arithmetic", "pam_lite", "pam"):
            yield (
                ("nested_lora_consolidation_rank", "nested_lora_consolidation_method"),
                f"nested_lora_consolidation_rank: {method} never changes the rank; remove it, or take concat, svd or ema",
            )
        between = max(self.nested_lora_levels - 2, 0)
        for key in ("nested_lora_level_lrs", "nested_lora_level_intervals"):
            values = getattr(self, key)
            if values is not None and len(values) != between:
                yield (
                    (key, "nested_lora_levels"),
                    f"{key}: {len(values)} values, but nested_lora_levels {self.nested_lora_levels} has {between} "
                    f"level{'s' * (between != 1)} between slow and fast",
                )
            elif values is not None and min(values, default=1) <= 0:
                yield (key,), f"{key}: every value must be above 0; got {list(values)}"
            elif key == "nested_lora_level_lrs" and max(values or (0,)) > 100:
                yield (key,), f"{key}: every rate must be at most 100; got {list(values or ())}"
        if self.nested_lora_levels == 1:
            for key in ("nested_lora_lr_fast", "nested_lora_eval", "nested_lora_consolidation_method"):
                if self.departs(key):
                    yield (
                        (key, "nested_lora_levels"),
                        f"{key}: acts on fast adapters, and with nested_lora_levels 1 there are none",
                    )
        if self.head_recalibration and self.head != "linear":
            yield (
                ("head_recalibration", "head"),
                f"head_recalibration: refits the linear head, which head {self.head!r} does not predict with",
            )
        for key in ("head_lr", "nested_lora_lr_slow", "nested_lora_lr_fast", "nested_lora_level_lrs"):
            rates = getattr(self, key)
            for rate in rates if isinstance(rates, tuple) else (rates,):
                yield from self.falls(key, rate)
        nested = getattr(self, "ffn_adapter_type", "nested_lora") == "nested_lora"
        if nested and self.nested_lora_lr_slow is None and self.min_lr <= self.rate_fast:
            yield from self.falls("nested_lora_lr_slow", self.rate_slow, f"{self.rate_slow:g}, the slow rate")


class SharedAdapterSettings(NestedSettings, LayerSettings):
    """Keys of methods with one nested adapter a layer that all tasks share. SEMA's keys that their files carry never act."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        {"ffn_adapter_type", "ffn_num", "func_epoch", "rd_epoch", "rd_lr", "rd_dim", "buffer_size"}
        | {"detect_batch_size", "exp_threshold"}
    )


# what a session of training takes, by the keys' names
SESSION_KEYS = (
    "optimizer",
    "init_lr",
    "min_lr",
    "weight_decay",
    "ffn_num",
    "ffn_adapter_scalar",
    "ffn_adapter_dropout",
)


class SessionSettings(Trained):
    """Keys of methods that train one AdaptFormer adapter in every layer, with a cosine head that is dropped afterwards."""

    ffn_num: int = Field(64, ge=1, le=4096, description="rank of the adapter in each layer")
    ffn_adapter_scalar: float = Field(
        0.1, gt=0, le=1e6, description="factor on every adapter's output, a constant in the originals"
    )
    ffn_adapter_dropout: float = Field(
        0.1, ge=0, lt=1, description="dropout in the bottleneck, in training; a constant in the originals"
    )
