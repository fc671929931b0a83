"""Class statistics: with the key `head` at other than `linear`, they predict in place of the linear head.

Shapes: n images, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from backbone.heads.aligned import AlignedHead
from backbone.heads.discriminant import DiscriminantHead
from backbone.heads.drift import Motion, linear_motion, mean_motion
from backbone.heads.heads import HELD_OUT, StatisticsHead
from models.learner.new_heads import Head, Statistics, aligned_head, other_kinds, statistics_head
from models.learner.passes import Passes
from models.learner.start_values import Initialiser
from utils.data.batches import TaskData
from utils.data.tasks import Task


class ClassStatistics(Passes):
    """The part of a learner that gathers the features of each class at the end of its task.

    `trains_features` false: features are the same after every task, so that statistics of them never age.
    `statistics` predicts, None with the linear head. Measurements alone read `compared`, the method's other heads by name
    (`compare_heads`), and `unrepaired`, statistics that `head_drift_repair` never moved."""

    uses_past: bool = False
    trains_features: ClassVar[bool] = True
    init: Initialiser
    num_classes: int
    images_shown: int
    trained: dict[int, Any]
    features: Callable[[Any], Tensor]
    head: Any
    statistics: Head | None
    compared: nn.ModuleDict
    unrepaired: Head | None
    _before: Tensor | None = None  # features [n, D] of the task's images before it trained

    @property
    def eval_batch_size(self) -> int:
        """Images that are scored together."""
        return int(self.cfg.eval_batch_size)

    @property
    def statistics_go_stale(self) -> bool:
        """Whether features still change after the statistics of a class were gathered from them."""
        return self.statistics is not None and self._features_move

    @property
    def _features_move(self) -> bool:
        return self.trains_features and not self.regathers_statistics

    @property
    def regathers_statistics(self) -> bool:
        """Whether the statistics are gathered anew from all past training data after each task."""
        return self.uses_past

    def remember_features(self, task: Task) -> None:
        """Before the task trains: the features of its images, if `head_drift_repair` will compare them with those after."""
        repairs = self.cfg.head_drift_repair != "none" and self._features_move and task.index > 0
        self._before = self.features_of(task.train)[0] if repairs and list(self._heads()) else None

    @torch.no_grad()
    def features_of(self, data: TaskData) -> tuple[Tensor, Tensor]:
        """Features [n, D] and labels [n] of training images under the test transform, in the data set's order."""
        self.eval()
        batches = list(self.outputs(self.features, data, self.eval_batch_size, augment=False, shuffle=False))
        features, labels = zip(*batches, strict=True)
        return torch.cat(features), torch.cat(labels).to(features[0].device)

    # The heads -----------------------------------------------------------------------------------------------------

    def new_statistics(self, kind: Statistics) -> StatisticsHead:
        """Empty statistics. A method overrides this if its features have another width or it uses a subclass."""
        cfg = self.cfg
        return statistics_head(cfg, kind, self.backbone.width, self.num_classes, cfg.head_projection_dim)

    def _place_heads(self) -> None:
        """Builds `statistics`, `compared` and `unrepaired` as the settings ask for them."""
        cfg = self.cfg
        self.statistics = None if cfg.head == "linear" else self._place_statistics(cfg.head)
        others = [kind for kind in other_kinds(cfg) if kind != "linear"] if cfg.compare_heads else []
        self.compared = nn.ModuleDict({kind: self._place_statistics(kind) for kind in others})
        twice = cfg.head_drift and cfg.head_drift_repair != "none" and self.statistics is not None
        self.unrepaired = self._place_statistics(cfg.head) if twice else None

    def _place_statistics(self, kind: Any) -> Head:
        """An empty head, whatever the backbone's precision in float64 (linear rows and Gaussians in the backbone's), on its
        device. The random features of all heads are the same."""
        parameter = next(self.backbone.vit.parameters())
        aligned = kind == "aligned"
        head: Head = (
            aligned_head(self.cfg, self.backbone.width, self.num_classes) if aligned else self.new_statistics(kind)
        )
        if aligned:
            head = head.to(parameter.dtype)
        if parameter.device.type != "meta":
            self.init("statistics", head)
        return head.to(parameter.device)

    def _heads(self) -> Iterator[tuple[str, Head]]:
        """All heads that gather statistics, each with what it is for."""
        if self.statistics is not None:
            yield "statistics", self.statistics
        if self.unrepaired is not None:
            yield "unrepaired", self.unrepaired
        yield from self.compared.items()  # type: ignore[misc]

    def compared_heads(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """With `compare_heads`: by name, what the method could also predict with, from features [B, D] to scores [B, C]."""
        if not self.cfg.compare_heads:
            return {}
        linear = {"linear": self.head} if "linear" in other_kinds(self.cfg) else {}
        return {**linear, **dict(self.compared.items())}

    def covariances(self) -> dict[str, Any]:
        """For a checkpoint: the kind of covariance that each aligned head chose."""
        aligned = {name: head for name, head in self._heads() if isinstance(head, AlignedHead)}
        return {name: None if head.gaussians is None else head.gaussians.kind for name, head in aligned.items()}

    def restore_covariances(self, saved: dict[str, Any]) -> None:
        """Inverse of `covariances`."""
        for name, head in self._heads():
            if isinstance(head, AlignedHead) and saved.get(name) is not None:
                head.use(saved[name])

    # Gathering -----------------------------------------------------------------------------------------------------

    def _gather(self, task: Task) -> None:
        """Adds the task's training images to the class statistics; a learner that gets past data starts them afresh.

        In a task that trained nothing, these images count as shown."""
        if not list(self._heads()):
            return
        data = task.train.join(*task.past) if self.regathers_statistics else task.train
        if not self.trained:
            self.images_shown += len(data)
        self.take_in(task, data, *self.features_of(data))

    def take_in(self, task: Task, data: TaskData, features: Tensor, labels: Tensor, *, solve: bool = True) -> None:
        """What `_gather` does with features [n, D] and labels [n] of `data`. Without `solve` no head predicts anew, and only
        what has to be chosen in the first task is: benchmarks/heads.py scores after the last task alone."""
        heads = dict(self._heads())
        self._repair(task, heads, features, labels)
        for name, head in heads.items():
            if self.regathers_statistics:
                head.clear()
            facts = self._choose(task, head, data, features) if solve or isinstance(head, AlignedHead) else {}
            if isinstance(head, StatisticsHead):
                head.fit_lift(features)
            head.add(features, labels)
            if isinstance(head, AlignedHead):
                rows, classes = (self.head.weight, self.head.bias), range(task.first, task.total)
                head.start(*rows, classes, task.index, task.train.draws(0, "align head"))
                if solve:
                    facts["losses"] = head.solve()
            elif solve:
                head.solve()
            if facts and name == "statistics":
                self.log.row("head", task=task.index, head=head.kind, **facts)

    def _repair(self, task: Task, heads: dict[str, Head], features: Tensor, labels: Tensor) -> None:
        """Moves the statistics of earlier tasks as the task's images moved while it trained."""
        before, self._before = self._before, None
        if before is None:
            return
        for name, head in heads.items():
            if name == "unrepaired":
                continue
            lifted = [head.lift(x) if isinstance(head, StatisticsHead) else x for x in (before, features)]
            motion = self._motion(lifted[0], lifted[1], labels)
            head.move(motion)
            if name == "statistics":
                self.log.row("repair", task=task.index, by=self.cfg.head_drift_repair, **motion.facts)

    def _motion(self, before: Tensor, after: Tensor, labels: Tensor) -> Motion:
        if self.cfg.head_drift_repair == "linear":
            return linear_motion(before, after, labels)
        return mean_motion(before, after)

    # Choices on held-out training images -----------------------------------------------------------------------------

    def _choose(self, task: Task, head: Head, data: TaskData, features: Tensor) -> dict[str, Any]:
        """Chooses what the head leaves open, on held-out training images; returns what the log says of it."""
        if isinstance(head, AlignedHead):
            labels = data.labels.to(features.device)
            kind, held = head.gaussians, self._held_out(data)
            if held is None and head is self.statistics and head.recipe.covariance in ("auto", "shrunk"):
                self._say_none_held_out(task, "aligned head's covariance")
            facts = head.choose(features, labels, held)
            assert head.gaussians is not None
            if kind is None and head is self.statistics:
                stored = f"{head.gaussians.kind} covariances, {head.stored():,} numbers of {self.num_classes} classes"
                self.log.info(f"task {task.index + 1}: the aligned head stores {stored}")
            return {"covariance": head.gaussians.kind, "stored": head.stored(), **facts}
        head.fit_lift(features)
        if head.kind == "ridge":
            return self._choose_ridge(task, head, data, features)
        if isinstance(head, DiscriminantHead):
            return self._choose_shrinkage(task, head, data, features)
        return {}

    def _held_out(self, data: TaskData) -> Tensor | None:
        """True for the images [n] that are held out, a fifth of each class; None if a class has only one."""
        if min(data.labels.unique(return_counts=True)[1].tolist()) < 2:
            return None
        return torch.from_numpy(np.isin(data.rows, data.split(HELD_OUT, draw="ridge")[1].rows))

    def _say_none_held_out(self, task: Task, what: str) -> None:
        self.log.info(f"task {task.index + 1}: a class with one training image has none to choose the {what} on")

    def _choose_ridge(self, task: Task, head: StatisticsHead, data: TaskData, features: Tensor) -> dict[str, Any]:
        """Selects lambda on held-out training images; it stays unchanged if a class has only one image."""
        errors = None
        if (held_out := self._held_out(data)) is not None:
            errors = head.choose_ridge(features, data.labels.to(features.device), held_out)
        else:
            text = "a class with one training image has none to choose the ridge head's lambda on"
            self.log.info(f"task {task.index + 1}: {text}, it stays {head.ridge:g}")
        return {"ridge": float(head.ridge), "errors": errors}

    def _choose_shrinkage(self, task: Task, head: DiscriminantHead, data: TaskData, features: Tensor) -> dict[str, Any]:
        """Selects the shrinkage if the settings do not; it stays unchanged if a class has only one image."""
        losses = None
        if self.cfg.head_shrinkage is None:
            if (held_out := self._held_out(data)) is not None:
                losses = head.choose_shrinkage(features, data.labels.to(features.device), held_out)
            else:
                self._say_none_held_out(task, "lda head's shrinkage")
        return {"shrinkage": float(head.shrinkage), "errors": losses}
