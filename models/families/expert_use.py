"""What routing did: of each epoch of training, the use and gradients of every expert; of a set of images, its use of them.

Shapes: E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backbone.experts import balance
from backbone.experts.router import Routing
from backbone.vit import Activations
from models.families.population import Population
from models.learner.base import Learner
from utils.data.tasks import Task

USE_IMAGES = 512  # training images on which the use of experts is measured at the end of a task


class ExpertUse:
    """Writes an `experts` row a layer and epoch: means over the steps of share, gate, entropy and gradient of each expert [E]
    (as `balance.utilisation`), of the tokens' entropy, and of the router's gradient.

    `layers`: a layer's experts and its router. `routings`: those of a step, one a layer; `end_step` reads them and the
    gradients. `fit` needs it as `stateful`, because it sums over the steps of an epoch."""

    def __init__(
        self, learner: Learner, task: Task, phase: str, layers: Mapping[int, tuple[Sequence[nn.Module], nn.Module]]
    ):
        self.learner, self.task, self.phase, self.layers = learner, task, phase, layers
        self.epoch, self.steps = 1, 0
        self.sums: dict[int, dict[str, Tensor]] = {}
        self.routings: list[Routing] = []

    @torch.no_grad()
    def end_step(self) -> None:
        """Adds up what the step used and the gradients it left; called after the optimizer's step."""
        self.steps += 1
        for (layer, (experts, router)), routing in zip(self.layers.items(), self.routings, strict=True):
            use = balance.utilisation([routing])
            values = {
                "share": use.share,
                "gate": use.gate,
                "entropy": use.entropy,
                "token_entropy": token_entropy([routing]),
            }
            values = {name: self.learner.averaged(value) for name, value in values.items()}
            values["gradient"] = torch.stack([_gradient(expert) for expert in experts])
            values["router_gradient"] = _gradient(router)
            sums = self.sums.setdefault(layer, {})
            for name, value in values.items():
                sums[name] = sums[name] + value if name in sums else value

    def end_epoch(self) -> None:
        """Writes the rows of the epoch that ended."""
        where = {"task": self.task.index, "phase": self.phase, "epoch": self.epoch}
        for layer, sums in self.sums.items():
            means = {name: (value / self.steps).tolist() for name, value in sums.items()}
            self.learner.log.row("experts", **where, layer=layer, **means)
        self.epoch, self.sums, self.steps = self.epoch + 1, {}, 0

    def state_dict(self) -> Any:
        sums = {str(layer): dict(of_layer) for layer, of_layer in self.sums.items()}
        return {"epoch": self.epoch, "steps": self.steps, "sums": sums}

    def load_state_dict(self, state: Any) -> None:
        self.epoch, self.steps = state["epoch"], state["steps"]
        for layer, of_layer in state["sums"].items():
            device = next(self.layers[int(layer)][1].parameters()).device
            self.sums[int(layer)] = {name: value.to(device) for name, value in of_layer.items()}


def use_of(routings: Sequence[Sequence[Routing]]) -> dict[str, Any]:
    """`share` and `gate` [L][E] and `entropy` [L], the tokens' mean, of each layer's routings: plain numbers to be logged."""
    uses = [balance.utilisation(of_layer) for of_layer in routings]
    return {
        "share": [use.share.tolist() for use in uses],
        "gate": [use.gate.tolist() for use in uses],
        "entropy": [float(token_entropy(of_layer)) for of_layer in routings],
    }


@torch.no_grad()
def measure_use(learner: Learner, task: Task) -> dict[str, Any]:
    """`use_of` the routings of up to USE_IMAGES of the task's training images (test transform); empty without a router."""
    learner.eval()
    data = task.train.subset(task.train.order(0, "use")[:USE_IMAGES])

    def routed_by(images: Tensor | Activations) -> list[Routing]:
        with learner.collecting() as routings:
            learner.backbone(images)
        return routings

    passes = learner.outputs(routed_by, data, learner.cfg.eval_batch_size, augment=False, shuffle=False)
    batches = [routings for routings, _ in passes]  # of each batch one routing a layer
    layers = [list(of_layer) for of_layer in zip(*batches, strict=True)]
    return use_of(layers) if layers else {}


def mean_gates(learner: Learner, task: Task) -> Tensor:
    """Mean gate [L, E] of every expert on the task's images."""
    return torch.tensor(measure_use(learner, task)["gate"])


def log_use(learner: Learner, task: Task, population: Population) -> Tensor | None:
    """Logs the use of the experts on the task's images; returns mean gates [L, E], None without a router."""
    use = measure_use(learner, task)
    if not use:
        return None
    learner.log.row(
        "routing",
        task=task.index,
        target=population.target,
        layers=list(population.layers),
        **use,
        temperature=float(population.routers()[0].temperature),
        experts=population.facts(),
        ranks=population.ranks(),
    )
    return torch.tensor(use["gate"])


def token_entropy(routings: Sequence[Routing]) -> Tensor:
    """Mean entropy in nats of one layer's softmax, over all tokens: 0 sure, log E undecided."""
    return torch.cat([torch.special.entr(r.probabilities.flatten(0, -2)).sum(dim=-1) for r in routings]).mean()


def _gradient(module: nn.Module) -> Tensor:
    """Euclidean norm of a module's gradient; 0 where it has none."""
    squares = [p.grad.square().sum() for p in module.parameters() if p.grad is not None]
    return torch.stack(squares).sum().sqrt() if squares else next(module.parameters()).new_zeros(())
