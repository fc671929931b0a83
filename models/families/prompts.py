"""What the prompt methods share: an image's query from the model without prompts, cached where possible, and how a pool learns.

Shapes: B batch, D width, S prompts of a pool, K chosen of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from backbone.prefix_cache import PrefixCache
from backbone.prompts.prefixes import PromptPool, Queried, choose, pull
from backbone.vit import Activations
from models.learner.base import Learner as Base
from models.learner.fit import fit
from models.learner.groups import Recipe
from models.learner.losses import Loss, cross_entropy_among, rows_of
from models.settings.prompts import PoolSettings
from utils.data.batches import Batches, TaskData
from utils.data.tasks import Task
from utils.process import parallel, stopwatch


class PromptLearner(Base):
    """A learner whose prompts depend on an image's query: its pooled feature in the backbone without prompts, [B, D].

    That never changes, so it is cached beside the prefix (prefix_cache), D numbers an image; the queries that cannot be
    cached, as of freshly augmented images, take a separate pass."""

    _queries: PrefixCache | None = None

    @property
    def eval_batch_size(self) -> int:
        """The training batch size where images of a batch influence each other, as in the original.

        Otherwise results would depend on `eval_batch_size`, a key that should only affect memory."""
        mixing = (getattr(self.cfg, key, False) for key in ("batchwise_prompt", "scrambled_e_prompt"))
        return int(self.cfg.batch_size) if any(mixing) else super().eval_batch_size

    def begin_task(self) -> None:
        super().begin_task()
        if self._queries is not None:
            self._queries.forget_views()

    def _batches(
        self, data: TaskData, size: int, *, augment: bool = True, shard: bool = False, keep: bool = True, **how: Any
    ) -> Iterable[tuple[Any, Tensor, Tensor]]:
        """Like the base's; yields Queried where the query is cached."""
        batches, views = (
            super()._batches(data, size, augment=augment, shard=shard, keep=keep, **how),
            self.cfg.train_views,
        )
        if not keep or not isinstance(data, TaskData) or self.cfg.prefix_cache == "off" or (augment and not views):
            return batches
        if self._queries is None:
            self._queries = self._new_cache(self.backbone.without_slots(), "cache_queries")
        several = shard and parallel.world() > 1
        with stopwatch.section("prefix"):
            queries = self._queries.batches(
                data, size, self.backbone.depth, augment=augment, views=views, shard=several, **how
            )
        return batches if isinstance(queries, Batches) else _beside(batches, queries)

    def begin(self, images: Tensor | Activations | Queried) -> tuple[Activations, Tensor]:
        """Where a pass with prompts starts, and the queries [B, D], without gradient. Images enter the stem once."""
        source = images.images if isinstance(images, Queried) else images
        start = source if isinstance(source, Activations) else self.backbone.prefix(source, 0)
        if isinstance(images, Queried):
            return start, images.query
        with torch.no_grad():
            return start, self.backbone.without_slots()(start)


def _beside(batches: Iterable[tuple[Any, Tensor, Tensor]], queries: Iterable[tuple[Any, Tensor, Tensor]]) -> Any:
    for (images, labels, positions), (query, *_) in zip(batches, queries, strict=True):
        yield Queried(images, query.x[:, 0]), labels, positions


def mask_of(cfg: PoolSettings, task: int) -> range | None:
    """The prompts that task number `task` trains under `use_prompt_mask`.

    None: the task trains the prompts that its images choose, as in testing; so does a task for which the pool has no
    prompts left."""
    prompts = range(task * cfg.top_k, (task + 1) * cfg.top_k)
    return prompts if cfg.use_prompt_mask and prompts.stop <= cfg.size else None


@torch.no_grad()
def hand_down(pool: PromptPool, cfg: PoolSettings, task: int) -> None:
    """At the start of a task with a mask, copies the previous task's prompts and keys to this task's.

    `shared_prompt_pool` asks for the prompts, `shared_prompt_key` for the keys."""
    mask = mask_of(cfg, task)
    if task == 0 or mask is None:
        return
    for parameter, copied in ((pool.prompts, cfg.shared_prompt_pool), (pool.keys, cfg.shared_prompt_key)):
        if copied:
            parameter[mask.start : mask.stop] = parameter[mask.start - cfg.top_k : mask.start].clone()


def chosen_in_training(similarity: Tensor, cfg: PoolSettings, task: int) -> Tensor:
    """Numbers [B, K] of the prompts that a batch of the task trains, from its similarities [B, S]."""
    mask = mask_of(cfg, task)
    if mask is None:
        return choose(similarity, cfg.top_k, cfg.batchwise_prompt)
    return torch.arange(mask.start, mask.stop, device=similarity.device).expand(similarity.shape[0], -1)


def learn_from_pool(
    learner: PromptLearner,
    task: Task,
    pool: PromptPool,
    encode: Callable[[Activations, Tensor], Tensor],
) -> None:
    """Trains the parameters in `learner.trainable` on cross-entropy among the task's classes minus the chosen keys' pull.

    `encode(activations from the stem, numbers of the chosen prompts [B, K])` returns features [B, D]."""
    cfg: Any = learner.cfg
    learner.seen = task.total
    hand_down(pool, cfg, task.index)

    def step(images: Tensor, labels: Tensor) -> Loss:
        start, query = learner.begin(images)
        similarity = pool.similarity(query)
        ids = chosen_in_training(similarity, cfg, task.index)
        entropy = cross_entropy_among(learner.head(encode(start, ids)), labels, task.first, task.total)
        weight = cfg.pull_constraint_coeff if cfg.pull_constraint else 0.0
        pulled = weight * pull(similarity, ids)
        terms = {"task_loss": entropy.total, "pull": -pulled}
        return Loss(entropy.total - pulled, entropy.correct, terms)

    rows: list[tuple[nn.Parameter, range]] = []
    if not cfg.decay_other_rows:
        mask = mask_of(cfg, task.index)
        rows = rows_of(task, learner.head) + ([] if mask is None else [(p, mask) for p in pool.parameters()])
    how: dict[str, Any] = {"epochs": cfg.tuned_epoch, "lr": cfg.init_lr, "recipe": pool_recipe(cfg)}
    learner.train()
    fit(learner, task, step, learner.trainable(), phase="prompts", rows=rows, **how)


def pool_recipe(cfg: PoolSettings) -> Recipe:
    """The optimizer, and the rate over a task's epochs."""
    return Recipe(cfg.optimizer, cfg.weight_decay, None if cfg.scheduler == "cosine" else lambda epoch: 1.0)
