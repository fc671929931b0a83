"""The settings of a run in its report: what differs from the defaults first, then all in groups.

Also whether the text of the experiment file still fits them."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from utils.config.groups import COMMON, SPEED
from utils.config.hashing import NOT_HASHED, departing_digest
from utils.report.html import Block, Folded, Note, Table, as_text

TEXTS = ("about", "expected")  # keys that describe the experiment and set nothing
GROUPS = {
    title: keys for title, keys in COMMON.items() if title != [*COMMON][-1]
}  # what no group names is the method's
NO_MEANINGS: Mapping[str, str] = MappingProxyType({})


def tables(
    settings: Mapping[str, Any], defaults: Mapping[str, Any], meanings: Mapping[str, str] = NO_MEANINGS
) -> list[Block]:
    """What differs from the defaults, with the default beside it, and, folded, every setting in its group. `meanings` of the
    keys are shown where there are any."""
    shown = {key: value for key, value in settings.items() if key not in TEXTS}
    grouped = grouped_keys(shown)
    differing = [key for keys in grouped.values() for key in keys if shown[key] != defaults.get(key, ...)]

    def table(keys: list[str], beside: bool) -> Table:
        head = ["key", "value", *["default"] * beside, *["meaning"] * bool(meanings)]
        rows = []
        for key in keys:
            default = [as_text(defaults[key]) if key in defaults else "-"] if beside else []
            rows.append([key, as_text(shown[key]), *default, *[meanings.get(key, "-")] * bool(meanings)])
        return Table(head, rows, "names")

    groups: list[Block] = []
    for title, keys in grouped.items():
        groups += [Note(title, "group"), table(keys, False)]
    first: list[Block] = []
    if defaults:
        first = [Note(f"{len(differing)} of {len(shown)} settings differ from their default."), table(differing, True)]
    return [*first, Folded(f"All {len(shown)} settings", groups)]


def grouped_keys(settings: Mapping[str, Any]) -> dict[str, list[str]]:
    """{group: its keys of `settings`}, empty groups left out; each key once."""
    named = {title: [key for key in keys if key in settings] for title, keys in GROUPS.items()}
    known = {key for keys in named.values() for key in keys} | {*SPEED}
    named["Method and training"] = [key for key in settings if key not in known]
    named["Machine and speed"] = [key for key in SPEED if key in settings]
    return {title: keys for title, keys in named.items() if keys}


def changed(settings: Mapping[str, Any], environment: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """A sentence where `about` and `expected` of the experiment file do not belong to these settings; else empty.

    They do not if the settings are others than those of the expected numbers or, without such, if --set changed a key that
    decides numbers."""
    given = set_keys(str(environment.get("command", "")))
    keys = [key for key in given if key not in NOT_HASHED]
    expected = settings.get("expected")
    if isinstance(expected, Mapping) and defaults:
        fits = departing_digest(settings, defaults) == expected.get("settings")
    else:
        fits = not keys
    if fits or not any(settings.get(key) for key in TEXTS):
        return ""
    named = f" (--set {', '.join(keys)})" if keys else ""
    return (
        f"Settings of this run differ from those of its experiment file{named}: the file's description and expected numbers "
        "belong to others and are left out."
    )


def set_keys(command: str) -> list[str]:
    """The keys that --set changes in a command line; empty where it is no such line."""
    try:
        words = shlex.split(command)
    except ValueError:
        return []
    texts = [after for word, after in itertools.pairwise(words) if word == "--set"]
    texts += [word.removeprefix("--set=") for word in words if word.startswith("--set=")]
    return list(dict.fromkeys(text.partition("=")[0].strip() for text in texts))
