"""What `"sweep"` in an experiment file stands for: its cells, each a whole experiment of its own, all checked before work.

A grid `{"key": [values], ...}` has a cell for every combination, the last key running fastest; a list `[{...}, ...]` has a
cell for each set of changes ("arm"). `null` takes a key's default. `sweep` itself never reaches the settings.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.config.resolve import Resolved
from utils.config.schema import Experiment
from utils.config.strict_json import ConfigError
from utils.text import printable, shortened, shown

UNCHANGED = "as in the file"
MOST_CELLS = 100  # each is built and checked before the first run, and is an experiment of its own
_TOO_MANY = f"at most {MOST_CELLS} are taken at once: split it into several files"
# Not to be swept, with the reason.
_REFUSED = {
    "seed": 'seeds are the list "seed" itself; every cell runs all of them',
    "sweep": "a sweep holds no other sweep",
    "slurm_cluster": "all runs of a sweep go to one place",
    "ray_address": "all runs of a sweep go to one place",
}


@dataclass(frozen=True)
class Cell:
    """One experiment of a sweep: its row's label, the given values (file, command line, changes), and these resolved."""

    label: str
    values: Mapping[str, Any]
    resolved: Resolved

    def run_folder(self, out: Path, stem: str, seed: int) -> Path:
        return out / stem / self.resolved.hash / f"seed_{seed}"


@dataclass(frozen=True)
class Sweep:
    """All cells of an experiment file; `source` is its name in messages, `declared` whether it has a sweep at all."""

    source: str
    cells: tuple[Cell, ...]
    declared: bool

    @property
    def hash(self) -> str:
        """12 hex digits that stand for the cells and their order, whatever the seeds."""
        return hashlib.sha256(json.dumps([c.resolved.hash for c in self.cells]).encode()).hexdigest()[:12]

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.cells[0].resolved.settings.seed

    def gather(self, lines: Sequence[Sequence[str]]) -> list[str]:
        """Notes or faults, a list for each cell, as one list."""
        return gather([cell.label for cell in self.cells], lines)

    def refuse(self, faults: Sequence[Sequence[str]]) -> None:
        """Raises ConfigError if any cell has faults, given a list for each."""
        if found := self.gather(faults):
            raise ConfigError(self.source, found)


