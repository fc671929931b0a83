"""Values of an experiment's JSON that have more than one form there, and what they become; the block `expected`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def as_seeds(value: Any) -> Any:
    """A single seed may stand without a list."""
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else value


def as_device(value: Any) -> Any:
    """SEMA-CL writes `["0"]` for GPU 0 and `["-1"]` for the CPU; we also take auto, cpu, cuda and cuda:N."""
    if isinstance(value, list | tuple):
        if len(value) != 1:
            raise ValueError('one device is needed, such as ["0"], "auto" or "cpu"')
        value = value[0]
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str) and value.lstrip("-").isdigit():
        return "cpu" if int(value) < 0 else f"cuda:{int(value)}"
    return value


def as_sizes(value: Any) -> Any:
    """Classes of each later task: one number for all of them, or a list with the number of each."""
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in numbers):
        raise ValueError("a whole number of at least 1 is expected, or a list of one for each later task")
    return tuple(value) if isinstance(value, list | tuple) else value


def same(value: Any, other: Any) -> bool:
    """Equality as JSON has it: true is not 1, and 1 is not 1.0."""
    return type(value) is type(other) and value == other


class ExpectedNumbers(BaseModel):
    """The numbers an experiment gave before, see commands/verify.py."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    weights: str = Field(description="hash of the backbone's weights")
    settings: str = Field(description="digest of the settings")
    tolerance: float = Field(
        ge=0, le=100, description="percentage points by which the accuracy may differ on another machine"
    )
    top1_curve: dict[str, list[float]] = Field(
        description="for each seed the accuracy (percent) over all classes seen, by task"
    )
