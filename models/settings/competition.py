"""Keys of fast experts that compete: how many, at which rates, on which images the winner is selected, what restarts.

Imports nothing heavy, so that bad input is refused before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from models.settings.nested import SharedAdapterSettings


class CompetitionSettings(SharedAdapterSettings):
    """Fast experts that compete. Rates, time scales and merging are keys of slow and fast adapters."""

    num_experts: int = Field(
        4, ge=1, le=64, description="number K of fast experts in each layer (nb_tasks in Nested-LoRA's files)"
    )
    moe_mode: Literal["parallel", "task"] = Field(
        "parallel",
        description="parallel: all experts compete in every task; task: task t, counted from 0, trains expert t mod K",
    )
    moe_heads: Literal["shared", "per_expert"] = Field(
        "shared", description="one linear head for all branches, or one for each, where the winner's is used"
    )
    moe_loss: Literal["sum", "mean"] = Field(
        "sum",
        description="sum of the branches' mean losses, with gradients of shared parameters divided by K; or the mean over all "
        "K B samples, as the original, which divides every expert's rate by K",
    )
    fast_lr_multipliers: tuple[float, ...] | None = Field(
        None, description="factors on the fast learning rate, one for each of K experts; null: 1, 1/2, 1/4, ..."
    )
    moe_val_ratio: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of each class's training images held out to select the winner; 0 only for K = 1",
    )
    selection_split: Literal["validation", "test"] = Field(
        "validation",
        description="data on which the winner is selected; test uses test images and invalidates the result",
    )
    moe_reset: Literal["all", "winner"] = Field(
        "all",
        description="fast experts that start again after a merge: all, or the winner alone, as in the original. With all and "
        "a consolidation interval above 1, what earlier winners learned and did not merge is lost",
    )
    moe_eval: Literal["winner", "sum"] = Field(
        "winner", description="fast experts that are evaluated together with slow: the last winner, or the sum of all"
    )

    def multipliers(self) -> tuple[float, ...]:
        return self.fast_lr_multipliers or tuple(0.5**k for k in range(self.num_experts))

    @property
    def held_out(self) -> float:
        return self.moe_val_ratio if self.moe_mode == "parallel" and self.selection_split != "test" else 0.0

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        keys = ("moe_val_ratio", "moe_loss", "moe_reset", "fast_lr_multipliers")
        yield from self.has_no_effect("moe_mode task", self.moe_mode == "task", *keys)
        yield from self.has_no_effect("selection_split test", self.selection_split == "test", "moe_val_ratio")
        merges = self.nested_lora_use_consolidation
        yield from self.has_no_effect("nested_lora_use_consolidation false", not merges, "moe_reset")
        if self.moe_val_ratio > 0.5 and self.moe_mode == "parallel" and self.selection_split != "test":
            yield f"moe_val_ratio {self.moe_val_ratio:g}: more images are held out to select on than are trained on"
        fresh = self.nested_lora_use_consolidation and self.nested_lora_consolidation_interval == 1
        all_zero = self.moe_reset == "all" and self.moe_mode == "parallel" and fresh
        yield from self.has_no_effect(
            "moe_reset all, after which the output of fast experts is 0", all_zero, "moe_eval"
        )

    def cross_checks(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().cross_checks()
        factors, count = self.fast_lr_multipliers, self.num_experts
        if factors is not None and len(factors) != count:
            yield (
                ("fast_lr_multipliers", "num_experts"),
                f"fast_lr_multipliers: {len(factors)} values for num_experts {count}; one for each is expected",
            )
        elif factors is not None and min(factors) <= 0:
            yield ("fast_lr_multipliers",), f"fast_lr_multipliers: every value must be above 0; got {list(factors)}"
        elif self.rate_fast * max(self.multipliers()) > 100:
            yield (
                ("fast_lr_multipliers", "nested_lora_lr_fast"),
                f"fast_lr_multipliers: {max(self.multipliers()):g} times the fast rate {self.rate_fast:g} is above 100",
            )
        if count > 1 and self.moe_mode == "parallel" and not self.moe_val_ratio and self.selection_split != "test":
            yield (
                ("moe_val_ratio", "num_experts"),
                f"moe_val_ratio: 0 leaves no images on which to select among {count} experts; 0.1 is usual",
            )
        if self.moe_mode == "task":
            for key, why in (("selection_split", "nothing is selected"), ("moe_heads", "there is one head")):
                if self.is_set(key):
                    yield (key, "moe_mode"), f'{key}: {why} with moe_mode "task", remove one of the two'
        slowest = self.rate_fast * min(self.multipliers())
        if self.moe_mode == "parallel" and 0 < slowest < self.min_lr <= self.rate_fast:
            yield (
                ("min_lr", "fast_lr_multipliers"),
                f"min_lr: {self.min_lr} is above {slowest:g}, the rate of the slowest expert",
            )
        if self.nested_lora_levels == 1:
            yield ("nested_lora_levels",), "nested_lora_levels: competition needs fast experts, so at least 2"
