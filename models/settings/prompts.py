"""JSON keys that the prompt methods share, under LAMDA-PILOT's names.

Imports nothing heavy, so that bad input is refused before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field

from utils.config.schema import Trained


class PromptSettings(Trained):
    """Training of prompts. Every task starts with a new optimizer; the backbone stays the same."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        {
            "get_original_backbone",
            "reinit_optimizer",
            "pretrained",
            "drop",
            "drop_path",
            "freeze",
            "global_pool",
            "initializer",
        }
    )

    tuned_epoch: int = Field(5, ge=0, description="passes over each task")
    optimizer: Literal["sgd", "adam"] = Field(
        "adam", description="sgd (momentum 0.9) or adam, here with the L2 penalty in the gradient, as LAMDA-PILOT"
    )
    init_lr: float = Field(0.001, gt=0, le=100, description="learning rate at the start of each task")
    weight_decay: float = Field(0.0, ge=0, le=10, description="L2 penalty in the gradient")
    decay_other_rows: bool = Field(
        False,
        description="weight decay also moves rows of head and prompts that cannot learn in a task, as in LAMDA-PILOT: under "
        "adam by about init_lr a step",
    )


class PoolSettings(PromptSettings):
    """A pool of prompts. An image's query, its pooled feature without prompts, selects some of the pool's prompts."""

    only: ClassVar[dict[str, Any]] = PromptSettings.only | {
        "prompt_pool": True,
        "prompt_key": True,
        "prompt_key_init": "uniform",
        "embedding_key": "cls",
    }

    scheduler: Literal["constant", "cosine"] = Field(
        "constant", description="of the rate: constant, or a cosine to min_lr over the epochs of each task"
    )
    size: int = Field(10, ge=1, le=10_000, description="prompts in the pool")
    length: int = Field(5, ge=1, le=1000, description="tokens of a prompt")
    top_k: int = Field(5, ge=1, le=1000, description="prompts chosen for an image")
    batchwise_prompt: bool = Field(
        False,
        description="one choice by majority for a whole batch, in testing too, as LAMDA-PILOT; false: for each image by "
        "itself, so that no prediction depends on what else is in its batch",
    )
    pull_constraint: bool = Field(True, description="pull the chosen keys towards the queries")
    pull_constraint_coeff: float = Field(0.1, ge=0, le=1e6, description="weight of that pull in the loss")
    use_prompt_mask: bool = Field(
        False, description="task t trains prompts t*top_k to (t+1)*top_k-1, as far as the pool has them"
    )
    shared_prompt_pool: bool = Field(
        False, description="a task's prompts of the mask start as copies of those of the task before"
    )
    shared_prompt_key: bool = Field(False, description="so do their keys")

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        if self.scheduler == "constant" and self.is_set("min_lr"):
            yield "min_lr does not act with scheduler constant"
        yield from self.has_no_effect("pull_constraint false", not self.pull_constraint, "pull_constraint_coeff")

    def cross_checks(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().cross_checks()
        if self.top_k > self.size:
            yield ("top_k", "size"), f"top_k: {self.top_k} prompts cannot be chosen from a pool of size {self.size}"
        if (self.shared_prompt_pool or self.shared_prompt_key) and not self.use_prompt_mask:
            yield (
                ("shared_prompt_pool", "shared_prompt_key", "use_prompt_mask"),
                "shared_prompt_pool, shared_prompt_key: act with use_prompt_mask only",
            )
