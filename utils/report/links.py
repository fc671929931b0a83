"""Links between the pages of a command: the other seeds, the page of all, and the files of the run, as relative addresses.

A seed's page is written when its run ends, before those of later seeds: each new page renews the links of the others.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from utils.files.storage import write_bytes
from utils.report.html import render

PAGE = "report.html"
FILES = {"config.json": "settings", "results.json": "results", "metrics.jsonl": "metrics", "run.log": "log"}
NAV = re.compile(r"<nav>.*?</nav>", re.DOTALL)


def nav(folder: Path) -> str:
    """The <nav> element of the page in the seed's run folder `folder`, of what is there now; results.json is there soon."""
    folder, seeds = Path(folder), []
    for path in [folder, *_others(folder)]:
        name = path.name.removeprefix("seed_")
        seeds.append((name, None if path == folder else f"../{path.name}/{PAGE}"))
    seeds.sort(key=lambda seed: (len(seed[0]), seed[0]))
    above = {"all seeds": f"../{PAGE}"} if (folder.parent / PAGE).is_file() else {}
    above |= {"the sweep" if n == 1 else f"sweep {n}": address for n, address in enumerate(_sweeps(folder), start=1)}
    return render("nav.html", seeds=seeds if folder.name.startswith("seed_") else [], above=above, files=FILES)


def renew(folder: Path) -> None:
    """Writes the links of the other seeds' pages beside `folder` again, so that they lead to its page too. A page that
    cannot be read or has no links is left as it is."""
    for other in _others(folder):
        renew_page(other)


def renew_page(folder: Path) -> None:
    """Writes the links of the page in the run folder `folder` again."""
    page = folder / PAGE
    try:
        text = page.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return
    if (old := NAV.search(text)) and old[0] != (links := nav(folder)):
        write_bytes(page, (text[: old.start()] + links + text[old.end() :]).encode())


def _sweeps(folder: Path) -> list[str]:
    """The pages of the sweeps whose table names the settings of this run."""
    pages = []
    for table in sorted(folder.parent.parent.glob("sweep_*/table.csv")):
        with contextlib.suppress(OSError):
            named = f",{folder.parent.name}," in table.read_text(encoding="utf-8", errors="replace")
            if named and (table.parent / PAGE).is_file():
                pages.append(f"../../{table.parent.name}/{PAGE}")
    return pages


def _others(folder: Path) -> list[Path]:
    """The folders of the other seeds that have a page."""
    seeds = Path(folder).parent.glob(f"seed_*/{PAGE}") if Path(folder).name.startswith("seed_") else ()
    return [page.parent for page in seeds if page.parent.name.removeprefix("seed_").isdigit() and page.parent != folder]
