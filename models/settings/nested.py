"""Keys of adapters with several time scales: rates, step intervals, consolidation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from models.settings.rates import LayerSettings
from utils.config.schema import Trained
from utils.config.split import Split, named


class NestedSettings(Trained):
    """Slow and fast adapters. The time scales, how they are merged, and the rate of each parameter group."""

    head_lr: float | None = Field(None, gt=0, le=100, description="learning rate of the head; null: init_lr")
    nested_lora_rank: int = Field(16, ge=1, le=4096, description="rank R of each slow and each fast adapter")
    nested_lora_activation: Literal["relu", "none"] = Field(
        "relu", description="function between the two projections: relu, as SEMA's adapter, or none, which is LoRA"
    )
    nested_lora_levels: int = Field(
        2,
        ge=1,
        le=8,
        description="number of time scales: 1 is a single adapter (the control), 2 slow and fast, more add levels between them",
    )
    nested_lora_lr_fast: float | None = Field(
        None, ge=0, le=100, description="learning rate of the fast adapters; null: init_lr; 0: frozen"
    )
    nested_lora_lr_slow: float | None = Field(
        None,
        ge=0,
        le=100,
        description="learning rate of the slow adapter; null: a tenth of the fast rate, or init_lr with 1 level; 0: frozen",
    )
    nested_lora_update_interval_slow: int = Field(
        1, ge=1, description="the slow adapter is updated at every n-th training step"
    )
    nested_lora_skipped_gradients: Literal["drop", "accumulate"] = Field(
        "drop", description="gradients of slow at the steps between its updates: dropped, or accumulated and averaged"
    )
    nested_lora_level_lrs: tuple[float, ...] | None = Field(
        None, description="learning rates of the levels between, from slow to fast; null: a geometric series"
    )
    nested_lora_level_intervals: tuple[int, ...] | None = Field(
        None,
        description="training steps between updates of the levels between, from slow to fast; null: a geometric "
        "series, rounded",
    )
    nested_lora_use_consolidation: bool = Field(
        True, description="merge fast into slow at the end of a task; false: never merge, both keep training"
    )
    nested_lora_consolidation_method: Literal["task_arithmetic", "pam_lite", "concat", "svd", "ema", "ties", "pam"] = (
        Field("concat", description="how fast is merged into slow; formulas in backbone/adapters/consolidation.py")
    )
    nested_lora_consolidation_alpha: float = Field(
        1.0,
        ge=0,
        le=10,
        description="weight of fast in the merge; at 1 the merged adapter computes what the head was trained on, "
        "except with ema, which keeps fast alone",
    )
    nested_lora_consolidation_interval: int = Field(1, ge=1, description="tasks between two merges")
    nested_lora_consolidation_rank: int | None = Field(
        None,
        ge=1,
        description="largest rank of slow after concat, svd, ema or ties; null: concat grows by the rank of fast, "
        "the others keep the rank",
    )
    nested_lora_reset: Literal["fresh", "zero"] = Field(
        "fresh",
        description="fast after a merge: new LoRA start values, or all zeros as in the original, where it never learns again",
    )
    nested_lora_eval: Literal["combined", "slow", "fast"] = Field(
        "combined", description="which adapters are evaluated: slow and fast together, or one alone"
    )
    head_recalibration: bool = Field(
        False,
        description="after a merge, refit the task's rows of the linear head on the features of its training images",
    )

    @property
    def rate_slow(self) -> float:
        """Learning rate of slow at the start of a task."""
        default = self.init_lr if self.nested_lora_levels == 1 else self.rate_fast / 10
        return default if self.nested_lora_lr_slow is None else self.nested_lora_lr_slow

    @property
    def rate_fast(self) -> float:
        """Learning rate of fast at the start of a task."""
        return self.init_lr if self.nested_lora_lr_fast is None else self.nested_lora_lr_fast

    @property
    def rate_head(self) -> float:
        """Learning rate of the head at the start of a task."""
        return self.init_lr if self.head_lr is None else self.head_lr

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        single, merges = self.nested_lora_levels == 1, self.nested_lora_use_consolidation
        merging = [f"nested_lora_consolidation_{name}" for name in ("method", "alpha", "interval", "rank")]
        merging.append("nested_lora_reset")
        yield from self.has_no_effect("nested_lora_levels 1", single, "nested_lora_use_consolidation", *merging)
        yield from self.has_no_effect("nested_lora_use_consolidation false", not single and not merges, *merging)
        fast_alone = self.nested_lora_consolidation_method == "ema" and self.nested_lora_consolidation_alpha == 1
        if fast_alone and merges and not single:
            yield "nested_lora_consolidation_alpha 1 with ema replaces slow by fast at every merge; 0.5 is usual"
        if self.nested_lora_eval == "fast" and merges:
            yield (
                "nested_lora_eval fast: after a merge the output of fast is 0, so those tasks are scored without adapters; "
                "set nested_lora_use_consolidation to false to see what fast learned"
            )
        every = self.nested_lora_update_interval_slow == 1 and self.nested_lora_level_intervals is None
        yield from self.has_no_effect("nested_lora_update_interval_slow 1", every, "nested_lora_skipped_gradients")

    def classes_in_loss(self, classes: Sequence[int]) -> Sequence[int]:
        """The cross-entropy is among a task's classes alone."""
        return classes

    def never_due(self, split: Split, epochs: int, held_out: float = 0.0) -> Iterator[str]:
        """For `remarks_on`: notes on intervals that are longer than a task's steps, or than the run's tasks.

        `epochs` that a task trains adapters; `held_out`: share of its images that is not trained on."""
        steps = split.steps(epochs, self.batch_size, held_out) if epochs else None
        intervals = {"nested_lora_update_interval_slow": [self.nested_lora_update_interval_slow]}
        intervals["nested_lora_level_intervals"] = list(self.nested_lora_level_intervals or ())
        for key, values in intervals.items():
            short = [task for task, count in enumerate(steps or ()) if count < max(values, default=0)]
            if steps and short:
                adapter = "the slow adapter is" if key.endswith("slow") else "an adapter between slow and fast is"
                fewest, most = min(steps[t] for t in short), max(steps[t] for t in short)
                counted = f"{fewest}" if fewest == most else f"{fewest} to {most}"
                yield (
                    f"{key}: {max(values)} is more than the {counted} training steps of {named(short, len(split))}: "
                    f"{adapter} never updated there; set it to at most {min(steps)}"
                )
        every, levels = self.nested_lora_consolidation_interval, self.nested_lora_levels
        if self.nested_lora_use_consolidation and levels > 1 and every ** (levels - 1) > len(split) and every > 1:
            never = "fast is never merged" if every > len(split) else "nothing is ever merged into slow"
            powers = f", and into slow {every}^{levels - 1}" if every <= len(split) else ""
            yield (
                f"nested_lora_consolidation_interval: {every} tasks lie between two merges{powers}, and there are {len(split)} "
                f"tasks: {never}; lower it, or set nested_lora_use_consolidation to false"
            )

    def cross_checks(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().cross_checks()
        method, activation = self.nested_lora_consolidation_method, self.nested_lora_activation
        if method == "ties" and activation == "relu" and self.nested_lora_use_consolidation:
            yield (
                ("nested_lora_consolidation_method", "nested_lora_activation"),
                "nested_lora_consolidation_method: ties elects signs in the product of the two projections, which is the "
                'adapter only with nested_lora_activation "none"; set that, or take concat, svd or ema',
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
                f"nested_lora_consolidation_rank: {method} leaves the rank as it is; remove the key, or take "
                f"concat, svd or ema",
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
                if self.is_set(key):
                    yield (
                        (key, "nested_lora_levels"),
                        f"{key}: is for fast adapters, and with nested_lora_levels 1 there are none; remove it",
                    )
        if self.head_recalibration and self.head != "linear":
            yield (
                ("head_recalibration", "head"),
                f"head_recalibration: refits the linear head, but head {self.head!r} predicts; remove one of the two",
            )
        for key in ("head_lr", "nested_lora_lr_slow", "nested_lora_lr_fast", "nested_lora_level_lrs"):
            rates = getattr(self, key)
            for rate in rates if isinstance(rates, tuple) else (rates,):
                yield from self.must_not_rise(key, rate)
        nested = getattr(self, "ffn_adapter_type", "nested_lora") == "nested_lora"
        if nested and self.nested_lora_lr_slow is None and self.min_lr <= self.rate_fast:
            yield from self.must_not_rise("nested_lora_lr_slow", self.rate_slow, f"{self.rate_slow:g}, the slow rate")


class SharedAdapterSettings(NestedSettings, LayerSettings):
    """One nested adapter a layer, shared by all tasks. SEMA's keys in the files of these methods have no effect."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        {"ffn_adapter_type", "ffn_num", "func_epoch", "rd_epoch", "rd_lr", "rd_dim", "buffer_size"}
        | {"detect_batch_size", "exp_threshold"}
    )

    def remarks_on(self, split: Split) -> Iterator[str]:
        yield from super().remarks_on(split)
        yield from self.never_due(split, self.epochs, self.held_out)

    @property
    def held_out(self) -> float:
        """Share of each class's training images that is not trained on."""
        return 0.0
