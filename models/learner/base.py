"""The contract of a method: it says how it learns a task; features, class scores and what a checkpoint needs follow.

A learner runs its loop over epochs through `fit`; the runner has the loop over tasks and all test data. The base comes in
three files: this one, the passes over data (passes.py) and the class statistics (statistics.py).
Shapes: B batch, D width, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from backbone import operations, precision
from backbone.blocks import HALVES
from backbone.experts import probe
from backbone.experts.router import Routing
from backbone.heads.heads import LinearHead
from backbone.vit import Activations, SlottedViT
from models.learner.copies import Teacher, sketch
from models.learner.groups import Group, planned
from models.learner.start_values import Initialiser
from models.learner.statistics import ClassStatistics
from utils.data.tasks import Task
from utils.process import stopwatch
from utils.run.journal import Journal
from utils.run.log import RunLog


class Learner(ClassStatistics):
    """A method. `__init__` builds what exists before the first task, `self.head` among it; `learn` grows and trains it.

    The linear head is the training signal. With the key `head` at another value, predictions come from `statistics`
    instead: the features of each class, gathered at the end of its task.

    Attributes a method may set: `uses_past` (it needs training data of earlier tasks; rehearsal-free methods leave it
    False), `uses_test` (one of its settings selects on test data), `trains_features` (see ClassStatistics),
    `trains_backbone` (it changes the ViT's weights: they are then saved with its state, and no prefix is cached),
    `unchanged_while_training` (prefixes of the names of buffers that no training step changes).
    Counted in the current task: `trained`, the parameters that took gradient steps; `seconds` by purpose; `images_shown`,
    training images with repeats. `journal` records the task's training phases; the runner sets it."""

    uses_test: bool = False
    unchanged_while_training: ClassVar[tuple[str, ...]] = ("statistics.", "compared.", "unrepaired.")
    head: LinearHead

    def __init__(self, cfg: Any, backbone: SlottedViT, num_classes: int, init: Initialiser, log: RunLog):
        super().__init__()
        self.cfg, self.log, self.init = cfg, log, init
        precision.prepare(backbone, cfg.precision, cfg.compile, (lambda text: None) if log is None else log.warn)
        self.backbone, self.num_classes = backbone, num_classes
        self.seen = 0  # classes seen so far
        self._place_heads()
        self.begin_task()

    def begin_task(self) -> None:
        """Resets what is counted per task; the runner calls it before `learn`."""
        self.trained: dict[int, nn.Parameter] = {}
        self.seconds: dict[str, float] = {}
        self.images_shown = 0
        self.shard_sizes = (0,)
        self.journal = Journal()
        if self._cache is not None:
            self._cache.forget_views()

    # What a method defines -------------------------------------------------------------------------------------------

    def learn(self, task: Task) -> None:
        """Learns the classes `task.first .. task.total - 1` from `task.train`."""
        raise TypeError(f"{type(self).__name__} does not define `learn`")

    def trainable(self) -> Sequence[Group] | Sequence[nn.Parameter]:
        """What a task trains, for `fit` and for --check: parameters, or groups of them that differ in rate or interval."""
        return []

    def features(self, images: Tensor | Activations) -> Tensor:
        """Pooled features [B, D] of images [B, 3, H, W], or of their activations, as predictions use them."""
        return self.backbone(images)

    def scores(self, features: Tensor) -> Tensor:
        """Scores [B, classes seen] of features [B, D]."""
        head = self.head if self.statistics is None else self.statistics
        return head(features)[:, : self.seen]

    def logits(self, images: Tensor | Activations) -> Tensor:
        """Scores [B, classes seen] of images [B, 3, H, W] or their activations; called in evaluation mode, no gradients."""
        return self.scores(self.features(images))

    def consolidate(self, task: Task) -> None:
        """End of a task, called by the runner after `learn`: everything becomes fixed, and statistics are gathered.

        The class statistics take the features as they are now, so a method that still changes its features here calls
        this last."""
        self.requires_grad_(False)
        self.zero_grad()  # otherwise every parameter ever trained would hold its last gradient in memory
        self._gather(task)

    def structure(self) -> dict[str, Any]:
        """What must be rebuilt before the weights fit, as plain JSON values; `restore` is its inverse."""
        covariances = self.covariances()
        return {"seen": self.seen, **({"covariances": covariances} if covariances else {})}

    def restore(self, structure: dict[str, Any]) -> None:
        """Rebuilds on a fresh learner what `structure` describes; the checkpoint then loads the weights strictly."""
        self.seen = int(structure["seen"])
        self.restore_covariances(structure.get("covariances", {}))

    def planned_parameters(self) -> list[tuple[str, int]]:
        """(what, trainable parameters) lines for `--check`, before anything is trained.

        A method that grows lets its `sketch()` grow and counts the parameters in `trainable` of that sketch."""
        return planned(self.trainable())

    @classmethod
    def cannot_go_on(cls, cfg: Any) -> str | None:
        """Why a finished run with these settings cannot learn further classes (--extend), None if it can. A method whose first
        tasks depend on how many follow overrides this."""
        return None

    @property
    def says_what_it_trains(self) -> bool:
        """Whether the method defines `trainable` or `planned_parameters`; else what it trains is not known before `fit`."""
        return (type(self).trainable, type(self).planned_parameters) != (Learner.trainable, Learner.planned_parameters)

    def selections(self) -> list[dict[str, Any]]:
        """Choices of the current task on held-out training data, for results.json; empty without any."""
        return []

    # What a method uses ----------------------------------------------------------------------------------------------

    def initialise(self, name: str, module: nn.Module) -> Any:
        """Gives a new module its start values and the backbone's precision and device; returns it."""
        like = next(self.backbone.vit.parameters())
        module.to(like.dtype)
        if like.device.type == "meta":
            return module.to("meta")
        self.init(name, module)
        return module.to(like.device)

    def teacher(self) -> Teacher:
        """A frozen copy of this learner as it is now, over the same ViT: what old knowledge is distilled from."""
        return Teacher(self)

    def sketch(self) -> Any:
        """A copy with shapes and without values, on which a method may grow to see what a later task would train."""
        return sketch(self)

    @contextmanager
    def timed(self, purpose: str) -> Iterator[None]:
        """Adds the seconds of the block to `seconds[purpose]`."""
        start = time.perf_counter()
        with stopwatch.section("detection" if purpose == "detect" else "rest"):
            yield
        self.seconds[purpose] = self.seconds.get(purpose, 0.0) + time.perf_counter() - start

    # What checkpoints, tables and routing measurements read ----------------------------------------------------------

    def own_state(self) -> dict[str, Tensor]:
        """Weights and buffers of everything but the frozen backbone, which a checkpoint only names by its hash."""
        frozen = () if self.trains_backbone else {f"backbone.vit.{name}" for name in self.backbone.vit.state_dict()}
        return {name: tensor for name, tensor in self.state_dict().items() if name not in frozen}

    def load_own_state(self, state: dict[str, Tensor]) -> None:
        """Loads the result of `own_state` into a learner of the same structure; it must match exactly.

        Raises ValueError that names all tensors that are missing, unexpected or of another shape."""
        current = self.own_state()
        wrong = {"missing": set(current) - set(state), "unexpected": set(state) - set(current)}
        wrong["of another shape"] = {k for k in set(current) & set(state) if current[k].shape != state[k].shape}
        if any(wrong.values()):
            lists = "; ".join(f"{what}: {', '.join(sorted(names))}" for what, names in wrong.items() if names)
            raise ValueError(f"the saved state does not fit this {type(self).__module__}: {lists}")
        with torch.no_grad():
            for name, tensor in current.items():
                tensor.copy_(state[name])

    def forward_operations(self) -> int:
        """Floating-point operations of `logits` for one image, see backbone/operations.py: of a grey image, from its pixels
        on, in evaluation mode. It changes nothing, and compiled blocks are counted uncompiled."""
        like, halves = next(self.backbone.vit.parameters()), self.backbone.halves
        image = like.new_full((1, 3, *self.backbone.vit.patch_embed.img_size), 0.5)
        self.eval()
        try:
            self.backbone.halves = HALVES
            with stopwatch.unnoticed():
                return operations.of(lambda: self.logits(image))
        finally:
            self.backbone.halves = halves

    @property
    def gives_log_probabilities(self) -> bool:
        """Whether the scores are log-probabilities up to a constant, so that their softmax is a confidence: not cosines to
        class means and regression on class statistics."""
        return self.statistics is None or self.statistics.kind in ("lda", "aligned")

    def adapters_per_layer(self) -> list[int]:
        """Adapters in each block, for tables and results."""
        slots = [
            self.backbone.slots[n] if (n := str(i)) in self.backbone.slots else () for i in range(self.backbone.depth)
        ]
        return [len(slot) if isinstance(slot, Sized) else 1 for slot in slots]

    def routed_layers(self) -> list[int]:
        """Layers whose experts a learned router gates; empty for methods without."""
        return probe.routed_blocks(self.backbone)

    def collecting(self) -> AbstractContextManager[list[Routing]]:
        """Each pass within the block appends its routings, one for each of `routed_layers`, to the list it yields."""
        return probe.collecting(self.backbone)

    def forced(self, how: probe.How, seed: int) -> AbstractContextManager[None]:
        """Passes within the block are routed uniformly, at random or all to one expert, see backbone/experts/probe.py."""
        return probe.forced(self.backbone, how, seed)

    def task_experts(self) -> dict[int, int]:
        """The expert each task is assigned to, for methods that do so; empty for others."""
        return {}
