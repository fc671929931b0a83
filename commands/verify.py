"""Reproduction cards: the numbers a shipped experiment is known to give, and whether a run gave them (`--verify RUN`).

A card is the key `expected` of an experiment file. It holds for the file's own settings and weights; accuracies in percent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.config.hashing import NOT_HASHED
from utils.config.schema import Experiment
from utils.config.strict_json import read_json
from utils.report.results import read
from utils.text import number

TOLERANCE = 2.0  # points: what another processor's rounding may change
SettingsOf = Callable[[str], type[Experiment]]


def digest(settings: Mapping[str, Any], settings_of: SettingsOf) -> str:
    """12 hex digits over the settings that decide numbers and are not at their default, so that new keys do not age cards."""
    schema = settings_of(str(settings["model_name"]))
    fields = schema.model_fields
    kept = {}
    for key, value in settings.items():
        default = fields[key].get_default() if key in fields and not fields[key].is_required() else ...
        if key not in NOT_HASHED | schema.only.keys() and value != (
            list(default) if isinstance(default, tuple) else default
        ):
            kept[key] = value
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def verify(run: Path, exps: Path, settings_of: SettingsOf) -> tuple[bool, str]:
    """Whether a finished run gave its card's numbers, and the text that says so.

    Raises ValueError if the folder has no finished run, or its experiment no numbers for it: then the text says why."""
    results, settings, environment = (read(run, name) for name in ("results.json", "config.json", "environment.json"))
    shipped, own = _shipped(run, exps), digest(settings, settings_of)
    card = settings.get("expected") or (shipped or {}).get("expected")
    if card is None or card["settings"] != own:  # a sweep's cell may be what another file ships
        card = next((other for other in _cards(exps) if other["settings"] == own), card)
    head = f"{run}: {results['model_name']} on {results['dataset']}, seed {results['seed']}"
    weights = (environment.get("backbone") or {}).get("weight_hash")
    if card is None:
        curve = {str(results["seed"]): [a if a is None else round(a, 2) for a in results["top1_curve"]]}
        made = {"weights": weights, "settings": own, "tolerance": TOLERANCE, "top1_curve": curve}
        raise ValueError(
            f"{run}: its experiment has no expected numbers. {_why(settings, shipped)}To compare later runs with this one, "
            f'give its file the key "expected": {json.dumps(made)}'
        )
    if own != card["settings"]:
        raise ValueError(
            f"{run}: other settings ({own}) than the expected numbers belong to ({card['settings']})"
            f"{_changed(settings, shipped)}; run the shipped file as it is"
        )
    curve = card["top1_curve"].get(str(results["seed"]))
    if curve is None:
        seeds = ", ".join(card["top1_curve"])
        raise ValueError(f"{run}: there are expected numbers for the seeds {seeds}, not for {results['seed']}")
    lines = [head]
    right = weights == card["weights"]
    if not right:
        lines.append(f"FAIL: the backbone's weights have the hash {weights}, expected is {card['weights']}")
    lines.append(f"{'after task':<12}{'expected':>10}{'found':>10}{'difference':>12}")
    wrong = []
    found = results["top1_curve"]
    for task, value in enumerate(curve, start=1):
        own_value = found[task - 1] if task <= len(found) else None
        gap = None if own_value is None else own_value - value
        if gap is None or abs(gap) > card["tolerance"]:
            wrong.append(task)
        lines.append(f"{task:<12}{number(value):>10}{number(own_value):>10}{number(gap):>12}")
    if wrong:
        lines.append(
            f"FAIL: task {wrong[0]} diverged first, by more than the tolerance of {card['tolerance']:g} points"
        )
    elif right:
        same = all(number(a) == number(b) for a, b in zip(curve, found, strict=True))
        how = "every number is as expected" if same else f"all within the tolerance of {card['tolerance']:g} points"
        lines.append(f"PASS: {how}")
    return right and not wrong, "\n".join(lines)


def _shipped(run: Path, exps: Path) -> dict[str, Any] | None:
    """The shipped file that a run folder OUT/<stem>/<hash>/seed_<n> is named after, if there is one."""
    path = exps / f"{run.resolve().parent.parent.name}.json"
    return read_json(path)[0] if path.is_file() else None


def _cards(exps: Path) -> Iterator[dict[str, Any]]:
    """All shipped cards."""
    for path in sorted(exps.glob("*.json")):
        if isinstance(card := read_json(path)[0].get("expected"), dict):
            yield card


def _why(settings: Mapping[str, Any], shipped: Mapping[str, Any] | None) -> str:
    """What the experiment itself says on its numbers, if it does."""
    about = str((shipped or settings).get("about") or "")
    _, found, rest = about.partition("Expected:")
    return f"It says: Expected:{rest.split('Time:')[0].rstrip()} " if found else ""


def _changed(settings: Mapping[str, Any], shipped: Mapping[str, Any] | None) -> str:
    if shipped is None:
        return ""
    keys = [k for k, v in shipped.items() if k not in NOT_HASHED and settings.get(k) != v]
    return (
        f": {', '.join(keys)} differ from the shipped file"
        if keys
        else ": keys were added to those of the shipped file"
    )
