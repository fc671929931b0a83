"""Parts of the HTML pages: one style for light and dark screens and for phones, tables, folded details, a whole document.

A page is a single file without links or scripts. Every text is escaped here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6570; --paper: #ffffff; --tile: #f2f4f7; --line: #d5dae0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #9aa5b1; --paper: #14171b; --tile: #1f242a; --line: #39414a; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.warn { background: var(--tile); border-left: .35rem solid #D55E00; padding: .5rem .8rem; font-weight: 600; }
.soft { color: var(--soft); margin: .25rem 0 1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .5rem; }
.tiles div { background: var(--tile); border-radius: .5rem; padding: .6rem .8rem; }
.tiles b { display: block; font-size: 1.4rem; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: .85rem; }
pre { background: var(--tile); border-radius: .5rem; padding: .8rem; white-space: pre-wrap; margin: 0; }
figure, .wide { margin: .5rem 0; overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 34rem; height: auto; }
figcaption { color: var(--soft); font-size: .9rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { text-align: right; padding: .2rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top;
  white-space: nowrap; }
th { font-weight: 600; }
.names th, .names td { text-align: left; overflow-wrap: anywhere; white-space: normal; }
.names td:first-child { white-space: nowrap; }
.across td + td { min-width: 6rem; max-width: 20rem; }
.rows td:first-child, .rows th:first-child { text-align: left; }
.rows td:first-child { white-space: normal; min-width: 11rem; }
summary { cursor: pointer; margin: .5rem 0; }
.samples { display: flex; flex-wrap: wrap; gap: .75rem 1.25rem; }
.samples figure { margin: 0; max-width: 100%; }
.samples img { display: block; max-width: 100%; height: auto; }
""".strip()


class Bold(str):
    """A table cell in bold print."""


def _cell(value: Any) -> str:
    text = escape(str(value))
    return f"<td><b>{text}</b></td>" if isinstance(value, Bold) else f"<td>{text}</td>"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = "") -> str:
    """A table that scrolls sideways in its own box; `kind` "names": texts, "names across": in many columns, "rows":
    numbers behind the name of a row."""
    top = "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>" if head else ""
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}">{top}{body}</table></div>'


def as_text(value: Any) -> str:
    """A setting as it is read: text as it stands, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def facts(data: Mapping[str, Any]) -> str:
    """Two columns, name and value; a nested mapping becomes dotted names, other structures JSON."""
    flat: dict[str, str] = {}
    for key, value in data.items():
        for name, item in value.items() if isinstance(value, Mapping) else [("", value)]:
            flat[f"{key}.{name}" if name else key] = as_text(item)
    return table((), flat.items(), "names")


def details(summary: str, inner: str) -> str:
    """`inner`, itself HTML, behind a line that opens it."""
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>"


def commands(lines: Sequence[str]) -> str:
    """Lines to be copied into a shell."""
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def document(title: str, parts: Iterable[str]) -> str:
    """The whole page; empty parts are left out."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body>\n</html>\n"
    )
