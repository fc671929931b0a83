"""The population of routed experts: who there is, how each grows, acts and joins another, and how it is rebuilt.

Shapes: E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from backbone.adapters import lora
from backbone.adapters.adapter import Adapter
from backbone.experts import routed
from backbone.experts.router import Router
from backbone.vit import SlottedViT
from models.learner.base import Learner
from models.settings.experts import GateSettings
from utils.data.tasks import Task

Initialise = Callable[[str, nn.Module], Any]  # `Learner.initialise`


@dataclass
class Expert:
    """What is known of an expert beside its weights."""

    tasks: int = 0  # in which it learned
    steps: int = 0
    young: bool = True
    frozen: bool = False
    peak: float = 0.0  # largest mean gate in any task since it was added

    def is_mature(self, cfg: GateSettings) -> bool:
        """By the tasks it learned or by its steps, whichever comes first; a frozen expert always is."""
        by_tasks = cfg.maturity_tasks is not None and self.tasks >= cfg.maturity_tasks
        by_steps = cfg.maturity_steps is not None and self.steps >= cfg.maturity_steps
        return self.frozen or by_tasks or by_steps


class Population:
    """The experts: in each of `layers` an adapter or a bundle of LoRAs and a router column, and an `Expert` of facts.

    It is not a Module: the weights belong to the backbone's slots and are saved under their names. It does not refer to
    the learner either, so no circle delays the release of a teacher; what builds modules takes `Learner.initialise`.
    `target`: the expert of the current task. `owners`: (task, expert) of each stored class embedding."""

    def __init__(self, backbone: SlottedViT, layers: Sequence[int], cfg: GateSettings):
        self.backbone, self.layers, self.cfg = backbone, layers, cfg
        self.experts: list[Expert] = []
        self.created = 0  # experts ever added, so that each has different start values
        self.last_spawn, self.target = 0, 0
        self.owners: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.experts)

    def slots(self) -> list[tuple[int, routed.RoutedSlot]]:
        """(layer, slot) from the lowest layer up."""
        return list(zip(self.layers, routed.routed_layers(self.backbone), strict=True))

    def routers(self) -> list[Router]:
        """One router a layer; empty without routing."""
        return routed.routers_of(self.backbone)

    def ranks(self) -> list[list[int]]:
        """The rank of every expert, layer by layer."""
        return [slot.ranks() for _, slot in self.slots()]

    def parameters(self, chosen: Sequence[int]) -> list[nn.Parameter]:
        """The parameters of the chosen experts, layer by layer; router columns apart."""
        return [p for _, slot in self.slots() for e in chosen for p in slot.adapters[e].parameters()]

    def columns(self, chosen: Sequence[int]) -> list[nn.Parameter]:
        """The router parameters of the chosen experts, layer by layer."""
        return [p for router in self.routers() for e in chosen for p in router.parameters_of(e)]

    # Add and grow ----------------------------------------------------------------------------------------------------

    def add(self, initialise: Initialise) -> None:
        """Adds an expert whose output is 0 in every layer, and its router columns."""
        for layer, slot in self.slots():
            slot.add(self._adapter(layer, self.cfg.ffn_num, f"adapters.{self.created}", initialise))
        for router in self.routers():
            router.grow()
        self.experts.append(Expert())
        self.created += 1

    def _adapter(self, layer: int, rank: int, name: str, initialise: Initialise) -> nn.Module:
        """The module of an expert in one layer, with start values under its name; its output is 0."""
        targets = self.cfg.lora_target
        module = lora.bundle(self.backbone, layer, targets, rank) if targets else Adapter(self.backbone.width, rank)
        return initialise(f"layers.{layer}.{name}", module)

    def room(self, most: int | None, step: int) -> int:
        """How many neurons the target may get now: at most `step`, and no rank above `most`."""
        return max(min(step, (most or 0) - self.ranks()[0][self.target]), 0)

    def grow_rank(self, by: int, name: str, initialise: Initialise) -> list[nn.Parameter]:
        """Adds `by` neurons to the target in every layer, with fresh down rows and zero up columns: the function stays.
        Returns the parameters that were replaced."""
        replaced: list[nn.Parameter] = []
        for layer, slot in self.slots():
            old = slot.adapters[self.target]
            slot.adapters[self.target] = slot.join(old, self._adapter(layer, by, f"grown.{name}", initialise), 1.0)
            replaced += old.parameters()
        return replaced

    # Young and mature ------------------------------------------------------------------------------------------------

    def mature(self, learner: Learner) -> None:
        """Notes and logs which experts are mature by now, and sets the routers accordingly."""
        for e, expert in enumerate(self.experts):
            is_mature = expert.is_mature(self.cfg)
            if expert.young and is_mature:
                learner.log.row("mature", expert=e, tasks=expert.tasks, steps=expert.steps, frozen=expert.frozen)
            expert.young = not is_mature
        self.set_routers()

    def set_routers(self) -> None:
        """Young experts always act, beside `top_k_experts` of the mature."""
        young = [expert.young for expert in self.experts]
        for router in self.routers():
            router.top_k = self.cfg.top_k_experts + sum(young)
            # above any probability: a young expert is selected whatever its score
            router.selection_bias.copy_(2.0 * torch.tensor(young))

    # Merge -----------------------------------------------------------------------------------------------------------

    def merge(self, gone: int, into: int, gates: Tensor) -> list[int]:
        """Adds to expert `into` what `gone` added on average, with the mean gates [L, E] of the task. Returns the ranks of
        `into`, layer by layer."""
        routed.merge_experts(self.backbone, gone, into, gates)
        del self.experts[gone]

        def renumbered(e: int) -> int:
            return renumbered(into) if e == gone else e - (e > gone)

        self.owners = [(task, renumbered(expert)) for task, expert in self.owners]
        self.target = renumbered(self.target)
        self.set_routers()
        return [ranks[renumbered(into)] for ranks in self.ranks()]

    def merge_unused(
        self, learner: Learner, task: Task, gates: Tensor, below: float, measure: Callable[[], Tensor]
    ) -> None:
        """Updates each expert's peak from the mean gates [L, E] of the task; then merges, one by one from the least used,
        the experts with a peak under `below` into the most used, never the target. After each, `measure` gives the new
        gates."""
        for expert, gate in zip(self.experts, gates.mean(dim=0).tolist(), strict=True):
            expert.peak = max(expert.peak, gate)
        while len(self.experts) > 1:
            peaks = {e: expert.peak for e, expert in enumerate(self.experts) if e != self.target}
            gone = min(peaks, key=lambda e: peaks[e])
            if peaks[gone] >= below:
                return
            mean = gates.mean(dim=0)
            into = max((e for e in range(len(self.experts)) if e != gone), key=lambda e: float(mean[e]))
            ranks = self.merge(gone, into, gates)
            facts = {"expert": gone, "into": into, "peak": peaks[gone], "gates": mean.tolist(), "ranks": ranks}
            learner.log.row("merge", task=task.index, **facts)
            learner.log.info(f"task {task.index + 1}: expert {gone} was hardly used and joins expert {into}")
            gates = measure()

    # Save and rebuild ------------------------------------------------------------------------------------------------

    def facts(self) -> list[dict[str, Any]]:
        return [asdict(expert) for expert in self.experts]

    def structure(self) -> dict[str, Any]:
        """What `restore` rebuilds, as plain JSON values."""
        return {
            "experts": self.facts(),
            "ranks": self.ranks(),
            "created": self.created,
            "last_spawn": self.last_spawn,
            "owners": [list(pair) for pair in self.owners],
        }

    def restore(self, structure: dict[str, Any], initialise: Initialise) -> None:
        """Brings a fresh population to the shapes and facts of `structure`; the weights are loaded afterwards."""
        while len(self.experts) < len(structure["experts"]):
            self.add(initialise)
        while len(self.experts) > len(structure["experts"]):  # some of the initial experts were merged
            self.experts.pop()
            for _, slot in self.slots():
                del slot.adapters[-1]
            for router in self.routers():
                router.drop(len(router) - 1)
        for (layer, slot), ranks in zip(self.slots(), structure["ranks"], strict=True):
            for e, (rank, wanted) in enumerate(zip(slot.ranks(), ranks, strict=True)):
                if rank != wanted:
                    slot.adapters[e] = self._adapter(layer, wanted, "resized", initialise)
        self.experts = [Expert(**facts) for facts in structure["experts"]]
        self.created, self.last_spawn = int(structure["created"]), int(structure["last_spawn"])
        self.owners = [(task, expert) for task, expert in structure["owners"]]
        self.set_routers()
