"""Where a training phase is: its optimizer, its counts, and all that its steps change, saved and loaded as a whole.

A phase that is loaded goes on bit for bit. Shapes: C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from models.learner.base import Learner
from utils.process import parallel
from utils.process.seeds import rng_state, seed_everything, set_rng_state


class Stateful(Protocol):
    """What steps change beside parameters and buffers, as torch.distributed.checkpoint has it.

    `state_dict` gives numbers, texts, tensors, and lists and dicts (with text keys) of them; `load_state_dict` gets the same
    back, tensors on the CPU."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> None: ...


class Lists:
    """Lists of numbers or of tensors [B] that steps append to, known by name, as a Stateful. Tensors come back on `device`."""

    def __init__(self, device: torch.device, **lists: list[Any]):
        self.device, self.lists = device, lists

    def state_dict(self) -> Any:
        """A list of tensors as one and their lengths: thousands of small ones would take longer to save than to make."""
        return {name: _joined(values) for name, values in self.lists.items()}

    def load_state_dict(self, state: Any) -> None:
        for name, values in state.items():
            if isinstance(values, dict):
                values = values["joined"].to(self.device).split(values["lengths"])
            self.lists[name][:] = [v.to(self.device) if isinstance(v, Tensor) else v for v in values]


def _joined(values: list[Any]) -> Any:
    if values and all(isinstance(v, Tensor) and v.dim() == 1 for v in values):
        return {"joined": torch.cat(values), "lengths": [len(v) for v in values]}
    return values


def _random_of_all(device: torch.device) -> dict[str, Any]:
    """The state of the random generators; in a run of several processes the list of all ranks' states."""
    state = rng_state(device)
    return state if parallel.world() == 1 else {"ranks": parallel.gather_objects(state)}


def _set_random(state: dict[str, Any], device: torch.device, where: tuple[int, int]) -> None:
    """Inverse of `_random_of_all`. Saved by another number of processes there is no state for each: they draw anew."""
    saved = state.get("ranks", [state])
    if len(saved) != parallel.world():
        seed_everything("resumed", *where, "rank", parallel.rank())
    else:
        set_rng_state(saved[parallel.rank()], device)


class Phase:
    """One phase of a task as it goes.

    `epoch` and `step` say where it is: whole epochs, and steps of the present one; `steps` counts them all. `losses`,
    `task_losses`, `right` and `count` are of the present epoch, `history` has the loss of every step, `spent` the seconds of
    the present epoch. `rates` are the groups' at its start."""

    def __init__(
        self,
        learner: Learner,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        groups: Sequence[Stateful],
        stateful: Sequence[Stateful],
    ):
        self.learner, self.optimizer, self.scheduler = learner, optimizer, scheduler
        self.parts = [*groups, *stateful]
        self.epoch, self.step, self.steps = 0, 0, 0
        self.history: list[float] = []
        self.begin_epoch()

    def begin_epoch(self) -> None:
        self.losses: list[float] = []
        self.task_losses: list[Tensor] = []
        self.right, self.count, self.judged, self.spent = 0.0, 0, False, 0.0
        self.rates: list[float] = [g["lr"] for g in self.optimizer.param_groups]

    def next_rates(self) -> None:
        """The scheduler's step at the end of an epoch."""
        with warnings.catch_warnings():  # torch misses the optimizer's steps where an earlier process took them
            warnings.filterwarnings("ignore", message="Detected call of")
            self.scheduler.step()

    def moving(self) -> dict[str, Tensor]:
        """By name: the parameters that the optimizer has, and every buffer but those in the learner's `still` parts."""
        trained = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        found: dict[str, Tensor] = {}
        frozen = not any(id(p) in trained for p in self.learner.backbone.vit.parameters())
        still = (
            (*self.learner.unchanged_while_training, "backbone.vit.")
            if frozen
            else self.learner.unchanged_while_training
        )
        # one walk: the learner's state_dict would pass the whole frozen model several times after every epoch
        for path, module in self.learner.named_modules(remove_duplicate=False):
            if f"{path}.".startswith(still):
                continue
            own = {n: p for n, p in module._parameters.items() if id(p) in trained}
            own |= {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
            found |= {f"{path}.{name}" if path else name: t for name, t in own.items() if t is not None}
        return found

    def state_dict(self) -> dict[str, Any]:
        device = next(iter(self.learner.backbone.vit.parameters())).device
        return {
            "epoch": self.epoch,
            "step": self.step,
            "steps": self.steps,
            "history": torch.tensor(self.history, dtype=torch.float64),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "task_losses": self.task_losses,
            "counts": [self.right, self.count, self.judged, self.spent],
            "rates": self.rates,
            "tensors": self.moving(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "parts": [part.state_dict() for part in self.parts],
            "learner": {"views": self.learner.images_shown, "seconds": self.learner.seconds},
            "random": _random_of_all(device),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = next(iter(self.learner.backbone.vit.parameters())).device
        self.epoch, self.step, self.steps = state["epoch"], state["step"], state["steps"]
        self.history, self.losses = state["history"].tolist(), state["losses"].tolist()
        self.task_losses = [loss.to(device) for loss in state["task_losses"]]
        self.right, self.count, self.judged, self.spent = state["counts"]
        self.rates = state["rates"]
        own = self.moving()
        if own.keys() != state["tensors"].keys():
            raise ValueError(
                f"the saved phase has other tensors: {', '.join(sorted(own.keys() ^ state['tensors'].keys()))}"
            )
        for name, tensor in own.items():
            tensor.copy_(state["tensors"][name])
        optimizer = state["optimizer"]
        optimizer["state"] = {int(number): values for number, values in optimizer["state"].items()}
        self.optimizer.load_state_dict(optimizer)
        self.scheduler.load_state_dict(state["scheduler"])
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        self.learner.images_shown, self.learner.seconds = state["learner"]["views"], dict(state["learner"]["seconds"])
        _set_random(state["random"], device, (self.epoch, self.step))
