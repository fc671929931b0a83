"""How values are written for people: numbers, times, values from files, and the nearest valid name."""

from __future__ import annotations

import difflib
import json
import re
import textwrap
from collections.abc import Iterable
from typing import Any

WIDTH = 100  # columns of console text; paths and commands may be longer, since one broken over lines cannot be copied


def number(value: float | None, digits: int = 2) -> str:
    """`value` with `digits` decimals, `-` for None; never `-0.00`."""
    return "-" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def nearest(name: str, known: Iterable[str]) -> str:
    """A did-you-mean clause with at most three names, empty if none is close; names that begin with `name` come first."""
    name, known = str(name)[:200], list(known)
    if name not in known and name.lower() in known:
        return f"; did you mean {name.lower()!r}?"
    longer = sorted((k for k in known if len(name) >= 3 and k.startswith(name)), key=lambda k: (len(k), k))
    close = list(dict.fromkeys([*longer, *difflib.get_close_matches(name, known, n=3, cutoff=0.6)]))[:3]
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def shown(value: Any) -> str:
    """A value as JSON for a message, cut after 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:56] + " ..."


def shortened(text: str, most: int) -> str:
    """`text` with at most about `most` characters: the middle of a longer text is left out."""
    return text if len(text) <= most else f"{text[: most * 2 // 3]} ... {text[-most // 3 :]}"


def first_line(text: str, most: int = 300) -> str:
    """The first line of another program's message, cut after a word if it has more than `most` characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return textwrap.shorten(lines[0], most, placeholder=" ...") if lines else "no reason given"


def printable(text: str) -> str:
    """`text` with every character that a terminal would interpret (escape sequences, changes of writing direction) or that
    cannot be encoded written like `\\x1b`; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


# terminal sequences (colours, cursor moves, window titles) and every other control character but tab and newline
CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-_]|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)


def clock(seconds: float) -> str:
    """A duration as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
