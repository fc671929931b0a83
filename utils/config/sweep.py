"""The key `sweep` of an experiment file: its cells, each a complete experiment, all checked before any work.

A grid `{"key": [values], ...}` has a cell for every combination, the last key changing fastest. A list `[{...}, ...]` has a
cell for each set of changes ("arm"). `null` means a key's default. `sweep` itself is not among the settings.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.config import common_names
from utils.config.resolve import Resolved
from utils.config.schema import Experiment
from utils.config.strict_json import ConfigError
from utils.text import one_line, shortened, shown

UNCHANGED = "as in the file"
MOST_CELLS = 100  # each is built and checked before the first run
_TOO_MANY = f"at most {MOST_CELLS} are allowed: split it into several files"
# Keys that a sweep may not change, with the reason.
_REFUSED = {
    "seed": 'seeds are the list "seed" itself; every cell runs all of them',
    "sweep": "a sweep cannot contain another sweep",
    "slurm_cluster": "all runs of a sweep go to the same cluster",
    "ray_address": "all runs of a sweep go to the same cluster",
}


@dataclass(frozen=True)
class Cell:
    """One experiment of a sweep: the label of its row, its values (file, command line, changes), and the resolved settings."""

    label: str
    values: Mapping[str, Any]
    resolved: Resolved

    def run_folder(self, out: Path, stem: str, seed: int) -> Path:
        return out / stem / self.resolved.hash / f"seed_{seed}"


@dataclass(frozen=True)
class Sweep:
    """All cells of an experiment file. `source` names the file in messages; `declared` is whether it has a sweep at all."""

    source: str
    cells: tuple[Cell, ...]
    declared: bool

    @property
    def hash(self) -> str:
        """12 hex digits over the cells and their order, independent of the seeds."""
        return hashlib.sha256(json.dumps([c.resolved.hash for c in self.cells]).encode()).hexdigest()[:12]

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.cells[0].resolved.settings.seed

    def gather(self, lines: Sequence[Sequence[str]]) -> list[str]:
        """Notes or faults, a list for each cell, merged into one list."""
        return gather([cell.label for cell in self.cells], lines)

    def refuse(self, faults: Sequence[Sequence[str]]) -> None:
        """Raises ConfigError if any cell has faults; `faults` has a list for each cell."""
        if lines := self.gather(faults):
            raise ConfigError(self.source, lines)


def gather(labels: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """The lines of all cells: a line that every cell has once, the others with the number and label of their cell."""
    shared = dict.fromkeys(lines[0])
    for other in map(set, lines[1:]):
        shared = {line: None for line in shared if line in other}
    of_cells = [
        f"cell {number} ({shortened(label, 200)}): {line}"
        for number, (label, lines_of_cell) in enumerate(zip(labels, lines, strict=True), start=1)
        for line in lines_of_cell
        if line not in shared
    ]
    return list(dict.fromkeys([*shared, *of_cells]))


def resolve(
    spec: Any,
    values: Mapping[str, Any],
    source: str,
    overrides: Mapping[str, Any],
    resolve_one: Callable[..., Resolved],
    settings_of: Callable[[str], type[Experiment]],
    methods: Sequence[str],
    beside: Collection[str] = (),
) -> Sweep:
    """All cells of `spec`, changes to the file's `values`. Raises ConfigError with every fault of every cell.

    `overrides` are keys of the command line, already in `values`: a sweep over one of them is a fault. Without `spec` (None)
    there is one cell, the file as it is. `resolve_one(values, notes)` checks one cell. `beside`
    are the keys that the file may hold apart from the settings."""
    arms, faults = ([{}], []) if spec is None else changes_of(spec)
    swept = dict.fromkeys(key for arm in arms for key in arm)
    faults += [f"{key}: is in the sweep and on the command line; keep one" for key in swept if key in overrides]
    if faults:  # the rest of the file is checked as well, so that one message has every fault
        try:
            resolve_one(dict(values))
        except ConfigError as error:
            faults = [*error.faults, *faults]
        raise ConfigError(source, faults)

    cells: list[Cell] = []
    faults_of_cells: list[list[str]] = []
    labels = [label_of(arm, spec) for arm in arms]
    for arm, label in zip(arms, labels, strict=True):
        changed, notes = apply(values, arm, settings_of, methods, beside)
        try:
            resolved = resolve_one(changed, notes)
            read = common_names.read(changed, type(resolved.settings).model_fields)
            cells.append(Cell(label, {k: v for k, v in read.items() if k in resolved.given}, resolved))
            faults_of_cells.append([])
        except ConfigError as error:
            faults_of_cells.append(error.faults)
    if faults := gather(labels, faults_of_cells):
        raise ConfigError(source, faults)
    if faults := _duplicates(cells):
        raise ConfigError(source, faults)
    return Sweep(source, tuple(cells), spec is not None)


def changes_of(spec: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """(the changes of each cell, faults in the form of the sweep)."""
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
                faults += [f"sweep: {key}: {shortened(text, 60)} is listed more than once" for text in twice]
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
    expected = 'an object {"key": [values], ...} or a list [{"key": value, ...}, ...] that is not empty is expected'
    return [{}], [f"sweep: {expected}; got {shown(spec)}"]


def label_of(arm: Mapping[str, Any], spec: Any) -> str:
    """The name of a cell's row: the `prefix` of its arm, else its changes."""
    if isinstance(spec, list) and isinstance(arm.get("prefix"), str) and arm["prefix"]:
        return one_line(arm["prefix"])
    texts = (f"{k}={v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)}" for k, v in arm.items())
    return one_line(", ".join(texts)) or UNCHANGED


def apply(
    values: Mapping[str, Any],
    arm: Mapping[str, Any],
    settings_of: Callable[[str], type[Experiment]],
    methods: Sequence[str],
    beside: Collection[str] = (),
) -> tuple[dict[str, Any], list[str]]:
    """(the file's values with the changes of `arm`, notes).

    If the arm changes the method, keys of the file that the new method does not have are left out."""
    method, before = (str(of.get("model_name")) for of in ({**values, **arm}, values))
    fields = settings_of(method).model_fields if method in methods else {}
    merged, notes = common_names.over(values, arm, fields), []
    if method != before and method in methods and before in methods:
        known, others = settings_of(method).accepted_keys(), settings_of(before).accepted_keys()
        foreign = [k for k in values if k in others and k not in known and k not in arm]
        merged = {k: v for k, v in merged.items() if k not in foreign}
        if foreign:
            notes.append(f"keys of {before} that {method} does not have are left out: {', '.join(foreign)}")
    known = (settings_of(method).accepted_keys() if method in methods else frozenset()).union(beside)
    return {k: v for k, v in merged.items() if not (k in known and k in arm and v is None)}, notes


def _duplicates(cells: Sequence[Cell]) -> list[str]:
    """Faults where two cells are the same experiment, which would share a run folder, or have the same label."""
    faults, hashes = [], [cell.resolved.hash for cell in cells]
    for (i, one), (j, two) in itertools.combinations(enumerate(cells, start=1), 2):
        if hashes[i - 1] == hashes[j - 1]:
            labels = [shortened(cell.label, 200) for cell in (one, two)]
            faults.append(
                f"sweep: cells {i} ({labels[0]}) and {j} ({labels[1]}) are the same run: nothing that decides its numbers "
                "differs"
            )
        elif one.label == two.label:
            faults.append(f"sweep: cells {i} and {j} are both called {one.label!r}; give them different prefixes")
    return faults
