"""Strict reading of JSON: what Python's parser accepts although no setting can use it (duplicate keys, NaN, 1e999) is a fault.

Faults are collected, so that `utils.config.resolve` reports them together with its faults.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.text import nearest, shortened, shown

MOST_FAULTS, LONGEST_FAULT = 60, 600  # faults shown of a file, and characters of each


class ConfigError(ValueError):
    """Bad input: all faults of one experiment file, one a line."""

    def __init__(self, source: str, faults: Sequence[str]):
        self.faults = list(faults)
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        lines = [shortened(fault, LONGEST_FAULT) for fault in self.faults[:MOST_FAULTS]]
        more = [f"and {len(self.faults) - MOST_FAULTS} more"] if len(self.faults) > MOST_FAULTS else []
        super().__init__("\n  - ".join([f"{source}: {count}", *lines, *more]))


def read_json(path: Path) -> tuple[dict[str, Any], list[str]]:
    """(the object in a JSON file, faults that a plain parser accepts, such as duplicate keys, NaN and Infinity).

    Raises ConfigError if the file cannot be read as a JSON object."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        near = [str(p) for folder in (path.parent, path.parent / "exps") for p in folder.glob("*.json")]
        close = nearest(str(path), near) or nearest(path.name, [Path(p).name for p in near])
        raise ConfigError(str(path), [f"there is no such file{close}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), [f"is not UTF-8 text (byte {error.start}); save it as UTF-8"]) from None
    except ValueError as error:  # a path with a zero byte
        raise ConfigError(str(path), [f"is not a path: {error}"]) from None
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read as an experiment file: {error.strerror}"]) from None
    values, faults = parse_json(text, str(path))
    if not isinstance(values, dict):
        fault = f"an object {{...}} of keys and values is expected at the top, got {shown(values)}"
        raise ConfigError(str(path), [fault])
    return values, faults + [fault for key, value in values.items() for fault in strange(key, value)]


def parse_json(text: str, source: str) -> tuple[Any, list[str]]:
    """(the value of a JSON text, one fault per duplicate or non-text key, which is left out).

    Raises ConfigError if the text is not JSON."""
    faults: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in items:
            if key in seen:
                faults.append(f"{key}: the key is there twice, with {shown(seen[key])} and {shown(value)}; keep one")
            if complaint := _not_text(key):
                faults.append(f"{key}: the key {complaint}")
            else:
                seen[key] = value
        return seen

    try:
        return json.loads(text, object_pairs_hook=pairs), faults
    except json.JSONDecodeError as error:
        what = f"{error.msg} at line {error.lineno}, column {error.colno}" if text.strip() else "the file is empty"
        if "\0" in text:
            what += "; it contains zero bytes, as UTF-16 does: save it as UTF-8"
        raise ConfigError(source, [f"is not valid JSON: {what}"]) from None
    except RecursionError:
        raise ConfigError(source, ["is not usable JSON: nested too deep; an experiment is flat"]) from None
    except ValueError:  # Python refuses to convert whole numbers of thousands of digits
        raise ConfigError(source, ["is not usable JSON: it contains a number of thousands of digits"]) from None


def parse_set(texts: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """(values, faults) of `--set key=value` overrides: a value is read as JSON, else taken as a string."""
    values: dict[str, Any] = {}
    faults: list[str] = []
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            faults.append(f"--set {text}: key=value is expected")
            continue
        if key in values:
            faults.append(f"{key}: set twice on the command line; keep one")
        try:
            values[key], faults_of_value = parse_json(value, "--set")
            faults += faults_of_value
        except ConfigError:
            values[key] = value
        faults += strange(key, values[key])
    return values, faults


def strange(key: str, value: Any) -> list[str]:
    """Faults of a value that no setting can use: NaN, 1e999, integers beyond 64 bits, strings that are not text."""
    if isinstance(value, str):
        return [f"{key}: the text {complaint}; got {shown(value)}"] if (complaint := _not_text(value)) else []
    if isinstance(value, float) and not math.isfinite(value):
        return [f"{key}: {value} is not a finite number"]
    if isinstance(value, int) and abs(value) >= 2**63:
        return [f"{key}: a whole number of {len(str(abs(value)))} digits is too large"]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [fault for item in inner for fault in strange(key, item)]


def _not_text(text: str) -> str | None:
    """Why `text` can be neither printed nor used as a path; None if it can."""
    if "\0" in text:
        return "contains a zero byte"
    if any("\ud800" <= char <= "\udfff" for char in text):
        return "is not Unicode text (a lone half of a surrogate pair, or a name that is not UTF-8)"
    return None
