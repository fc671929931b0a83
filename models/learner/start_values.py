"""Start values of a module from the run's seed and the module's name alone, whatever was drawn before."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from utils.process.seeds import named_generator


class Initialiser(Protocol):
    """Sets the start values of a module that is known by `name`; each name has a separate random draw."""

    def __call__(self, name: str, module: nn.Module) -> None: ...


class SeededInit:
    """Start values drawn from (seed, name)."""

    def __init__(self, seed: int):
        self.seed = seed

    def __call__(self, name: str, module: Any) -> None:
        module.reset_parameters(named_generator(self.seed, "init", name))
