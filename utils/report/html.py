"""What the HTML pages are composed of, and the rendering of templates/*.html by jinja2, which escapes every text.

A page is a single file without scripts, whose links lead to files beside it, for light and dark screens and for phones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

from utils.text import printable

TEMPLATES = Path(__file__).parent / "templates"


class Bold(str):
    """A table cell in bold print."""

    strong = True


class Two(str):
    """A table cell of two lines: the text and, smaller, `below`; `strong` puts the text in bold print."""

    below: str
    strong: bool

    def __new__(cls, text: str, below: str = "", strong: bool = False) -> Two:
        cell = super().__new__(cls, text)
        cell.below, cell.strong = below, strong
        return cell


class Link(str):
    """A table cell that leads to a file beside the page: `href` is its relative path, quoted as in an address."""

    href: str

    def __new__(cls, text: str, path: str) -> Link:
        cell = super().__new__(cls, text)
        cell.href = quote(path)
        return cell


@dataclass(frozen=True)
class Table:
    """A table that scrolls sideways in its box; `kind` "names": texts, "names across": in many columns, "rows": numbers
    behind the name of a row, "rows cards": on a phone each row is a block with a line a column, which needs no scrolling."""

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    kind: str = ""
    block: ClassVar[str] = "table"


@dataclass(frozen=True)
class Note:
    """A paragraph, small or, with `kind` "warn", as a warning."""

    text: str
    kind: str = "soft"
    block: ClassVar[str] = "note"


@dataclass(frozen=True)
class Lines:
    """Lines in typewriter print, such as commands to be copied into a shell."""

    lines: Sequence[str]
    block: ClassVar[str] = "lines"


@dataclass(frozen=True)
class Figure:
    """A picture as an <svg> element (the only text that is not escaped) and what it shows."""

    svg: str
    caption: str
    block: ClassVar[str] = "figure"


@dataclass(frozen=True)
class Folded:
    """Blocks behind a line that opens them."""

    summary: str
    blocks: Sequence[Block]
    block: ClassVar[str] = "folded"


@dataclass(frozen=True)
class Pictures:
    """Small pictures beside each other: (data: URL, side in pixels, caption) of each."""

    shots: Sequence[tuple[str, int, str]]
    block: ClassVar[str] = "pictures"


Block = Table | Note | Lines | Figure | Folded | Pictures


@dataclass(frozen=True)
class Section:
    """A heading with blocks below it; on wide screens two stand side by side, a `wide` one alone."""

    heading: str
    blocks: Sequence[Block]
    wide: bool = False


def folded(summary: str, *blocks: Block) -> list[Block]:
    """One folded block, as a list to be joined with others."""
    return [Folded(summary, blocks)]


def as_text(value: Any) -> str:
    """A setting as it is read: text as it stands, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def flat(data: Mapping[str, Any]) -> dict[str, str]:
    """Names and texts; a nested mapping becomes dotted names, other structures JSON."""
    texts: dict[str, str] = {}
    for key, value in data.items():
        for name, item in value.items() if isinstance(value, Mapping) else [("", value)]:
            texts[f"{key}.{name}" if name else key] = as_text(item)
    return texts


def facts(data: Mapping[str, Any]) -> Table:
    """Two columns, name and value."""
    return Table((), list(flat(data).items()), "names")


def figure_sections(
    texts: Mapping[str, tuple[str, str]],
    svgs: Mapping[str, str],
    below: Mapping[str, Iterable[Block]],
    above: Mapping[str, Iterable[Block]],
) -> list[Section]:
    """A section for each name of `texts` (heading, caption) that has a picture or blocks `below` it, in their order."""
    sections = []
    for name, (heading, caption) in texts.items():
        rest = list(below.get(name, ()))
        picture = [Figure(svgs[name], caption)] if name in svgs else []
        if picture or rest:
            sections.append(Section(heading, [*above.get(name, ()), *picture, *rest]))
    return sections


def templates() -> Any:
    """The jinja2 environment of templates/, whose `get_template(name)` reads one."""
    import jinja2  # only who writes a page needs it

    loader = jinja2.FileSystemLoader(TEMPLATES)
    return jinja2.Environment(
        loader=loader,
        autoescape=True,
        finalize=lambda value: printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def render(template: str, **values: Any) -> str:
    """The text of templates/`template` with `values`."""
    return str(templates().get_template(template).render(**values))
