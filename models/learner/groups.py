"""Parameter groups, each with a rate and a step interval, and the optimizer over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from utils.config.schema import Trained
from utils.data.tasks import Task


@dataclass
class Group:
    """Parameters, as objects, that share a learning rate. A rate of 0 freezes them.

    With `interval` n > 1 they step at every n-th step only. At the others their gradients are None, not zero: with a zero
    gradient momentum and weight decay would still move them. `skipped`: gradients of skipped steps are dropped, or
    accumulated, and the n-th step takes their mean. `divide`: the gradient is divided by it.
    `warmup`: over this many first steps of a phase the rate rises linearly to its full value.
    """

    name: str
    parameters: Sequence[nn.Parameter]
    lr: float
    interval: int = 1
    skipped: Literal["drop", "accumulate"] = "drop"
    divide: int = 1
    warmup: int = 0
    _sum: list[Tensor] | None = field(default=None, repr=False)

    def before_step(self, number: int) -> None:
        """Between backward and the optimizer's step `number` (from 1): removes the gradients of a step that is skipped."""
        if self.divide != 1:
            for p in self.parameters:
                if p.grad is not None:
                    p.grad /= self.divide
        if self.interval == 1:
            return
        due = number % self.interval == 0
        if self.skipped == "accumulate":
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
            self._sum = grads if self._sum is None else [s + g for s, g in zip(self._sum, grads, strict=True)]
        for i, p in enumerate(self.parameters):
            if not due:
                p.grad = None
            elif self._sum is not None:
                p.grad = self._sum[i] / self.interval
        if due:
            self._sum = None

    def state_dict(self) -> Any:
        """Gradients accumulated since the last step."""
        return self._sum

    def load_state_dict(self, state: Any) -> None:
        pairs = zip(state, self.parameters, strict=True) if state is not None else None
        self._sum = None if pairs is None else [gradient.to(p.device) for gradient, p in pairs]


@dataclass(frozen=True)
class Recipe:
    """How a phase steps where it departs from the settings' `optimizer`, `weight_decay` and cosine.

    `optimizer`: sgd (momentum 0.9, L2), adam (L2 in the gradient, Kingma and Ba 2015) or adamw (decoupled decay).
    `share(epoch)`, epoch from 0, is the share of each group's full rate used in that epoch; None: the cosine to `cfg.min_lr`.
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
    learner: Any, groups: Sequence[Group], cfg: Trained, *, epochs: int, recipe: Recipe | None = None
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """SGD with momentum 0.9, or AdamW, with a cosine from each group's rate to `cfg.min_lr`, stepped once per epoch.

    `recipe` may replace the optimizer, its decay and the schedule. Only the parameters of `groups` are
    trained: everything else in the learner is frozen. Raises ValueError for a group without parameters, whose rate would
    have no effect."""
    learner.requires_grad_(False)
    chosen = []
    for group in groups:
        if not group.parameters:
            raise ValueError(f"parameter group '{group.name}' is empty, its learning rate {group.lr:g} has no effect")
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


def count(parts: Sequence[Group] | Sequence[nn.Parameter]) -> int:
    """Parameters that are trained: those of groups with a rate above 0, or plain ones."""
    groups = [part for part in parts if isinstance(part, Group) and part.lr > 0]
    plain = [part for part in parts if isinstance(part, nn.Parameter)]
    return sum(p.numel() for p in [*plain, *(p for group in groups for p in group.parameters)])


def planned(parts: Sequence[Group] | Sequence[nn.Parameter]) -> list[tuple[str, int]]:
    """Lines of --check: all that is trained in a task, and each group with its rate."""
    if not parts:
        return []
    lines = [("every task", count(parts))]
    for group in (part for part in parts if isinstance(part, Group)):
        frozen = (f"  {group.name} is frozen: its rate is 0", 0)
        lines.append((f"  of these {group.name}, rate {group.lr:g}", count([group])) if group.lr > 0 else frozen)
    return lines


def grouped(parameters: Sequence[nn.Parameter] | Sequence[Group], phase: str, lr: float | None) -> list[Group]:
    """Groups as they are; plain parameters as one group with rate `lr`."""
    chosen = list(parameters)
    if all(isinstance(item, Group) for item in chosen):
        return [g for g in chosen if isinstance(g, Group)]
    assert lr is not None, "plain parameters need a rate"
    return [Group(phase, [p for p in chosen if isinstance(p, nn.Parameter)], lr)]


def log_groups(learner: Any, groups: Sequence[Group], task: Task, phase: str) -> None:
    """Logs each group with its rate and size, in the first task also on the console.

    Of a method that did not say before what it trains, the number of parameters is logged now."""
    if task.index == 0 and not learner.says_what_it_trains:
        total = sum(p.numel() for p in learner.parameters())
        learner.log.info(f"phase {phase} trains {count(groups):,} of {total:,} parameters")
    if len(groups) < 2:
        return
    facts: list[dict[str, Any]] = [
        {"group": g.name, "lr": g.lr, "parameters": sum(p.numel() for p in g.parameters), "interval": g.interval}
        for g in groups
    ]
    learner.log.row("groups", task=task.index, phase=phase, groups=facts)
    if task.index == 0:
        texts = [
            f"{f['group']} {f['parameters']:,} at rate {f['lr']:g}"
            + (f" every {f['interval']} steps" if f["interval"] > 1 else "")
            for f in facts
        ]
        learner.log.info(f"parameter groups of phase {phase}: {', '.join(texts)}")
