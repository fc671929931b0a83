"""JSON as strict as an experiment needs, read and written: what Python lets through (doubled keys, NaN, 1e999) is a fault.

Reading collects faults instead of stopping at the first; `utils.config` adds its own and reports them together.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

MOST_FAULTS, LONGEST_FAULT = 60, 600  # shown of a file; whoever has more is not helped by reading them all


class ConfigError(ValueError):
    """Bad input: every fault found in one experiment file, one a line."""

    def __init__(self, source: str, faults: Sequence[str]):
        self.faults = list(faults)
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        lines = [shortened(fault, LONGEST_FAULT) for fault in self.faults[:MOST_FAULTS]]
        more = [f"and {len(self.faults) - MOST_FAULTS} more"] if len(self.faults) > MOST_FAULTS else []
        super().__init__("\n  - ".join([f"{source}: {count}", *lines, *more]))


def nearest(name: str, known: Iterable[str]) -> str:
    """A did-you-mean clause of at most three names, empty if nothing is close; names that `name` begins come first."""
    name, known = str(name)[:200], list(known)
    if name not in known and name.lower() in known:
        return f"; did you mean {name.lower()!r}?"
    begun = sorted((k for k in known if len(name) >= 3 and k.startswith(name)), key=lambda k: (len(k), k))
    close = list(dict.fromkeys([*begun, *difflib.get_close_matches(name, known, n=3, cutoff=0.6)]))[:3]
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def read_json(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The object in a JSON file and the faults a plain parser would let through, such as doubled keys, NaN, Infinity.

    Raises ConfigError if the file cannot be read as a JSON object at all."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        near = [str(p) for folder in (path.parent, path.parent / "exps") for p in folder.glob("*.json")]
        close = nearest(str(path), near) or nearest(path.name, [Path(p).name for p in near])
        raise ConfigError(str(path), [f"there is no such file{close}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), [f"is not UTF-8 text (byte {error.start}); save it as UTF-8"]) from None
    except ValueError as error:  # a path with a zero byte
        raise ConfigError(str(path), [f"is no path: {error}"]) from None
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read as an experiment file: {error.strerror}"]) from None
    values, faults = parse_json(text, str(path))
    if not isinstance(values, dict):
        fault = f"an object {{...}} of keys and values is expected at the top, got {shown(values)}"
        raise ConfigError(str(path), [fault])
    return values, faults + [fault for key, value in values.items() for fault in strange(key, value)]


def parse_json(text: str, source: str) -> tuple[Any, list[str]]:
    """The value a JSON text stands for and a fault for every key that is doubled or no text, which is left out.

    Raises ConfigError if it is no JSON."""
    faults: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in items:
            if key in seen:
                faults.append(f"{key}: the key stands twice, with {shown(seen[key])} and {shown(value)}; keep one")
            if no_text := _no_text(key):
                faults.append(f"{key}: the key {no_text}")
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
    """`--set key=value` overrides: the value is read as JSON, else taken as a string."""
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
            values[key], found = parse_json(value, "--set")
            faults += found
        except ConfigError:
            values[key] = value
        faults += strange(key, values[key])
    return values, faults


def strange(key: str, value: Any) -> list[str]:
    """Faults for what JSON should not hold or no setting can use: NaN, 1e999, numbers beyond 64 bits, text that is none."""
    if isinstance(value, str):
        return [f"{key}: the text {no_text}; got {shown(value)}"] if (no_text := _no_text(value)) else []
    if isinstance(value, float) and not math.isfinite(value):
        return [f"{key}: {value} is not a finite number"]
    if isinstance(value, int) and abs(value) >= 2**63:
        return [f"{key}: a whole number of {len(str(abs(value)))} digits is too large"]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [fault for item in inner for fault in strange(key, item)]


def _no_text(text: str) -> str | None:
    """What makes `text` neither printable nor a path, None if nothing does."""
    if "\0" in text:
        return "holds a zero byte"
    if any("\ud800" <= char <= "\udfff" for char in text):
        return "is no Unicode text (a lone half of a surrogate pair, or a name that is not UTF-8)"
    return None


def shown(value: Any) -> str:
    """A value as JSON for a message, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:56] + " ..."


def shortened(text: str, most: int) -> str:
    """`text` with at most about `most` characters: of a longer one the middle is left out."""
    return text if len(text) <= most else f"{text[: most * 2 // 3]} ... {text[-most // 3 :]}"


def printable(text: str) -> str:
    """`text` with whatever could act on a terminal (escape sequences, signs that change the direction of writing) or cannot
    be encoded written as `\\x1b`; lines stay lines."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def plain(value: Any, where: str = "") -> Any:
    """`value` as strict JSON data: numpy and torch numbers and arrays become Python's, paths text, tuples lists.

    NaN and infinity raise ValueError, other types TypeError; both name the field, as in `seconds.train` or `scores[2]`.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"field '{where}' is {float(value)}, not a finite number (did the training diverge?)")
        return float(value)
    if isinstance(value, Mapping):
        if bad := [key for key in value if not isinstance(key, (str, int)) or isinstance(key, bool)]:
            raise TypeError(f"field '{where}': key {bad[0]!r} is neither text nor a whole number")
        return {str(key): plain(item, f"{where}.{key}" if where else str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist") and hasattr(value, "shape"):  # numpy scalar or array, torch tensor
        return plain(value.tolist(), where)
    raise TypeError(f"field '{where}': {type(value).__name__} cannot be written as JSON")
