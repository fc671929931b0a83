"""Keys that the prompt methods share. The names are LAMDA-PILOT's.

Imports nothing heavy, so that bad input is refused before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from utils.config.schema import Trained
from utils.config.split import Split


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
            "predefined_key",
        }
    )

    tuned_epoch: int = Field(5, ge=0, description="epochs: passes over the training images of each task")
    optimizer: Literal["sgd", "adam"] = Field(
        "adam", description="sgd (momentum 0.9) or adam with the L2 penalty in the gradient, as LAMDA-PILOT"
    )
    init_lr: float = Field(0.001, gt=0, le=100, description="learning rate at the start of each task")
    weight_decay: float = Field(0.0, ge=0, le=10, description="L2 penalty in the gradient")
    decay_other_rows: bool = Field(
        False,
        description="weight decay also moves the rows of head and prompts that get no gradient in a task, as in LAMDA-PILOT; "
        "with adam by about init_lr a step",
    )

    def classes_in_loss(self, classes: Sequence[int]) -> Sequence[int]:
        """The cross-entropy is among a task's classes alone."""
        return classes


class PoolSettings(PromptSettings):
    """A pool of prompts. An image's query, its pooled feature without prompts, selects some of the pool's prompts."""

    only: ClassVar[dict[str, Any]] = PromptSettings.only | {
        "prompt_pool": True,
        "prompt_key": True,
        "prompt_key_init": "uniform",
        "embedding_key": "cls",
    }

    scheduler: Literal["constant", "cosine"] = Field(
        "constant",
        description="learning rate within a task: constant, or a cosine from init_lr to min_lr over its epochs",
    )
    size: int = Field(10, ge=1, le=10_000, description="number of prompts in the pool")
    length: int = Field(5, ge=1, le=1000, description="length of a prompt, tokens")
    top_k: int = Field(5, ge=1, le=1000, description="number of prompts chosen for an image")
    batchwise_prompt: bool = Field(
        False,
        description="choose the same prompts for a whole batch, by majority, in testing too, as LAMDA-PILOT; false: choose "
        "for each image, so that no prediction depends on the rest of its batch",
    )
    pull_constraint: bool = Field(True, description="add a loss that pulls the chosen keys towards the queries")
    pull_constraint_coeff: float = Field(0.1, ge=0, le=1e6, description="weight of that loss")
    use_prompt_mask: bool = Field(
        False,
        description="task t, counted from 0, trains prompts t*top_k to (t+1)*top_k-1 only, as far as the pool has them",
    )
    shared_prompt_pool: bool = Field(
        False, description="with use_prompt_mask, start a task's prompts as copies of the previous task's"
    )
    shared_prompt_key: bool = Field(
        False, description="with use_prompt_mask, start a task's keys as copies of the previous task's"
    )

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        yield from self.has_no_effect("scheduler constant", self.scheduler == "constant", "min_lr")
        yield from self.has_no_effect("pull_constraint false", not self.pull_constraint, "pull_constraint_coeff")

    def remarks_on(self, split: Split) -> Iterator[str]:
        yield from super().remarks_on(split)
        served = self.size // self.top_k
        if self.use_prompt_mask and served < len(split):
            yield (
                f"size: {self.size} prompts are enough for {served} tasks of top_k {self.top_k}, and there are {len(split)}: "
                f"from task {served + 1} on a task trains prompts of earlier tasks; set size to {len(split) * self.top_k}"
            )

    def cross_checks(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().cross_checks()
        if self.top_k > self.size:
            yield ("top_k", "size"), f"top_k: {self.top_k} prompts cannot be chosen from a pool of size {self.size}"
        if (self.shared_prompt_pool or self.shared_prompt_key) and not self.use_prompt_mask:
            yield (
                ("shared_prompt_pool", "shared_prompt_key", "use_prompt_mask"),
                "shared_prompt_pool, shared_prompt_key: have an effect with use_prompt_mask only; set it to true",
            )
