"""The end of a command with several runs: a sentence that says what they show, and one page with the table, curves and links.

The page is report.html in the folder of the command: the sweep's, or that of the settings for the seeds of one experiment.
"""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Sequence
from pathlib import Path

from utils.compare import page as comparison_page
from utils.compare import rows as compare_rows
from utils.compare import runs, summary
from utils.compare.rows import Arm
from utils.files import storage
from utils.report import links
from utils.text import WIDTH, printable

PAGE = "report.html"
MOST_LINKED = 200  # reports that lead back to the page; of more runs the first


def rows_of(cells: Sequence[tuple[str, Sequence[Path]]]) -> list[Arm]:
    """A row for each cell (label, folders of its finished runs) that has any; an empty label is replaced by a name."""
    return compare_rows.rows_of([(runs.read(folder), label) for label, folders in cells for folder in folders])


def show(folder: Path, name: str, rows: Sequence[Arm], with_table: bool) -> None:
    """Prints the table, if asked for, the sentence, and the path of the page in `folder`, which is written where it is missing
    or shows other runs. `name` begins the page's title."""
    if not rows:
        return
    if with_table:
        print(printable(f"\n{summary.table(rows)}"))
    said = textwrap.fill(summary.sentence(rows), WIDTH, break_long_words=False, break_on_hyphens=False)
    print(printable(f"\n{said}\npage: {write(folder, name, rows)}"))


def write(folder: Path, name: str, rows: Sequence[Arm], notes: Sequence[str] = (), always: bool = False) -> Path:
    """Writes the page of these rows into `folder`, if it is missing or shows other runs (or `always`); returns its path."""
    path, mark = folder / PAGE, f"<!-- runs {_digest(rows)} -->\n"
    if not always and path.is_file() and path.read_text(encoding="utf-8", errors="replace").endswith(mark):
        return path
    text = comparison_page.page(
        rows,
        summary.compared(rows, numbered=True),
        [*notes, *compare_rows.remarks(rows)],
        name=name,
        lead=summary.sentence(rows),
        place=folder,
    )
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_bytes(path, (text.rstrip() + "\n" + mark).encode(errors="backslashreplace"))
    for run in [run for row in rows for run in row.runs.values()][:MOST_LINKED]:
        links.renew_page(run.folder)
    return path


def write_again(folder: Path) -> Path:
    """Writes the page of all finished runs in or below `folder`, such as a sweep's or that of an experiment's settings.

    Raises ValueError where there is none."""
    selection = runs.find([folder])
    return write(folder, folder.resolve().name, compare_rows.rows_of(selection.runs), selection.notes(), always=True)


def _digest(rows: Sequence[Arm]) -> str:
    """12 hex digits over the runs that a page shows, their labels and the times of their results."""
    shown = [
        (row.label, seed, run.folder.as_posix(), (run.folder / "results.json").stat().st_mtime_ns)
        for row in rows
        for seed, run in row.runs.items()
    ]
    return hashlib.sha256(repr(shown).encode()).hexdigest()[:12]
