"""Rows of a comparison: the seeds of equal settings form one; what sets rows apart gives them their names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from utils.compare.runs import Run
from utils.config.hashing import NOT_HASHED
from utils.run.provenance import mixed
from utils.text import counted, one_line, printable, shortened

LABEL = 60  # characters of a row's label


@dataclass
class Arm:
    """Runs of equal settings by seed; `name` is the folder above the seeds, mostly the settings' hash."""

    settings: Mapping[str, Any]
    name: str
    label: str = ""
    folders: list[Path] = field(default_factory=list)
    runs: dict[int, Run] = field(default_factory=dict)


def rows_of(runs: Sequence[tuple[Run, str]]) -> list[Arm]:
    """Rows from runs and their labels (empty: what sets a row apart). The seeds of one folder stay together: where two
    folders of equal settings share a seed, as after the same experiment in two versions, or come from different data or
    weights, each is a separate row. Raises ValueError where seeds of one folder do."""
    units: dict[Path, list[tuple[Run, str]]] = {}
    for run, label in runs:
        units.setdefault(run.folder.parent, []).append((run, label))
    rows: list[Arm] = []
    by_key: dict[str, list[Arm]] = {}
    for folder, unit in units.items():
        seeds = {run.seed for run, _ in unit}
        if faults := mixed({run.seed: run.results for run, _ in unit})[0]:
            raise ValueError(
                f"{folder}: {faults[0]}, so no mean can be taken over them: compare the folders of single seeds, or run the "
                "experiment again with --resume never"
            )
        for run, label in unit:
            settings = {k: v for k, v in run.settings.items() if k not in NOT_HASHED}
            alike = by_key.setdefault(json.dumps(settings, sort_keys=True), [])
            row = next((r for r in alike if folder in r.folders and run.seed not in r.runs), None)
            row = row or next(
                (r for r in alike if folder not in r.folders and not seeds & r.runs.keys() and _of_equal_data(run, r)),
                None,
            )
            if row is None:
                row = Arm(run.settings, folder.resolve().name, label)
                alike.append(row)
                rows.append(row)
            if folder not in row.folders:
                row.folders.append(folder)
            row.runs[run.seed] = replace(run, settings=row.settings)  # equal in what counts: held once
    name_rows(rows)
    return rows


def _of_equal_data(run: Run, row: Arm) -> bool:
    return not mixed({-1: run.results, **{seed: other.results for seed, other in row.runs.items()}})[0]


def differences(rows: Sequence[Arm]) -> dict[str, list[Any]]:
    """Settings in which the rows differ: {key: a value a row, None where its method lacks the key}. What says only where and
    how a run happens is left out."""
    keys = dict.fromkeys(key for row in rows for key in row.settings if key not in NOT_HASHED)
    table = {key: [row.settings.get(key) for row in rows] for key in keys}
    return {key: values for key, values in table.items() if any(value != values[0] for value in values)}


def name_rows(rows: Sequence[Arm]) -> None:
    """Gives rows without a label one: the method where they differ, and what sets a row apart from others of its method."""
    several = [key for key in ("model_name", "dataset") if len({str(row.settings.get(key)) for row in rows}) > 1]
    groups: dict[tuple[str, ...], list[Arm]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row.settings.get(key)) for key in several), []).append(row)
    own_names = [str(row.settings.get("prefix") or "") for row in rows]
    if all(own_names) and len(set(own_names)) == len(rows):
        for row, name in zip(rows, own_names, strict=True):
            row.label = row.label or shortened(name, LABEL)
    for names, alike in groups.items():
        apart = differences(alike)
        for index, row in enumerate(alike):
            differing = [f"{key}={_short(values[index])}" for key, values in apart.items()]
            first = list(names) or ([] if differing else [str(row.settings.get("model_name", "run"))])
            row.label = one_line(row.label or shortened(", ".join([*first, *differing]), LABEL))
    labels: dict[str, list[Arm]] = {}
    for row in rows:
        labels.setdefault(row.label, []).append(row)
    for twins in labels.values():
        if len(twins) > 1:
            for row in twins:
                row.label += one_line(f" ({shortened(str(row.folders[0]), LABEL)})")


def _data_apart(rows: Sequence[Arm]) -> list[Arm]:
    """The rows whose data are known and not those of the first row."""

    def digests(row: Arm) -> set[tuple[Any, Any]]:
        known = [run.results["provenance"] for run in row.runs.values() if run.results["provenance"]]
        return {(p.get("data"), p.get("content")) for p in known}

    return [row for row in rows[1:] if digests(row) and digests(rows[0]) and digests(row) != digests(rows[0])]


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def remarks(rows: Sequence[Arm]) -> list[str]:
    """What makes rows hard to compare, in sentences."""
    runs = [run for row in rows for run in row.runs.values()]
    notes = []
    if len(sets := dict.fromkeys(run.results["dataset"] for run in runs)) > 1:
        notes.append(f"different data sets ({', '.join(sets)}): their accuracies cannot be set against each other")
    if len(cuts := dict.fromkeys(run.results["sizes"] for run in runs)) > 1:
        texts = [f"{counted(len(cut), 'task')} of {shortened('+'.join(map(str, cut)), 30)}" for cut in cuts]
        notes.append(
            f"different tasks ({'; '.join(texts[:4])}{'; ...' * (len(texts) > 4)}): the curves have other steps"
        )
    notes += [f"{row.label}: {text}" for row in rows for text in mixed({s: r.results for s, r in row.runs.items()})[1]]
    if (unknown := [run for run in runs if not run.results["provenance"]]) and len(unknown) < len(runs):
        notes.append(
            f"{len(unknown)} of {len(runs)} runs recorded no provenance: whether they used the same data is not known"
        )
    if len(sets) == 1 and (others := _data_apart(rows)):
        notes.append(f"the data of row {others[0].label} are not those of the first row, under the same name")
    first = rows[0].runs
    orders = {seed: run.results["order"] for seed, run in first.items()}
    if any(run.results["order"] != orders[run.seed] for run in runs if run.seed in orders) and len(sets) == 1:
        notes.append("equal seeds with different class orders: their difference is no pair on equal tasks")
    if alone := [row.label for row in rows[1:] if not first.keys() & row.runs.keys()]:
        more = f" and {len(alone) - 1} more" * (len(alone) > 1)
        notes.append(f"no seed in common with the first row, so no paired difference: {alone[0]}{more}")
    return [printable(note) for note in notes]
