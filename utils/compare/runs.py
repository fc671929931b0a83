"""Finished runs: the search for them in and below folders, and what a comparison reads of each.

Of a run, only results.json and config.json are read, and only what a comparison shows stays in memory, so that ten thousand
runs take seconds and little memory; environment.json is read where it is shown.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.compare.columns import figures
from utils.evaluation import error_parts, metrics
from utils.report import class_names
from utils.report import results as report_results
from utils.text import csv_text

# numbers in percent, bytes or images a second, or null; then lists with an entry a task
NUMBERS = (
    "last_accuracy",
    "average_accuracy",
    "forgetting",
    "final_task_mean",
    "backward_transfer",
    "task_oracle_accuracy",
    "peak_memory_bytes",
    "images_per_second",
)
LISTS = ("top1_curve", "trainable_parameters", "total_parameters")
SKIPPED = {"cells", "console", "checkpoints", "plots", "samples", "cache", "export"}  # folders that hold no runs


@dataclass(frozen=True)
class Run:
    """One finished seed. `results`: NUMBERS, LISTS and, by task, `forgetting_by_task`, `splits`, `adapters` (their number),
    `seconds` (by phase), `peaks` (bytes or None); `layers` (adapters by layer at the end), `sizes` (classes of each task),
    `order` (a hash of the class order),
    `tested` (test images at the end, None if unknown), `classes` (the names of each task's, empty where they are but numbers),
    `provenance` (empty in runs of older versions), `selection_history` as far as `utils.compare.table` reads it, and what
    `utils.compare.columns.figures` adds."""

    folder: Path
    seed: int
    settings: Mapping[str, Any]
    results: Mapping[str, Any]

    def environment(self) -> dict[str, Any]:
        """Its environment.json, empty where there is none that can be read."""
        try:
            environment = json.loads((self.folder / "environment.json").read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return environment if isinstance(environment, dict) else {}


def read(folder: Path) -> Run:
    """The finished run in `folder`; ValueError with the reason if there is none or its files are damaged."""

    def of_comparison(results: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        return _whole(results["seed"]), _slim(results)

    seed, results = report_results.read_results(folder, of_comparison)
    return Run(folder, seed, report_results.read(folder, "config.json"), results)


def _whole(value: Any) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is no whole number")
    return value


def _number(value: Any) -> float | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise TypeError(f"{value!r} is no number")
    return value


def _slim(results: Mapping[str, Any]) -> dict[str, Any]:
    """What a comparison shows of a results.json; an exception where it is not one."""
    shown: dict[str, Any] = {key: str(results[key]) for key in ("model_name", "dataset")}
    shown |= {key: _number(results[key]) for key in NUMBERS}
    shown |= {key: [_number(value) for value in results[key]] for key in LISTS}
    tasks = len(shown["top1_curve"])
    adapters = [{str(layer): _whole(n) for layer, n in entry.items()} for entry in results["adapters_per_layer"]]
    seconds = [{str(phase): _number(s) or 0.0 for phase, s in entry.items()} for entry in results["seconds"]]
    peaks = [_number(value) for value in results.get("peak_memory_by_task") or [None] * tasks]
    if {tasks} != set(map(len, (adapters, seconds, peaks, *(shown[key] for key in LISTS)))):
        raise ValueError("its lists have different lengths")
    history = results.get("selection_history") or ()
    peeked = any(isinstance(entry, Mapping) and entry.get("split") == "test" for entry in history)
    return (
        shown
        | {key: _number(value) for key, value in figures(results).items()}
        | {
            "forgetting_by_task": metrics.forgetting_by_task(results["accuracy_matrix"]),
            "splits": error_parts.splits(results),
            "adapters": [sum(entry.values()) for entry in adapters],
            "layers": adapters[-1] if adapters else {},
            "seconds": seconds,
            "peaks": peaks,
            "newest": [row[t] for t, row in enumerate(results["accuracy_matrix"])],
            "sizes": tuple(len(classes) for classes in results["task_classes"]),
            "order": hash(tuple(results["class_order"])),
            "classes": _named_classes(results),
            "selection_history": [{"split": "test"}] if peeked else [],
            "tested": sum(map(sum, results.get("task_confusion") or ())) or None,
            "provenance": dict(results.get("provenance") or {}),
        }
    )


def _named_classes(results: Mapping[str, Any]) -> tuple[str, ...]:
    """A text for each task; none where classes are but numbers."""
    texts = class_names.of_results(results)
    named = not class_names.are_numbers(texts)
    return tuple(class_names.listed(ids, texts, 6) for ids in results["task_classes"]) if named else ()


# ------------------------------------------------------------------------------------------------ the search


def _natural(name: str) -> list[Any]:
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.findall(r"\d+|\D+", name)]


def below(folder: Path) -> Iterator[tuple[Path, bool]]:
    """(run folder, whether it is finished) for all runs in or below `folder`, in the order of their names.

    Links are not followed (`latest` names a run a second time); what `--resume never` moved aside is left out."""
    try:
        with os.scandir(folder) as entries:
            inside = list(entries)
    except OSError:
        return
    names = {entry.name for entry in inside}
    if "results.json" in names or "metrics.jsonl" in names:
        yield folder, "results.json" in names
        return
    inner = [e.name for e in inside if e.is_dir(follow_symlinks=False) and e.name not in SKIPPED]
    for name in sorted(inner, key=_natural):
        if not name.startswith(".") and ".old_" not in name:
            yield from below(folder / name)


def _cells(folder: Path) -> list[tuple[Path, str]]:
    """(settings folder, label) of each cell of a sweep's folder, from its table."""
    try:
        with open(folder / "table.csv", encoding="utf-8", newline="") as file:
            return [(folder.parent / line["settings"], csv_text(line["cell"])) for line in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        raise ValueError(
            f"{folder} is a sweep without its table, which is written when the sweep ends; give {folder.parent} instead"
        ) from None


@dataclass
class Selection:
    """Runs with their labels from a sweep's table (else empty), and notes on what was left out."""

    runs: list[tuple[Run, str]] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        notes = []
        if self.unfinished:
            notes.append(f"{_count(self.unfinished)} not finished and left out, the first: {self.unfinished[0]}")
        if self.broken:
            notes.append(f"{_count(self.broken)} damaged and left out, the first: {self.broken[0]}")
        return notes


def find(folders: Sequence[Path]) -> Selection:
    """All runs in and below the `folders`, in their order, each once.

    Raises ValueError where one of them is not a run, not finished, damaged, or holds no finished run."""
    selection, seen = Selection(), set()
    for top in folders:
        if not top.is_dir():
            raise ValueError(f"{top}: there is no such folder; --compare takes folders of finished runs")
        of_sweep = top.resolve().name.startswith("sweep_") and (top / "cells").is_dir()
        finished, waiting = 0, 0
        for place, label in _cells(top.resolve()) if of_sweep else [(top, "")]:
            for folder, done in below(place):
                finished, waiting = finished + done, waiting + (not done)
                if not done and folder == top:
                    raise ValueError(
                        f"{top} is not finished: it has no results.json; the command that began it goes on"
                    )
                if (real := os.path.realpath(folder)) in seen:
                    continue
                seen.add(real)
                if not done:
                    selection.unfinished.append(folder)
                    continue
                try:
                    selection.runs.append((read(folder), label))
                except ValueError as error:
                    if folder == top:
                        raise
                    selection.broken.append(str(error))
        if not finished:
            more = f"; {waiting} below it are not finished" if waiting else ""
            raise ValueError(f"{top} holds no finished run (a folder with results.json){more}")
    if not selection.runs:
        raise ValueError(f"none of the runs can be read, the first: {selection.broken[0]}")
    return selection


def _count(items: Sequence[Any]) -> str:
    return "1 run is" if len(items) == 1 else f"{len(items)} runs are"
