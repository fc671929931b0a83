"""Parameter groups and the optimizer over them: whose rates differ, and which groups step when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.learner.base import Learner
from utils.config.schema import Trained


@dataclass
class Group:
    """Parameters with a learning rate of their own, handed over as objects.

    With `interval` n > 1 they step at every n-th step only. On the others their gradients are None, never zero: with a zero
    gradient momentum and weight decay would move them all the same. `skipped`: gradients of skipped steps are dropped, or
    accumulated, and the n-th step takes their mean. A rate of 0 means frozen. `divide`: their gradient is divided by it.
    `warmup`: over this many first steps of a phase the rate rises linearly to its full value.
    """

    name: str
    parameters: Sequence[nn.Parameter]
    lr: float
    interval: int = 1
    skipped: Literal["drop", "accumulate"] = "drop"
    divide: int = 1
    warmup: int = 0
    _kept: list[Tensor] | None = field(default=None, repr=False)

    def before_step(self, number: int) -> None:
        """Between backward and the optimizer's step `number` (from 1): takes gradients away where none is due."""
        if self.divide != 1:
            for p in self.parameters:
                if p.grad is not None:
                    p.grad /= self.divide
        if self.interval == 1:
            return
        due = number % self.interval == 0
        if self.skipped == "accumulate":
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
            self._kept = grads if self._kept is None else [k + g for k, g in zip(self._kept, grads, strict=True)]
        for i, p in enumerate(self.parameters):
            if not due:
                p.grad = None
            elif self._kept is not None:
                p.grad = self._kept[i] / self.interval
        if due:
            self._kept = None

    def state_dict(self) -> Any:
        """Gradients accumulated since the last step."""
        return self._kept

    def load_state_dict(self, state: Any) -> None:
        kept = zip(state, self.parameters, strict=True) if state is not None else None
        self._kept = None if kept is None else [k.to(p.device) for k, p in kept]


@dataclass(frozen=True)
class Recipe:
    """How a phase steps where that is not what the settings' `optimizer`, `weight_decay` and cosine say.

    `optimizer`: sgd (momentum 0.9, L2), adam (L2 in the gradient, Kingma and Ba 2015) or adamw (decoupled decay).
    `share(epoch)`, epoch from 0, is the part of each group's full rate that acts in it; None: the cosine to `cfg.min_lr`.
    """

    optimizer: Literal["sgd", "adam", "adamw"]
    weight_decay: float
    share: Callable[[int], float] | None = None

    @classmethod
    def of(cls, cfg: Trained, share: Callable[[int], float] | None = None) -> Recipe:
        """The settings' optimizer and decay, under another schedule."""
        return cls("sgd" if cfg.optimizer == "sgd" else "adamw", cfg.weight_decay, share)


def stepped(milestones: Sequence[int] | None, decay: float) -> Callable[[int], float] | None:
    """For `Recipe.share`: 1, times `decay` from each of these epochs on, as torch's MultiStepLR; None without milestones."""
    if milestones is None:
        return None
    return lambda epoch: decay ** sum(epoch >= milestone for milestone in milestones)


def optimizer_for(
    learner: Learner, groups: Sequence[Group], cfg: Trained, *, epochs: int, recipe: Recipe | None = None
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """SGD with momentum 0.9, or AdamW, with a cosine from each group's rate to `cfg.min_lr` stepped once an epoch; or what
    `recipe` says.

    Only what is handed over is trained: everything else in the learner is frozen. Raises ValueError for a group without
    parameters, whose rate would act on nothing."""
    learner.requires_grad_(False)
    chosen = []
    for group in groups:
        if not group.parameters:
            raise ValueError(f"parameter group '{group.name}' is empty, its learning rate {group.lr:g} acts on nothing")
        if group.lr > 0:
            chosen.append({"params": list(group.parameters), "lr": group.lr})
            for parameter in group.parameters:
                parameter.requires_grad_(True)
                learner.trained[id(parameter)] = parameter
    recipe = recipe or Recipe.of(cfg)
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(chosen, lr=0.0, momentum=0.9, weight_decay=recipe.weight_decay)
    elif recipe.optimizer == "adam":
        optimizer = torch.optim.Adam(chosen, lr=0.0, weight_decay=recipe.weight_decay)
    else:
        optimizer = torch.optim.AdamW(chosen, lr=0.0, weight_decay=recipe.weight_decay)
    if recipe.share is not None:
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.share)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(epochs, 1), eta_min=cfg.min_lr)


def planned(groups: Sequence[Group]) -> list[tuple[str, int]]:
    """Lines of --check: all that is trained in a task, and each group with its rate."""
    parts = [(g, sum(p.numel() for p in g.parameters)) for g in groups]
    total = sum(count for g, count in parts if g.lr > 0)
    lines = [(f"  of these {g.name}, rate {g.lr:g}", count) for g, count in parts if g.lr > 0]
    return [("every task", total), *lines, *((f"  {g.name} is frozen: its rate is 0", 0) for g, _ in parts if not g.lr)]
