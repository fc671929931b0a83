"""How values are written for people: numbers, times, values from files, and the nearest valid name."""

from __future__ import annotations

import difflib
import json
import re
import shlex
import textwrap
from collections.abc import Iterable
from typing import Any

WIDTH = 100  # columns of console text; paths and commands may be longer, since one broken over lines cannot be copied


def number(value: float | None, digits: int = 2) -> str:
    """`value` with `digits` decimals, `-` for None; never `-0.00`."""
    return "-" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def counted(count: int, what: str, several: str = "") -> str:
    """`1 class`, `2 classes`: a count with its noun, whose plural is `several`, by default `what` with an s."""
    return f"{count:,} {what if count == 1 else several or f'{what}s'}"


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
    if isinstance(value, list | tuple | str) and len(value) > 1000:
        value = value[:1000]
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:56] + " ..."


def shortened(text: str, most: int) -> str:
    """`text` with at most about `most` characters: the middle of a longer text is left out."""
    return text if len(text) <= most else f"{text[: most * 2 // 3]} ... {text[-most // 3 :]}"


def first_line(text: str, most: int = 300) -> str:
    """The first line of another program's message, cut after a word if it has more than `most` characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return textwrap.shorten(lines[0], most, placeholder=" ...") if lines else "no reason given"


# What a text from a file, a folder's name or another program may hold must not act where it is shown: a function a place ----


def printable(text: str) -> str:
    """For a terminal, a log or a page: every character that would be interpreted (escape sequences, changes of writing
    direction) or that cannot be encoded is written like `\\x1b`; line breaks and tabs stay."""
    if text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    """`printable` for a place that has one line, such as a cell of a table: line breaks and tabs are written `\\n`, `\\t`."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def csv_cell(text: str) -> str:
    """For a field of CSV: spreadsheets take `=cmd` for a formula and show a text that begins with an apostrophe as it is."""
    return f"'{text}" if text.lstrip()[:1] in _FORMULA and text else text


def csv_text(cell: str) -> str:
    """Inverse of `csv_cell`."""
    return cell[1:] if cell[:1] == "'" and cell[1:].lstrip()[:1] in _FORMULA and cell[1:] else cell


def latex(text: str) -> str:
    """For LaTeX: `text` is printed as it is, in one line. At the start of a table's row `[` and `*` would belong to the line
    break before it."""
    escaped = re.sub(r"[&%$#_{}\\~^<>|`]", lambda match: _LATEX[match[0]], one_line(text))
    return f"{{}}{escaped}" if escaped[:1] in ("[", "*") else escaped


def markdown(text: str) -> str:
    """For a cell of a Markdown table: no link, picture, address, HTML, code, formula or further cell arises from `text`."""
    text = re.sub(
        r"[\\`*\[\]<>|~!$]|&(?=[#\w])|(?<!\w)_|_(?!\w)|:(?=//)", lambda match: f"\\{match[0]}", one_line(text)
    )
    return re.sub(r"(?i)\bwww\.", lambda match: f"{match[0][:3]}&#46;", text)


def shell(words: Iterable[str]) -> str:
    """A command of these words for a shell, in one printable line; odd words are quoted as bash has it, `$'\\x1b'`."""
    return " ".join(shlex.quote(word) if word.isprintable() else _ansi_quoted(word) for word in words)


def _ansi_quoted(word: str) -> str:
    parts = []
    for char in word:
        if char.isprintable():
            parts.append(f"\\{char}" if char in "\\'" else char)
        else:
            parts += [f"\\x{byte:02x}" for byte in char.encode("utf-8", "surrogateescape")]
    return f"$'{''.join(parts)}'"


_FORMULA = tuple("=+-@\t\r'")
_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
}
# terminal sequences (colours, cursor moves, window titles) and every other control character but tab and newline
CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-_]|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)


def clock(seconds: float) -> str:
    """A duration as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
