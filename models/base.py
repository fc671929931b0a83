"""The contract every method keeps: two verbs, `learn(task)` and `logits(images)`, plus what a checkpoint needs.

A learner owns its loop over epochs and runs it through `fit`; the runner owns the loop over tasks and all test data.
Shapes: B batch, D width, C classes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from backbone.vit import SlottedViT
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
