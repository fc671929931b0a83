"""The state of a training phase: optimizer, counts, and all that its steps change, saved and loaded as a whole.

A phase that was loaded continues bit for bit. Shapes: B batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from models.learner.base import Learner
from models.learner.groups import Group
from utils.process import parallel
from utils.process.seeds import rng_state, seed_everything, set_rng_state


class Stateful(Protocol):
    """What steps change beside parameters, buffers and what they remember, as torch.distributed.checkpoint has it.

    `state_dict` gives numbers, texts, tensors, and lists and dicts (with text keys) of them; `load_state_dict` gets the same
    back, tensors on the CPU."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> None: ...


def _random_of_all(device: torch.device) -> dict[str, Any]:
    """The state of the random generators; in a run of several processes the list of all ranks' states."""
    state = rng_state(device)
    return state if parallel.world() == 1 else {"ranks": parallel.gather_objects(state)}


def _set_random(state: dict[str, Any], device: torch.device, where: tuple[int, int]) -> None:
    """Inverse of `_random_of_all`.

    A state saved by another number of processes does not fit: all generators are then seeded anew."""
    saved = state.get("ranks", [state])
    if len(saved) != parallel.world():
        seed_everything("resumed", *where, "rank", parallel.rank())
    else:
        set_rng_state(saved[parallel.rank()], device)


class Phase:
    """One phase of a task in progress.

    `epoch` counts whole epochs, `step` the steps of the current one, `steps` all of them. `losses`, `terms`, `right` and
    `count` are of the current epoch; `history` has the loss of every step, `remembered` what the steps asked to remember.
    `spent`: seconds of the current epoch. `rates`: the groups' rates at its start."""

    def __init__(
        self,
        learner: Learner,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        groups: Sequence[Group],
        stateful: Sequence[Stateful],
    ):
        self.learner, self.optimizer, self.scheduler = learner, optimizer, scheduler
        self.stateful: list[Stateful] = [*groups, *stateful]
        self.epoch, self.step, self.steps = 0, 0, 0
        self.history: list[float] = []
        self.remembered: dict[str, list[Tensor]] = {}
        self.begin_epoch()

    def begin_epoch(self) -> None:
        self.losses: list[float] = []
        self.terms: dict[str, list[Tensor]] = {}
        self.right, self.count, self.judged, self.spent = 0.0, 0, False, 0.0
        self.rates: list[float] = [g["lr"] for g in self.optimizer.param_groups]

    def next_rates(self) -> None:
        """The scheduler's step at the end of an epoch."""
        with warnings.catch_warnings():  # torch misses the optimizer's steps where an earlier process took them
            warnings.filterwarnings("ignore", message="Detected call of")
            self.scheduler.step()

    def moving(self) -> dict[str, Tensor]:
        """By name: what the optimizer trains, and every buffer that is not in the learner's `unchanged_while_training`."""
        trained = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        tensors: dict[str, Tensor] = {}
        unchanged = self.learner.unchanged_while_training
        if not any(id(p) in trained for p in self.learner.backbone.vit.parameters()):
            unchanged = (*unchanged, "backbone.vit.")
        # one walk: the learner's state_dict would pass the whole frozen model several times after every epoch
        for path, module in self.learner.named_modules(remove_duplicate=False):
            if f"{path}.".startswith(unchanged):
                continue
            of_module = {n: p for n, p in module._parameters.items() if id(p) in trained}
            of_module |= {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
            tensors |= {f"{path}.{name}" if path else name: t for name, t in of_module.items() if t is not None}
        return tensors

    def state_dict(self) -> dict[str, Any]:
        device = next(iter(self.learner.backbone.vit.parameters())).device
        return {
            "epoch": self.epoch,
            "step": self.step,
            "steps": self.steps,
            "history": torch.tensor(self.history, dtype=torch.float64),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "terms": {name: torch.stack(values) for name, values in self.terms.items()},
            "remembered": {
                # one tensor and the lengths: thousands of small ones would take longer to save than to compute
                name: {"joined": torch.cat(values), "lengths": [len(v) for v in values]}
                for name, values in self.remembered.items()
            },
            "counts": [self.right, self.count, self.judged, self.spent],
            "rates": self.rates,
            "tensors": self.moving(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "parts": [part.state_dict() for part in self.stateful],
            "learner": {"views": self.learner.images_shown, "seconds": self.learner.seconds},
            "random": _random_of_all(device),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for a state of other tensors, or of a version of this program from before steps had terms."""
        if "terms" not in state:
            raise ValueError(
                f"an earlier version of this program was interrupted inside this task, and its phases cannot be continued: "
                f"delete {self.learner.journal.folder} and run the same command, which goes on from the task before"
            )
        device = next(iter(self.learner.backbone.vit.parameters())).device
        self.epoch, self.step, self.steps = state["epoch"], state["step"], state["steps"]
        self.history, self.losses = state["history"].tolist(), state["losses"].tolist()
        self.terms = {name: list(values.to(device).unbind()) for name, values in state["terms"].items()}
        self.remembered = {
            name: list(saved["joined"].to(device).split(saved["lengths"]))
            for name, saved in state["remembered"].items()
        }
        self.right, self.count, self.judged, self.spent = state["counts"]
        self.rates = state["rates"]
        moving = self.moving()
        if moving.keys() != state["tensors"].keys():
            different = ", ".join(sorted(moving.keys() ^ state["tensors"].keys()))
            raise ValueError(f"the saved phase has other tensors: {different}")
        for name, tensor in moving.items():
            tensor.copy_(state["tensors"][name])
        optimizer = state["optimizer"]
        optimizer["state"] = {int(number): values for number, values in optimizer["state"].items()}
        self.optimizer.load_state_dict(optimizer)
        self.scheduler.load_state_dict(state["scheduler"])
        for part, saved in zip(self.stateful, state["parts"], strict=True):
            part.load_state_dict(saved)
        self.learner.images_shown, self.learner.seconds = state["learner"]["views"], dict(state["learner"]["seconds"])
        _set_random(state["random"], device, (self.epoch, self.step))