def gather(labels: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """The lines of all cells: those that every cell has once, the others with their cell."""
    shared = [line for line in lines[0] if all(line in other for other in lines)]
    own = [
        f"cell {number} ({shortened(label, 200)}): {line}"
        for number, (label, found) in enumerate(zip(labels, lines, strict=True), start=1)
        for line in found
        if line not in shared
    ]
    return list(dict.fromkeys([*shared, *own]))


def resolve(
    spec: Any,
    values: Mapping[str, Any],
    source: str,
    overrides: Mapping[str, Any],
    resolve_one: Callable[..., Resolved],
    settings_of: Callable[[str], type[Experiment]],
    methods: Sequence[str],
) -> Sweep:
    """All cells of `spec` over the file's `values`, or ConfigError with every fault of every cell.

    `overrides` are keys of the command line, already in `values`: they must not be swept too. `spec` None: one cell, the
    file as it is. `resolve_one(values, notes)` judges one cell."""
    arms, faults = ([{}], []) if spec is None else changes_of(spec)
    swept = dict.fromkeys(key for arm in arms for key in arm)
    faults += [f"{key}: is in the sweep and on the command line; keep one" for key in swept if key in overrides]
    if faults:  # the rest of the file is judged as well, so that one look shows everything
        try:
            resolve_one(dict(values))
        except ConfigError as error:
            faults = [*error.faults, *faults]
        raise ConfigError(source, faults)

    cells: list[Cell] = []
    found: list[list[str]] = []
    labels = [label_of(arm, spec) for arm in arms]
    for arm, label in zip(arms, labels, strict=True):
        own, notes = apply(values, arm, settings_of, methods)
        try:
            resolved = resolve_one(own, notes)
            cells.append(Cell(label, {k: v for k, v in own.items() if k in resolved.given}, resolved))
            found.append([])
        except ConfigError as error:
            found.append(error.faults)
    if faults := gather(labels, found):
        raise ConfigError(source, faults)
    if faults := _twins(cells):
        raise ConfigError(source, faults)
    return Sweep(source, tuple(cells), spec is not None)


def changes_of(spec: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """The changes of each cell, and faults in the form of the sweep."""
    if isinstance(spec, dict) and spec:
        faults = [f"sweep: {key}: {_REFUSED[key]}" for key in spec if key in _REFUSED]
        for key, values in spec.items():
            if not isinstance(values, list):
                faults.append(f"sweep: {key}: a list of values is expected; got {shown(values)}")
            elif not values:
                faults.append(f"sweep: {key}: the list is empty")
            else:
                texts = [json.dumps(value, sort_keys=True) for value in values]
                twice = [text for text, count in Counter(texts).items() if count > 1]
                faults += [f"sweep: {key}: {shortened(text, 60)} stands there more than once" for text in twice]
        if not faults and (count := math.prod(len(values) for values in spec.values())) > MOST_CELLS:
            faults = [f"sweep: {', '.join(spec)}: {count} combinations; {_TOO_MANY}"]
        if faults:
            return [{}], faults
        return [dict(zip(spec, combination, strict=True)) for combination in itertools.product(*spec.values())], []
    if isinstance(spec, list) and len(spec) > MOST_CELLS:
        return [{}], [f"sweep: {len(spec)} cells; {_TOO_MANY}"]
    if isinstance(spec, list) and spec:
        wrong = [arm for arm in spec if not isinstance(arm, dict)]
        faults = [f"sweep: an object of changed keys is expected in the list; got {shown(arm)}" for arm in wrong]
        refused = dict.fromkeys(key for arm in spec if isinstance(arm, dict) for key in arm if key in _REFUSED)
        faults += [f"sweep: {key}: {_REFUSED[key]}" for key in refused]
        return ([{}], faults) if faults else (spec, [])
    expected = 'an object {"key": [values], ...} or a list [{"key": value, ...}, ...] is expected, and not an empty one'
    return [{}], [f"sweep: {expected}; got {shown(spec)}"]


def label_of(arm: Mapping[str, Any], spec: Any) -> str:
    """The name of a cell's row: an arm's own `prefix`, else what it changes."""
    if isinstance(spec, list) and isinstance(arm.get("prefix"), str) and arm["prefix"]:
        return printable(arm["prefix"])
    texts = (f"{k}={v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)}" for k, v in arm.items())
    return printable(", ".join(texts)) or UNCHANGED


def apply(
    values: Mapping[str, Any],
    arm: Mapping[str, Any],
    settings_of: Callable[[str], type[Experiment]],
    methods: Sequence[str],
) -> tuple[dict[str, Any], list[str]]:
    """The file's values with the arm's changes, and notes.

    Where the arm names another method, the file's keys that only the file's method knows are left out."""
    merged, notes = {**values, **arm}, []
    method, before = str(merged.get("model_name")), str(values.get("model_name"))
    if method != before and method in methods and before in methods:
        known, others = settings_of(method).accepted_keys(), settings_of(before).accepted_keys()
        own = [k for k in values if k in others and k not in known and k not in arm]
        merged = {k: v for k, v in merged.items() if k not in own}
        if own:
            notes.append(f"keys of {before} that {method} does not have are left out: {', '.join(own)}")
    known = settings_of(method).accepted_keys() if method in methods else frozenset()
    return {k: v for k, v in merged.items() if not (k in known and k in arm and v is None)}, notes


def _twins(cells: Sequence[Cell]) -> list[str]:
    """Faults where two cells are the same experiment, so share a run folder, or have the same name."""
    faults, hashes = [], [cell.resolved.hash for cell in cells]
    for (i, one), (j, two) in itertools.combinations(enumerate(cells, start=1), 2):
        if hashes[i - 1] == hashes[j - 1]:
            labels = [shortened(cell.label, 200) for cell in (one, two)]
            faults.append(
                f"sweep: cells {i} ({labels[0]}) and {j} ({labels[1]}) are one and the same run: they differ in nothing "
                "that changes its numbers"
            )
        elif one.label == two.label:
            faults.append(f"sweep: cells {i} and {j} are both called {one.label!r}; give them different prefixes")
    return faults
