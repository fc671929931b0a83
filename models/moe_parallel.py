"""Parallel competition: K fast experts learn the same batches at different rates, the best on held-out data becomes slow.

Design of the public repository motsun1/Nested-LoRA. All branches share one pass: what is equal for them is computed once, and
from the first adapter on the batch is repeated K times. Faults of the original are left out, each behind a key. Shapes:
B batch, D width, K branches, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from backbone.heads.heads import LinearHead
from backbone.vit import Activations
from models.families import nested
from models.learner.base import Learner as Base
from models.learner.fit import fit
from models.learner.groups import Group
from models.learner.held_out import hold_out
from models.learner.layers import layer_range, slot_inputs
from models.learner.losses import Loss, cross_entropy_among, rows_of
from models.settings.competition import CompetitionSettings
from utils.data.batches import TaskData
from utils.data.tasks import Task


class Settings(CompetitionSettings):
    """Keys of the competition, in models/settings/competition.py."""


class Learner(Base):
    """A nested adapter with K fast experts in each of the layers; one head, or one for each expert."""

    cfg: Settings

    def __init__(self, *args: Any):
        super().__init__(*args)
        cfg, width = self.cfg, self.backbone.width
        self.layers = layer_range(cfg.adapt_start_layer, cfg.adapt_end_layer, self.backbone)
        nested.fill(self, self.layers, cfg.num_experts)
        self.head = self.initialise("head", LinearHead(width, self.num_classes))
        others = cfg.num_experts - 1 if cfg.moe_heads == "per_expert" and cfg.moe_mode == "parallel" else 0
        self.other_heads = torch.nn.ModuleList(
            self.initialise("head", LinearHead(width, self.num_classes)) for _ in range(others)
        )
        self.winner = 0
        self.uses_test = cfg.selection_split == "test"
        self._selections: list[dict[str, Any]] = []

    def heads(self) -> list[LinearHead]:
        """One head for all experts, or K heads; the first one predicts."""
        return [self.head, *(head for head in self.other_heads if isinstance(head, LinearHead))]

    # Learning ------------------------------------------------------------------------------------------------------

    def learn(self, task: Task) -> None:
        """Trains all K experts on each batch, or the task's expert alone; then selects the winner on held-out images."""
        self.seen = task.total
        self._selections = []
        train, held = self._divide(task)
        if self.cfg.moe_mode == "task":
            self.winner = task.index % self.cfg.num_experts
            self._train(task, train, [self.winner])
        else:
            self._train(task, train, list(range(self.cfg.num_experts)))
            if held is not None:
                self._select(task, held, "training" if held is train else self.cfg.selection_split)

    def _divide(self, task: Task) -> tuple[TaskData, TaskData | None]:
        """(training data, data on which the winner is selected). Rows of held-out samples in the data set are logged."""
        cfg = self.cfg
        if cfg.moe_mode == "task":
            return task.train, None
        if self.uses_test:
            assert task.test is not None, "the runner gives the test data to a learner that declares that it uses them"
            self.log.warn(
                f"task {task.index + 1}: the winner is selected on TEST data (selection_split), as configured"
            )
            return task.train, task.test
        if not cfg.moe_val_ratio:
            return task.train, None
        train, held = hold_out(
            self, task, cfg.moe_val_ratio, key="moe_val_ratio", draw="selection", purpose="selection"
        )
        if held is None:
            self.log.warn(f"task {task.index + 1}: no image can be held out, the winner is selected on training images")
        return train, held or train

    def _train(self, task: Task, data: TaskData, experts: list[int]) -> None:
        cfg, count = self.cfg, len(experts)
        for adapter in nested.nested_of(self, self.layers).values():
            adapter.use("combined", experts, branches=count > 1)

        def step(images: Tensor, labels: Tensor) -> Loss:
            scores = self._branch_scores(images, count)  # [K, B, C]
            branches = [cross_entropy_among(s, labels, task.first, task.total) for s in scores]
            losses = torch.stack([branch.total for branch in branches])
            right = torch.stack([branch.correct for branch in branches if branch.correct is not None])
            return Loss(losses.sum() if cfg.moe_loss == "sum" else losses.mean(), right.sum() / count)

        self.train()
        groups = self._groups(experts, count if cfg.moe_loss == "sum" else 1)
        rows = [] if cfg.decay_other_rows else rows_of(task, *self.heads())
        fit(self, task, step, groups, phase="func", epochs=cfg.epochs, data=data, rows=rows)

    def _groups(self, experts: list[int], shared_by: int) -> list[Group]:
        """Groups of slow, each expert (rates may differ) and the heads; gradients of shared ones are divided by `shared_by`."""
        cfg, heads = self.cfg, self.heads()
        multipliers = cfg.multipliers() if cfg.moe_mode == "parallel" else (1.0,) * cfg.num_experts
        adapters = list(nested.nested_of(self, self.layers).values())
        groups = nested.nested_groups(cfg, adapters, active=experts, multipliers=multipliers, shared_by=shared_by)
        for k, head in enumerate(heads):
            name, divide = ("head", shared_by) if len(heads) == 1 else (f"head {k}", 1)
            groups.append(Group(name, list(head.parameters()), cfg.rate_head, divide=divide))
        return groups

    def _branch_scores(self, images: Tensor | Activations, count: int) -> Tensor:
        """Scores [K, B, C] of each branch, in one pass."""
        features = self.backbone(images, branches=count).unflatten(0, (count, -1))
        heads = self.heads()
        return torch.stack([(heads[k] if len(heads) > 1 else heads[0])(f) for k, f in enumerate(features)])

    @torch.no_grad()
    def _select(self, task: Task, held: TaskData, split: str) -> None:
        """The expert with the highest accuracy wins; a tie goes to the lower loss, then to the lower number.

        Accuracy is measured among all classes seen, as the linear head predicts. Where class statistics predict, the
        linear head only served to train the experts, so it is measured among the task's classes; on test data always
        among all classes seen."""
        cfg, count = self.cfg, self.cfg.num_experts
        first = 0 if cfg.head == "linear" or self.uses_test else task.first
        self.eval()
        right, loss = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.float64)
        device = self.head.weight.device
        # the cache computes whole classes, of which the held-out images are a small share: one pass without it costs less
        again = self.uses_test or self.statistics is not None or cfg.head_recalibration
        size = max(cfg.eval_batch_size // count, 1)

        def by_sample(images: Tensor | Activations) -> Tensor:
            return self._branch_scores(images, count).transpose(0, 1)  # [B, K, C]

        for scores_by_sample, labels in self.outputs(by_sample, held, size, augment=False, shuffle=False, keep=again):
            scores = scores_by_sample.transpose(0, 1)[..., first : task.total]
            truth = (labels - first).to(device).expand(count, -1)
            right += (scores.argmax(-1) == truth).sum(1).cpu()
            losses = F.cross_entropy(scores.flatten(0, 1), truth.flatten(), reduction="none")
            loss += losses.view(count, -1).sum(1).double().cpu()
        accuracy = [r / len(held) for r in right.tolist()]
        mean_loss = [v / len(held) for v in loss.tolist()]
        ranking = sorted(range(count), key=lambda k: (-right[k].item(), mean_loss[k], k))
        self.winner = ranking[0]
        if len(self.heads()) > 1:
            self._keep_winners_head(task)
        margin = accuracy[self.winner] - accuracy[ranking[1]] if count > 1 else None
        facts: dict[str, Any] = {
            "task": task.index,
            "winner": self.winner,
            "accuracies": [100 * a for a in accuracy],
            "losses": mean_loss,
            "margin": None if margin is None else 100 * margin,
            "split": split,
            "samples": len(held),
        }
        self._selections = [facts]
        self.log.row("selection", **facts)
        shown = ", ".join(f"{100 * a:.1f}" for a in accuracy)
        self.log.info(
            f"task {task.index + 1}: expert {self.winner} wins on {len(held)} {split} images, "
            f"accuracies {shown} %" + ("" if margin is None else f", margin {100 * margin:.1f}")
        )

    def _keep_winners_head(self, task: Task) -> None:
        """Every head takes the winner's rows of the task, so that any of them scores all classes seen."""
        heads = self.heads()
        rows = slice(task.first, task.total)
        weight, bias = heads[self.winner].weight[rows].clone(), heads[self.winner].bias[rows].clone()
        for head in heads:
            head.weight[rows], head.bias[rows] = weight, bias

    def consolidate(self, task: Task) -> None:
        """Merges the winner into slow where it is due, starts the fast experts anew, and sets what is evaluated."""
        for adapter in nested.nested_of(self, self.layers).values():
            adapter.use("combined", [self.winner])
        inputs = slot_inputs(self, task, self.layers)
        # in mode task the other experts hold tasks that are not merged yet, so they do not restart
        alone = self.cfg.moe_reset == "winner" or self.cfg.moe_mode == "task"
        restart = [self.winner] if alone else None
        merges = {
            layer: nested.merge(
                self,
                task,
                f"layers.{layer}",
                adapter,
                inputs[layer],
                expert=self.winner,
                restart=restart,
                where={"layer": layer},
            )
            for layer, adapter in nested.nested_of(self, self.layers).items()
        }
        nested.log_merges(self, task, merges)
        self._show()
        if self.cfg.head_recalibration:
            nested.recalibrate(self, task, self.cfg.epochs)
            for head in self.other_heads:
                head.load_state_dict(self.head.state_dict())
        super().consolidate(task)

    def _show(self) -> None:
        active = [self.winner] if self.cfg.moe_eval == "winner" else None
        for adapter in nested.nested_of(self, self.layers).values():
            adapter.use(self.cfg.nested_lora_eval, active)

    # Prediction is the base's; bookkeeping -------------------------------------------------------------------------

    def selections(self) -> list[dict[str, Any]]:
        return self._selections

    def structure(self) -> dict[str, Any]:
        return {**super().structure(), "ranks": nested.ranks(self, self.layers), "winner": self.winner}

    def restore(self, structure: dict[str, Any]) -> None:
        super().restore(structure)
        self.winner = int(structure["winner"])
        nested.resize(self, self.layers, structure["ranks"])
        self._show()

    def trainable(self) -> list[Group]:
        """Groups of the first task."""
        count = self.cfg.num_experts if self.cfg.moe_mode == "parallel" else 1
        return self._groups(list(range(count)), 1)
