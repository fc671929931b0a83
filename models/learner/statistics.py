"""Class statistics: with the key `head` at `ncm` or `ridge`, they predict in place of the linear head.

Shapes: n images, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from backbone.heads.heads import HELD_OUT, StatisticsHead
from models.learner.passes import Passes
from models.learner.start_values import Initialiser
from utils.data.batches import TaskData
from utils.data.tasks import Task


class ClassStatistics(Passes):
    """The part of a learner that gathers the features of each class at the end of its task.

    `trains_features` false: features are the same after every task, so that statistics of them never age."""

    uses_past: bool = False
    trains_features: ClassVar[bool] = True
    init: Initialiser
    num_classes: int
    images_shown: int
    trained: dict[int, Any]
    features: Callable[[Any], Tensor]
    statistics: StatisticsHead | None

    @property
    def eval_batch_size(self) -> int:
        """Images that are scored together."""
        return int(self.cfg.eval_batch_size)

    @property
    def statistics_go_stale(self) -> bool:
        """Whether features still change after the statistics of a class were gathered from them."""
        return self.statistics is not None and self.trains_features and not self.regathers_statistics

    @property
    def regathers_statistics(self) -> bool:
        """Whether the statistics are gathered anew from all past training data after each task."""
        return self.uses_past

    @torch.no_grad()
    def features_of(self, data: TaskData) -> tuple[Tensor, Tensor]:
        """Features [n, D] and labels [n] of training images under the test transform, in the data set's order."""
        self.eval()
        batches = list(self.outputs(self.features, data, self.eval_batch_size, augment=False, shuffle=False))
        features, labels = zip(*batches, strict=True)
        return torch.cat(features), torch.cat(labels).to(features[0].device)

    def new_statistics(self, kind: Literal["ncm", "ridge"]) -> StatisticsHead:
        """Empty statistics. A method overrides this if its features have another width or it uses a subclass."""
        return StatisticsHead(kind, self.backbone.width, self.num_classes, self.cfg.head_projection_dim)

    def _place_statistics(self, kind: Literal["ncm", "ridge"]) -> StatisticsHead:
        """Empty statistics in float64, whatever the backbone's precision, on its device."""
        head, device = self.new_statistics(kind), self.device
        if device.type != "meta":
            self.init("statistics", head)
        return head.to(device)

    def _gather(self, task: Task, head: StatisticsHead) -> None:
        """Adds the task's training images to the class statistics; a learner that gets past data starts them afresh.

        In a task that trained nothing, these images count as shown."""
        if self.regathers_statistics:
            head.clear()
        data = task.train.join(*task.past) if self.regathers_statistics else task.train
        if not self.trained:
            self.images_shown += len(data)
        features, labels = self.features_of(data)
        if head.kind == "ridge":
            self._choose_ridge(task, head, data, features)
        head.add(features, labels)
        head.solve()

    def _choose_ridge(self, task: Task, head: StatisticsHead, data: TaskData, features: Tensor) -> None:
        """Selects lambda on held-out training images; it stays unchanged if a class has only one image."""
        errors = None
        if min(data.labels.unique(return_counts=True)[1].tolist()) > 1:
            held_out = np.isin(data.rows, data.split(HELD_OUT, draw="ridge")[1].rows)
            errors = head.choose_ridge(features, data.labels.to(features.device), torch.from_numpy(held_out))
        else:
            text = "a class with one training image has none to choose the ridge head's lambda on"
            self.log.info(f"task {task.index + 1}: {text}, it stays {head.ridge:g}")
        self.log.row("head", task=task.index, head=head.kind, ridge=float(head.ridge), errors=errors)
