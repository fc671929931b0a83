"""The contract every method keeps: it says how it learns a task; features, class scores and what a checkpoint needs follow.

A learner owns its loop over epochs and runs it through `fit`; the runner owns the loop over tasks and all test data.
Shapes: n images, B batch, D width, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from backbone import precision
from backbone.experts import probe
from backbone.experts.router import Routing
from backbone.heads.heads import HELD_OUT, LinearHead, StatisticsHead
from backbone.prefix_cache import GIB, PrefixCache, Storage
from backbone.vit import Activations, SlottedViT
from utils.data.batches import TaskData
from utils.data.tasks import Task
from utils.process import interrupt, parallel, stopwatch
from utils.process.seeds import named_generator
from utils.run.journal import Journal
from utils.run.log import RunLog

T = TypeVar("T")


class Initialiser(Protocol):
    """Sets the start values of a module that is known by `name`; every module's draw is its own."""

    def __call__(self, name: str, module: nn.Module) -> None: ...


class SeededInit:
    """Start values from (seed, name) alone, so that they do not depend on what was drawn before."""

    def __init__(self, seed: int):
        self.seed = seed

    def __call__(self, name: str, module: Any) -> None:
        module.reset_parameters(named_generator(self.seed, "init", name))


class Learner(nn.Module):
    """A method. `__init__` builds what exists before the first task, `self.head` among it; `learn` grows and trains it.

    The linear head is the training signal. With the key `head` at `ncm` or `ridge`, predictions come from `statistics`
    instead: the features of each class, gathered at the end of its task.

    Attributes a method may set: `uses_past` (it asks for the training data of earlier tasks: nothing rehearsal-free does),
    `uses_test` (a setting of its asks to select on test data),
    `trains_features` (false: they are the same after every task, so that statistics of them never age),
    `trains_backbone` (it moves the ViT's own weights: they are then part of its state, and nothing is a fixed prefix).
    Counted in the current task: `trained`, the parameters that took gradient steps; `seconds` by purpose; `views`, the
    training images shown, repeats included. `journal` keeps the task's training phases; the runner sets it.

    A run may have several processes (utils/process/parallel.py). Training takes `parts` of batches, `part_sizes` [W]
    are those of the
    step in progress; every other pass takes `outputs`. All that is no pass over data each process computes for itself, alike.
    """

    uses_past: bool = False
    uses_test: bool = False
    trains_features: ClassVar[bool] = True
    trains_backbone: ClassVar[bool] = False
    unchanged_while_training: ClassVar[tuple[str, ...]] = ("statistics.",)
    head: LinearHead
    statistics: StatisticsHead | None

    def __init__(self, cfg: Any, backbone: SlottedViT, num_classes: int, init: Initialiser, log: RunLog):
        super().__init__()
        self.cfg, self.log, self.init = cfg, log, init
        precision.prepare(backbone, cfg.precision, cfg.compile, (lambda text: None) if log is None else log.warn)
        self.backbone, self.num_classes = backbone, num_classes
        self.seen = 0  # classes seen so far
        self._cache: PrefixCache | None = None
        self.statistics = None if cfg.head == "linear" else self._place_statistics(cfg.head)
        self.begin_task()

    def begin_task(self) -> None:
        """Resets what is counted per task; the runner calls it before `learn`."""
        self.trained: dict[int, nn.Parameter] = {}
        self.seconds: dict[str, float] = {}
        self.images_shown = 0
        self.part_sizes: Sequence[int] = (0,)
        self.journal = Journal()
        if self._cache is not None:
            self._cache.forget_views()

    @property
    def eval_batch_size(self) -> int:
        """Images that are scored together."""
        return int(self.cfg.eval_batch_size)

    def learn(self, task: Task) -> None:
        """Learns the classes `task.first .. task.total - 1` from `task.train`."""
        raise TypeError(f"{type(self).__name__} does not say how it learns")

    def features(self, images: Tensor | Activations) -> Tensor:
        """Pooled features [B, D] of images [B, 3, H, W], or of their activations, as predictions use them."""
        return self.backbone(images)

    def scores(self, features: Tensor) -> Tensor:
        """Scores [B, classes seen] of features [B, D]."""
        head = self.head if self.statistics is None else self.statistics
        return head(features)[:, : self.seen]

    def logits(self, images: Tensor | Activations) -> Tensor:
        """Scores [B, classes seen] of images [B, 3, H, W] or their activations; the runner calls it in evaluation mode without
        gradients."""
        return self.scores(self.features(images))

    def consolidate(self, task: Task) -> None:
        """End of a task, called by the runner after `learn`: what was learned becomes fixed.

        Freezes everything; then gathers the class statistics if `head` asks for them, with the features as they are now. So
        a method that still changes its features here calls this last."""
        self.requires_grad_(False)
        self.zero_grad()  # or every part ever trained would keep its last gradient, as large as itself
        if self.statistics is not None:
            self._gather(task, self.statistics)

    # What is the same in every pass is computed once ---------------------------------------------------------------

    @property
    def prefix_layer(self) -> int:
        """The layer below which nothing changes any more, so that passes may start there: by default the lowest slot's."""
        return 0 if self.trains_backbone else min(map(int, self.backbone.slots), default=self.backbone.depth)

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
        """As `data.batches`, where kept with Activations in the place of images: the backbone takes either (`prefix_cache`).

        Augmented images are fresh in each epoch, or with `train_views` the view of that epoch. `keep` false: images, of
        which nothing is kept. Of several processes each gets whole batches, unless it asks for its `part`: who forgets
        `parts` or `outputs` does the same work in each of them, with the right result."""
        if not keep or not isinstance(data, TaskData):
            how = {"part": True} if part and parallel.world() > 1 else {}
            return data.batches(size, epoch=epoch, draw=draw, augment=augment, shuffle=shuffle, **how)
        if self._cache is None:
            self._cache = self._new_cache(self.backbone, "cache")
        with stopwatch.section("prefix"):  # what is missing is computed here
            return self._cache.batches(
                data,
                size,
                self.prefix_layer,
                epoch=epoch,
                draw=draw,
                augment=augment,
                shuffle=shuffle,
                views=getattr(self.cfg, "train_views", 0),
                part=part and parallel.world() > 1,
            )

    def _new_cache(self, backbone: SlottedViT, name: str, shared_by: int = 1) -> PrefixCache:
        """A cache as the settings ask for it; its files would lie in the run folder's `name`."""
        cfg, log = self.cfg, self.log
        if log is None:  # a saved run that is looked at: its folder stays as it is
            storage: Storage = "off" if cfg.prefix_cache == "off" else "memory"
            return PrefixCache(backbone, storage, cfg.prefix_cache_gb * GIB, shared_by=shared_by)
        # not inside the first one's, which removes what is not its own
        folder = log.folder / (name if parallel.is_first() else f"{name}_rank_{parallel.rank()}")
        return PrefixCache(
            backbone, cfg.prefix_cache, cfg.prefix_cache_gb * GIB, folder, say=log.info, shared_by=shared_by
        )

    def parts(self, data: TaskData, size: int, **how: Any) -> Iterable[tuple[Any, Tensor, Tensor]]:
        """`streams` for training: of each batch this process's part, for `fit`, which makes one step of all parts.

        An empty part is one image as padding, with its label and an empty index: `fit` gives it no weight."""
        return self.streams(data, size, part=True, **how)

    def outputs(self, f: Callable[[Any], T], data: TaskData, size: int, **how: Any) -> Iterator[tuple[T, Tensor]]:
        """f(images or Activations, on the device) of every batch of `streams`, and its labels: for passes that do not train.

        f gives a tensor [B, ...], or a list, tuple or dict of them, one row a sample. Each process computes its part and
        gets the whole."""
        device = next(self.backbone.vit.parameters()).device
        for images, labels, index in self.streams(data, size, part=True, **how):
            with stopwatch.section("data"):
                images = images.to(device, non_blocking=True)
            found = f(images)
            if parallel.world() > 1:
                interrupt.raise_if_requested(together=True)
                sizes = parallel.counts(len(index))
                found, labels = parallel.gather((found, labels), sizes)
            yield found, labels

    def gathered(self, x: T) -> T:
        """The whole batch from what `step` made of a part, [b, ...] a tensor, list, tuple or dict; for `after_step`."""
        return parallel.gather(x, self.part_sizes)

    def averaged(self, x: Tensor) -> Tensor:
        """The mean over the batch of a mean over its parts; for `after_step`."""
        return parallel.mean(x, self.part_sizes)

    def summed(self, x: Tensor) -> Tensor:
        """The sum over the batch of a sum over its parts; for `after_step`."""
        return x if parallel.world() == 1 else parallel.total(x * (self.part_sizes[parallel.rank()] > 0))

    # Class statistics ----------------------------------------------------------------------------------------------

    @property
    def statistics_go_stale(self) -> bool:
        """Whether features go on changing after the statistics of a class were gathered from them."""
        return self.statistics is not None and self.trains_features and not self.regathers_statistics

    @property
    def regathers_statistics(self) -> bool:
        """Whether they are gathered anew from all past training data after each task."""
        return self.uses_past

    @torch.no_grad()
    def features_of(self, data: TaskData) -> tuple[Tensor, Tensor]:
        """Features [n, D] and labels [n] of training images under the test transform, in the data set's order."""
        self.eval()
        found = list(self.outputs(self.features, data, self.eval_batch_size, augment=False, shuffle=False))
        features, labels = zip(*found, strict=True)
        return torch.cat(features), torch.cat(labels).to(features[0].device)

    def _gather(self, task: Task, head: StatisticsHead) -> None:
        """Adds the task's training images to the class statistics; a learner that keeps past data starts them afresh."""
        if self.regathers_statistics:
            head.clear()
        data = task.train.join(*task.past) if self.regathers_statistics else task.train
        features, labels = self.features_of(data)
        if head.kind == "ridge":
            self._choose_ridge(task, head, data, features)
        head.add(features, labels)
        head.solve()

    def _choose_ridge(self, task: Task, head: StatisticsHead, data: TaskData, features: Tensor) -> None:
        """Lambda from held-out training images; it stays as it was where a class has none to spare."""
        errors = None
        if min(data.labels.unique(return_counts=True)[1].tolist()) > 1:
            held = np.isin(data.rows, data.split(HELD_OUT, draw="ridge")[1].rows)
            errors = head.choose_ridge(features, data.labels.to(features.device), torch.from_numpy(held))
        else:
            text = "a class with one training image has none to choose the ridge head's lambda on"
            self.log.info(f"task {task.index + 1}: {text}, it stays {head.ridge:g}")
        self.log.row("head", task=task.index, head=head.kind, ridge=float(head.ridge), errors=errors)

    def _place_statistics(self, kind: Literal["ncm", "ridge"]) -> StatisticsHead:
        """A head without images in float64, whatever the backbone's precision, on its device."""
        like = next(self.backbone.vit.parameters())
        head = self.new_statistics(kind)
        self.init("statistics", head)
        return head.to(like.device)

    def new_statistics(self, kind: Literal["ncm", "ridge"]) -> StatisticsHead:
        """Class statistics that have seen no image; for a method with features of another width, or another such head."""
        return StatisticsHead(kind, self.backbone.width, self.num_classes, self.cfg.head_projection_dim)

    # What a checkpoint and the tables need -------------------------------------------------------------------------

    def structure(self) -> dict[str, Any]:
        """What must be rebuilt before the weights fit, as plain JSON values; `restore` is its inverse."""
        return {"seen": self.seen}

    def restore(self, structure: dict[str, Any]) -> None:
        """Rebuilds on a fresh learner what `structure` describes; the checkpoint then loads the weights strictly."""
        self.seen = int(structure["seen"])

    def own_state(self) -> dict[str, Tensor]:
        """Weights and buffers of everything but the frozen backbone, which a checkpoint only names by its hash."""
        frozen = () if self.trains_backbone else {f"backbone.vit.{name}" for name in self.backbone.vit.state_dict()}
        return {name: tensor for name, tensor in self.state_dict().items() if name not in frozen}

    def load_own_state(self, state: dict[str, Tensor]) -> None:
        """Loads what `own_state` gave into a learner of the same structure, strictly. Raises ValueError with both lists."""
        own = self.own_state()
        wrong = {"missing": set(own) - set(state), "unexpected": set(state) - set(own)}
        wrong["of another shape"] = {k for k in set(own) & set(state) if own[k].shape != state[k].shape}
        if any(wrong.values()):
            lists = "; ".join(f"{what}: {', '.join(sorted(names))}" for what, names in wrong.items() if names)
            raise ValueError(f"the saved state does not fit this {type(self).__module__}: {lists}")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def adapters_per_layer(self) -> list[int]:
        """Adapters in each block, for tables and results."""
        slots = [
            self.backbone.slots[n] if (n := str(i)) in self.backbone.slots else () for i in range(self.backbone.depth)
        ]
        return [len(slot) if isinstance(slot, Sized) else 1 for slot in slots]

    def planned_parameters(self) -> list[tuple[str, int]]:
        """(what, trainable parameters) lines for `--check`, before anything is trained."""
        return []

    def selections(self) -> list[dict[str, Any]]:
        """Choices the current task made on held-out training data, for results.json; empty where nothing is selected."""
        return []

    # Routing, looked at from outside -------------------------------------------------------------------------------

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
        """The expert each task was given to, for methods that give tasks to experts; empty for others."""
        return {}

    # Parts for methods ---------------------------------------------------------------------------------------------

    def initialise(self, name: str, module: nn.Module) -> Any:
        """Gives a new module its start values and the backbone's precision and device; returns it."""
        like = next(self.backbone.vit.parameters())
        module.to(like.dtype)
        if like.device.type == "meta":
            return module.to("meta")
        self.init(name, module)
        return module.to(like.device)

    @contextmanager
    def timed(self, purpose: str) -> Iterator[None]:
        """Adds the enclosed time to `seconds[purpose]`."""
        start = time.perf_counter()
        with stopwatch.section("detection" if purpose == "detect" else "rest"):
            yield
        self.seconds[purpose] = self.seconds.get(purpose, 0.0) + time.perf_counter() - start
