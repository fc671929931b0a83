"""Strict reading of JSON: what Python's parser accepts although no setting can use it (duplicate keys, NaN, 1e999) is a fault.

Faults are collected, so that `utils.config.resolve` reports them together with its faults.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from utils.text import nearest, shortened, shown

MOST_FAULTS, LONGEST_FAULT = 60, 600  # faults shown of a file, and characters of each
MOST_BYTES = 10_000_000  # of an experiment file
DEEPEST = 32  # lists and objects inside each other; a sweep has three
TOO_DEEP = "is not usable JSON: nested too deep; an experiment is flat"

_JSON_WORDS = {"True": "true", "False": "false", "None": "null"}


class ConfigError(ValueError):
    """Bad input: all faults of one experiment file, one a line."""

    def __init__(self, source: str, faults: Sequence[str]):
        self.faults = list(faults)
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        lines = [shortened(fault, LONGEST_FAULT) for fault in self.faults[:MOST_FAULTS]]
        more = [f"and {len(self.faults) - MOST_FAULTS} more"] if len(self.faults) > MOST_FAULTS else []
        super().__init__("\n  - ".join([f"{source}: {count}", *lines, *more]))


class Unusable(ConfigError):
    """A JSON text that no setting can use, though it is one."""


def read_json(path: Path, most: int = MOST_BYTES) -> tuple[dict[str, Any], list[str]]:
    """(the object in a JSON file, faults that a plain parser accepts, such as duplicate keys, NaN and Infinity).

    Raises ConfigError if the file cannot be read as a JSON object or has more than `most` bytes."""
    try:
        if path.is_file() and (size := path.stat().st_size) > most:
            raise ConfigError(str(path), [f"has {size:,} bytes; at most {most:,} are read"])
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        near = [str(p) for folder in (path.parent, path.parent / "exps") for p in folder.glob("*.json")]
        close = nearest(str(path), near) or nearest(path.name, [Path(p).name for p in near])
        raise ConfigError(str(path), [f"there is no such file{close}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), [f"is not UTF-8 text (byte {error.start}); save it as UTF-8"]) from None
    except ConfigError:
        raise
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
        value = json.loads(text, object_pairs_hook=pairs)
        if _depth(value) > DEEPEST:
            raise RecursionError
        return value, faults
    except json.JSONDecodeError as error:
        what = _fault_in(text, error) if text.strip() else "the file is empty"
        if "\0" in text:
            what += "; it contains zero bytes, as UTF-16 does: save it as UTF-8"
        raise ConfigError(source, [f"is not valid JSON: {what}"]) from None
    except RecursionError:
        raise Unusable(source, [TOO_DEEP]) from None
    except ValueError:  # Python refuses to convert whole numbers of thousands of digits
        raise Unusable(source, ["is not usable JSON: it contains a number of thousands of digits"]) from None


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _depth(value: Any) -> int:
    """How many lists and objects lie inside each other, counted up to just above DEEPEST."""
    layer, depth = [value], 0
    while (layer := [item for item in layer if isinstance(item, dict | list)]) and depth <= DEEPEST:
        layer = [item for outer in layer for item in _inside(outer)]
        depth += 1
    return depth


def _fault_in(text: str, error: json.JSONDecodeError) -> str:
    """What is wrong at the place where the parser stopped, in words for the habits of other languages, else the parser's."""
    place, here = f"line {error.lineno}", text[error.pos :].lstrip()
    first = here[:1]
    if first == "#" or here.startswith(("//", "/*")):
        return f"JSON has no comments: {place}; what the experiment is may stand in the key about"
    comma = text.rfind(",", 0, error.pos + 1)
    if comma >= 0 and (closing := re.match(r",\s*([}\]])", text[comma:])):
        line = text.count("\n", 0, comma) + 1
        return f"JSON has no comma before {closing[1]}: line {line}; remove the comma"
    if first in ("'", "\u2018", "\u2019", "\u201c", "\u201d"):
        return f'JSON has straight double quotes ("): {place}, column {error.colno} has {first}'
    if word := re.match(r"(True|False|None)\b", here):
        return f"JSON writes {_JSON_WORDS[word[1]]} for {word[1]}: {place}"
    if error.msg.startswith("Expecting property name") and (name := re.match(r"\w+", here)):
        return f'a key stands in double quotes, "{shortened(name[0], 40)}": {place}'
    if error.msg.startswith("Expecting ',' delimiter"):
        return f"a comma or a closing bracket is missing at or before {place}, column {error.colno}"
    if error.msg.startswith("Invalid control character"):
        if (sign := text[error.pos : error.pos + 1]) in "\r\n":
            return f"a text goes on over the end of its line: {place}; write \\n for a line break in a text"
        return (
            f"a text holds the control character {json.dumps(sign)}: {place}, column {error.colno}; write it like that"
        )
    if error.msg.startswith("Extra data"):
        return f"the text goes on after the end of the object: {place}, column {error.colno}"
    return f"{error.msg} at {place}, column {error.colno}"


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
        except Unusable as error:
            faults.append(f"{key}: {error.faults[0]}")
            continue
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
    return [fault for item in _inside(value) for fault in strange(key, item)]


def _not_text(text: str) -> str | None:
    """Why `text` can be neither printed nor used as a path; None if it can."""
    if "\0" in text:
        return "contains a zero byte"
    if any("\ud800" <= char <= "\udfff" for char in text):
        return "is not Unicode text (a lone half of a surrogate pair, or a name that is not UTF-8)"
    return None
