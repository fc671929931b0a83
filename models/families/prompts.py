"""What the prompt methods share: an image's query from the model without prompts, kept where it can be, and how a pool learns.

Shapes: B batch, D width, S prompts of a pool, K chosen of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backbone.prefix_cache import PrefixCache
from backbone.prompts.prefixes import PromptPool, Queried, choose, pull
from backbone.vit import Activations
from models.learner.base import Learner as Base
from models.learner.fit import fit
from models.learner.groups import Recipe
from models.learner.losses import cross_entropy_among, keeping
from models.settings.prompts import PoolSettings
from utils.data.batches import Batches, TaskData
from utils.data.tasks import Task
from utils.process import parallel, stopwatch


class PromptLearner(Base):
    """A learner whose prompts depend on an image's query: its pooled feature in the backbone without prompts, [B, D].

    That never changes, so it is kept beside the prefix (prefix_cache), D numbers an image; what cannot be kept, as of freshly
    augmented images, is computed in a pass of its own."""

    _queries: PrefixCache | None = None

    @property
    def eval_batch_size(self) -> int:
        """That of training where images of a batch act on each other, as in the original: else results would depend on a key
        for memory."""
        mixing = (getattr(self.cfg, key, False) for key in ("batchwise_prompt", "scrambled_e_prompt"))
        return int(self.cfg.batch_size) if any(mixing) else super().eval_batch_size

    def begin_task(self) -> None:
        super().begin_task()
        if self._queries is not None:
            self._queries.forget_views()

    def streams(
        self,
        data: TaskData,
        size: int,
        *,
        epoch: int = 0,
        draw: str = "train",
        augment: bool = True,
        shuffle: bool = True,
        part: bool = False,
        keep: bool = True,
    ) -> Iterable[tuple[Any, Tensor, Tensor]]:
        """As the base's, with Queried in the place of what is known with its query."""
        how: dict[str, Any] = {"epoch": epoch, "draw": draw, "augment": augment, "shuffle": shuffle}
        own, views = super().streams(data, size, **how, part=part, keep=keep), self.cfg.train_views
        if not keep or not isinstance(data, TaskData) or self.cfg.prefix_cache == "off" or (augment and not views):
            return own
        if self._queries is None:
            self._queries = self._new_cache(self.backbone.without_slots(), "cache_queries")
        with stopwatch.section("prefix"):
            share = part and parallel.world() > 1
            found = self._queries.batches(data, size, self.backbone.depth, **how, views=views, part=share)
        return own if isinstance(found, Batches) else _beside(own, found)

    def begin(self, images: Tensor | Activations | Queried) -> tuple[Activations, Tensor]:
        """Where a pass with prompts starts, and the queries [B, D], without gradient. Images enter the stem once."""
        source = images.images if isinstance(images, Queried) else images
        start = source if isinstance(source, Activations) else self.backbone.prefix(source, 0)
        if isinstance(images, Queried):
            return start, images.query
        with torch.no_grad():
            return start, self.backbone.without_slots()(start)


def _beside(own: Iterable[tuple[Any, Tensor, Tensor]], queries: Iterable[tuple[Any, Tensor, Tensor]]) -> Any:
    for (images, labels, where), (query, *_) in zip(own, queries, strict=True):
        yield Queried(images, query.x[:, 0]), labels, where


def mask_of(cfg: PoolSettings, task: int) -> range | None:
    """The prompts that task number `task` trains under `use_prompt_mask`; None: those that its images choose, as in testing,
    which is also what happens where the pool has no more."""
    own = range(task * cfg.top_k, (task + 1) * cfg.top_k)
    return own if cfg.use_prompt_mask and own.stop <= cfg.size else None


@torch.no_grad()
def hand_down(pool: PromptPool, cfg: PoolSettings, task: int) -> None:
    """Start of a task with a mask: its prompts, and its keys, become copies of those of the task before, as asked."""
    own = mask_of(cfg, task)
    if task == 0 or own is None:
        return
    for parameter, asked in ((pool.prompts, cfg.shared_prompt_pool), (pool.keys, cfg.shared_prompt_key)):
        if asked:
            parameter[own.start : own.stop] = parameter[own.start - cfg.top_k : own.start].clone()


def chosen_in_training(similarity: Tensor, cfg: PoolSettings, task: int) -> Tensor:
    """Numbers [B, K] of the prompts that a batch of the task trains, from its similarities [B, S]."""
    own = mask_of(cfg, task)
    if own is None:
        return choose(similarity, cfg.top_k, cfg.batchwise_prompt)
    return torch.arange(own.start, own.stop, device=similarity.device).expand(len(similarity), -1)


def learn_from_pool(
    learner: PromptLearner,
    task: Task,
    pool: PromptPool,
    encode: Callable[[Activations, Tensor], Tensor],
    parameters: Sequence[nn.Parameter],
) -> None:
    """Trains `parameters`, the pool's and the head's among them, on cross-entropy among the task's classes, less the pull of
    the chosen keys. `encode(stream from the stem, numbers of the chosen prompts [B, K])` gives features [B, D]."""
    cfg: Any = learner.cfg
    learner.seen = task.total
    hand_down(pool, cfg, task.index)

    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        start, query = learner.begin(images)
        similarity = pool.similarity(query)
        ids = chosen_in_training(similarity, cfg, task.index)
        loss, correct = cross_entropy_among(learner.head(encode(start, ids)), labels, task.first, task.total)
        weight = cfg.pull_constraint_coeff if cfg.pull_constraint else 0.0
        return loss - weight * pull(similarity, ids), correct, loss

    own, learning = range(task.first, task.total), mask_of(cfg, task.index)
    rows = [*((p, own) for p in learner.head.parameters()), *((p, learning) for p in pool.parameters())]
    after_step = keeping(rows, cfg.decay_other_rows)
    how: dict[str, Any] = {"epochs": cfg.tuned_epoch, "lr": cfg.init_lr, "recipe": pool_recipe(cfg)}
    learner.train()
    fit(learner, task, step, parameters, phase="prompts", after_step=after_step, **how)


def pool_recipe(cfg: PoolSettings) -> Recipe:
    """The optimizer, and the rate over a task's epochs."""
    return Recipe(cfg.optimizer, cfg.weight_decay, None if cfg.scheduler == "cosine" else lambda epoch: 1.0)
