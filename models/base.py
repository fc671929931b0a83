"""The contract every method keeps: two verbs, `learn(task)` and `logits(images)`, plus what a checkpoint needs.

A learner owns its loop over epochs and runs it through `fit`; the runner owns the loop over tasks and all test data.
Shapes: B batch, D width, C classes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.vit import SlottedViT
from utils.config import Trained
from utils.runlog import RunLog
from utils.runtime import named_generator
from utils.tasks import Task


class Initialiser(Protocol):
    """Sets the start values of a module that is known by `name`; every module's draw is its own."""

    def __call__(self, name: str, module: nn.Module) -> None: ...


class SeededInit:
    """Start values from (seed, name) alone, so that they do not depend on what was drawn before."""

    def __init__(self, seed: int):
        self.seed = seed

    def __call__(self, name: str, module: Any) -> None:
        module.reset_parameters(named_generator(self.seed, "init", name))


class LinearHead(nn.Linear):
    """Class scores from pooled features, [B, D] -> [B, C]: uniform Kaiming weights, zero bias, as SEMA-CL's."""

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.bias)


class Learner(nn.Module):
    """A method. `__init__` builds what exists before the first task; `learn` grows and trains it.

    Attributes a method may set: `uses_past` (it asks for the training data of earlier tasks: no rehearsal-free method does).
    Counted in the current task: `trained`, the parameters that took gradient steps; `seconds` by purpose; `views`, the
    training images shown, repeats included.
    """

    uses_past: ClassVar[bool] = False

    def __init__(self, cfg: Any, backbone: SlottedViT, num_classes: int, init: Initialiser, log: RunLog):
        super().__init__()
        self.cfg, self.log, self.init = cfg, log, init
        self.backbone, self.num_classes = backbone, num_classes
        self.seen = 0  # classes seen so far
        self.begin_task()

    def begin_task(self) -> None:
        """Resets what is counted per task; the runner calls it before `learn`."""
        self.trained: dict[int, nn.Parameter] = {}
        self.seconds: dict[str, float] = {}
        self.views = 0

    def learn(self, task: Task) -> None:
        """Learns the classes `task.first .. task.total - 1` from `task.train`."""
        raise TypeError(f"{type(self).__name__} does not say how it learns")

    def logits(self, images: Tensor) -> Tensor:
        """Scores [B, classes seen] of images [B, 3, H, W]; the runner calls it in evaluation mode without gradients."""
        raise TypeError(f"{type(self).__name__} does not say how it predicts")

    def consolidate(self, task: Task) -> None:
        """End of a task, called by the runner after `learn`: what was learned becomes fixed. Freezes everything."""
        self.requires_grad_(False)

    def structure(self) -> dict[str, Any]:
        """What must be rebuilt before the weights fit, as plain JSON values; `restore` is its inverse."""
        return {"seen": self.seen}

    def restore(self, structure: dict[str, Any]) -> None:
        """Rebuilds on a fresh learner what `structure` describes; the checkpoint then loads the weights strictly."""
        self.seen = int(structure["seen"])

    def own_state(self) -> dict[str, Tensor]:
        """Weights and buffers of everything but the frozen backbone, which a checkpoint only names by its hash."""
        frozen = {f"backbone.vit.{name}" for name in self.backbone.vit.state_dict()}
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

    def place(self, name: str, module: nn.Module) -> Any:
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
        yield
        self.seconds[purpose] = self.seconds.get(purpose, 0.0) + time.perf_counter() - start


def optimizer_for(
    learner: Learner, parameters: Iterable[nn.Parameter], cfg: Trained, *, epochs: int, lr: float
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """SGD with momentum 0.9, or AdamW, over `parameters`, with a cosine from `lr` to `cfg.min_lr` stepped once an epoch.

    Only what is handed over is trained: everything else in the learner is frozen."""
    chosen = list(parameters)
    learner.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
        learner.trained[id(parameter)] = parameter
    if cfg.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(chosen, lr=lr, momentum=0.9, weight_decay=cfg.weight_decay)
    else:
        optimizer = torch.optim.AdamW(chosen, lr=lr, weight_decay=cfg.weight_decay)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(epochs, 1), eta_min=cfg.min_lr)


Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


def fit(
    learner: Learner,
    task: Task,
    step: Step,
    parameters: Iterable[nn.Parameter],
    *,
    phase: str,
    epochs: int,
    lr: float,
    batches: Callable[[int], Iterable[Any]] | None = None,
    after_step: Callable[[], None] | None = None,
) -> list[float]:
    """Trains `parameters` for `epochs` passes over the task and returns the loss of every step.

    `step(images [B,3,H,W], labels [B])` returns the loss and, where there are scores to judge, how many of the batch are
    right (a scalar tensor). `batches(epoch)` replaces the task's own augmented, shuffled batches. Writes one `epoch` row
    per epoch. Raises ValueError before the optimizer steps if a loss is not finite. All methods share this one loop.
    """
    cfg = learner.cfg
    device = next(learner.backbone.vit.parameters()).device
    optimizer, scheduler = optimizer_for(learner, parameters, cfg, epochs=epochs, lr=lr)
    source = batches or (lambda epoch: task.train.batches(cfg.batch_size, epoch=epoch, stream=phase))
    history: list[float] = []
    with learner.log.bar(epochs, f"task {task.index + 1} {phase}", level=1) as bar:
        for epoch in range(epochs):
            start = time.perf_counter()
            losses: list[float] = []
            right, count = 0.0, 0
            judged = False
            rate = optimizer.param_groups[0]["lr"]
            for images, labels, *_ in source(epoch):
                loss, correct = step(images.to(device, non_blocking=True), labels.to(device, non_blocking=True))
                value = loss.item()
                if not math.isfinite(value):
                    raise ValueError(
                        f"the loss is {value} at task {task.index + 1}, phase {phase}, epoch {epoch + 1}, "
                        f"step {len(losses) + 1}; "
                        f"nothing was updated with it. Lower the learning rate ({lr}) or look at the input."
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                if after_step is not None:
                    after_step()
                losses.append(value)
                count += len(labels)
                if correct is not None:
                    judged, right = True, right + float(correct)
            scheduler.step()
            mean = sum(losses) / max(len(losses), 1)
            accuracy = right / max(count, 1) if judged else None
            learner.log.row(
                "epoch",
                task=task.index,
                phase=phase,
                epoch=epoch + 1,
                epochs=epochs,
                loss=mean,
                accuracy=accuracy,
                lr=rate,
                images=count,
                seconds=time.perf_counter() - start,
            )
            history += losses
            learner.views += count
            bar.update(1, loss=f"{mean:.4f}", **({"acc": f"{100 * accuracy:.1f}"} if accuracy is not None else {}))
    return history


def cross_entropy_among(scores: Tensor, labels: Tensor, first: int, total: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy over the classes first..total-1 alone, and how many are right among them.

    scores [B, C], labels [B] -> two scalars. Equal to setting the other scores to -inf (Ahn et al. 2021's separated
    softmax, LAMDA-PILOT's mask), without infinities in the graph."""
    among = scores[:, first:total]
    return F.cross_entropy(among, labels - first), (among.argmax(dim=1) == labels - first).sum()
