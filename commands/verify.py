"""`--verify RUN`: the numbers a shipped experiment is known to give, and whether this run gave them.

These numbers are the key `expected` of an experiment file, here called its card. A card holds for the settings and weights of
its file; accuracies are in percent.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import models
from utils.config.hashing import NOT_HASHED, departing_digest
from utils.config.strict_json import read_json
from utils.report.results import read
from utils.text import number, printable

TOLERANCE = 2.0  # points: what the rounding of another processor may change
EXPERIMENTS = Path(__file__).resolve().parents[1] / "exps"


def run(args: argparse.Namespace) -> int:
    passed, text = verify(args.verify)
    print(printable(text))
    return 0 if passed else 1


def digest(settings: Mapping[str, Any]) -> str:
    """12 hex digits over the settings that decide numbers and differ from their default, so that a new key ages no card."""
    schema = models.settings_of(str(settings["model_name"]))
    return departing_digest({k: v for k, v in settings.items() if k not in schema.only}, schema.defaults())


def verify(folder: Path, experiments: Path = EXPERIMENTS) -> tuple[bool, str]:
    """Whether the finished run in `folder` gave the numbers of its card, and the text that says so.

    Raises ValueError if there is no finished run, or no card for it: then the text says why."""
    results, settings, environment = (
        read(folder, name) for name in ("results.json", "config.json", "environment.json")
    )
    shipped, settings_digest = _shipped(folder, experiments), digest(settings)
    card = settings.get("expected") or (shipped or {}).get("expected")
    if card is None or card["settings"] != settings_digest:  # the cell of a sweep may be what another file ships
        card = next((other for other in _cards(experiments) if other["settings"] == settings_digest), card)
    weights = (environment.get("backbone") or {}).get("weight_hash")
    if card is None:
        curve = {str(results["seed"]): [a if a is None else round(a, 2) for a in results["top1_curve"]]}
        new = {"weights": weights, "settings": settings_digest, "tolerance": TOLERANCE, "top1_curve": curve}
        raise ValueError(
            f"{folder}: its experiment has no expected numbers. {_why(settings, shipped)}To compare later runs with this "
            f'one, give its file the key "expected": {json.dumps(new)}'
        )
    if settings_digest != card["settings"]:
        raise ValueError(
            f"{folder}: other settings ({settings_digest}) than the expected numbers belong to ({card['settings']})"
            f"{_changed(settings, shipped)}; run the shipped file as it is"
        )
    curve = card["top1_curve"].get(str(results["seed"]))
    if curve is None:
        seeds = ", ".join(card["top1_curve"])
        raise ValueError(f"{folder}: there are expected numbers for the seeds {seeds}, not for {results['seed']}")
    same_weights = weights == card["weights"]
    lines = [f"{folder}: {results['model_name']} on {results['dataset']}, seed {results['seed']}"]
    if not same_weights:
        lines.append(f"FAIL: the backbone's weights have the hash {weights}, expected is {card['weights']}")
    passed, comparison = _compared(curve, results["top1_curve"], card["tolerance"], same_weights)
    return passed and same_weights, "\n".join([*lines, *comparison])


def _compared(
    expected: list[float], measured: list[float], tolerance: float, same_weights: bool
) -> tuple[bool, list[str]]:
    """Whether all accuracies lie within the tolerance, and the lines of the table with its verdict."""
    lines = [f"{'after task':<12}{'expected':>10}{'measured':>10}{'difference':>12}"]
    diverged = []
    for task, value in enumerate(expected, start=1):
        accuracy = measured[task - 1] if task <= len(measured) else None
        gap = None if accuracy is None else accuracy - value
        if gap is None or abs(gap) > tolerance:
            diverged.append(task)
        lines.append(f"{task:<12}{number(value):>10}{number(accuracy):>10}{number(gap):>12}")
    if diverged:
        lines.append(f"FAIL: task {diverged[0]} diverged first, by more than the tolerance of {tolerance:g} points")
    elif same_weights:
        same = all(number(a) == number(b) for a, b in zip(expected, measured, strict=True))
        lines.append(
            f"PASS: {'every number is as expected' if same else f'all within the tolerance of {tolerance:g} points'}"
        )
    return not diverged, lines


def _shipped(folder: Path, experiments: Path) -> dict[str, Any] | None:
    """The shipped file that a run folder OUT/<stem>/<hash>/seed_<n> is named after, if there is one."""
    path = experiments / f"{folder.resolve().parent.parent.name}.json"
    return read_json(path)[0] if path.is_file() else None


def _cards(experiments: Path) -> Iterator[dict[str, Any]]:
    """All shipped cards."""
    for path in sorted(experiments.glob("*.json")):
        if isinstance(card := read_json(path)[0].get("expected"), dict):
            yield card


def _why(settings: Mapping[str, Any], shipped: Mapping[str, Any] | None) -> str:
    """What the experiment's `about` says on its numbers, if it does."""
    about = str((shipped or settings).get("about") or "")
    _, says, rest = about.partition("Expected:")
    return f"It says: Expected:{rest.split('Time:')[0].rstrip()} " if says else ""


def _changed(settings: Mapping[str, Any], shipped: Mapping[str, Any] | None) -> str:
    """Which keys differ from the shipped file, as a clause."""
    if shipped is None:
        return ""
    keys = [k for k, v in shipped.items() if k not in NOT_HASHED and settings.get(k) != v]
    if keys:
        return f": {', '.join(keys)} differ from the shipped file"
    return ": keys were added to those of the shipped file"
