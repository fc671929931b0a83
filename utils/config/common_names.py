"""One name for epochs and rank that every method understands, beside the name that it has where the method was published.

They are read as the published key before anything is checked or hashed, so a run has one folder whichever name is written.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

# Each common name, and the keys that it may stand for: the first that a method has.
NAMES = {
    "epochs": ("epochs", "func_epoch", "tuned_epoch", "init_epochs"),
    "rank": ("rank", "ffn_num", "nested_lora_rank"),
}


def of(fields: Collection[str]) -> dict[str, str]:
    """{common name: the method's key} for a method with these keys, where the two differ."""
    keys = {name: next((key for key in keys if key in fields), name) for name, keys in NAMES.items()}
    return {name: key for name, key in keys.items() if key != name and name not in fields and key in fields}


def read(values: Mapping[str, Any], fields: Collection[str]) -> dict[str, Any]:
    """`values` with the method's keys in place of common names; where both are set, both stay (`clashes` says so)."""
    keys = {name: key for name, key in of(fields).items() if name in values and key not in values}
    return {keys.get(name, name): value for name, value in values.items()}


def clashes(values: Mapping[str, Any], fields: Collection[str], method: str) -> list[str]:
    """A fault for each common name that is set beside the key it stands for."""
    both = ((name, key) for name, key in of(fields).items() if name in values and key in values)
    return [f"{name}: is {key} in {method}, and both are set; keep one of the two" for name, key in both]


def over(values: Mapping[str, Any], changes: Mapping[str, Any], fields: Collection[str]) -> dict[str, Any]:
    """`values` with `changes`; a change to a key replaces it under its other name too."""
    other = {**of(fields), **{key: name for name, key in of(fields).items()}}
    replaced = {other[key] for key in changes if key in other} - changes.keys()
    return {key: value for key, value in values.items() if key not in replaced} | dict(changes)
