"""`--compare RUN ...`: finished runs side by side, as a table on the console and one HTML page."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from utils.compare import columns, page, plots, runs
from utils.compare import rows as compare_rows
from utils.compare import table as comparison
from utils.files import storage
from utils.report import figures
from utils.text import counted, nearest, printable

MOST_PRINTED = 40  # rows of the console's table; the page has all
FILES = (".html", ".htm", ".txt", ".csv", ".md", ".tex")  # a page, or the table alone


def place_of(out: Path) -> Path:
    """The file to write: `out` itself if it is named as one, else compare.html in that folder. ValueError for the endings
    of other files."""
    ending = out.suffix.lower()
    if out.is_dir() or not re.fullmatch(r"\.[a-z]{1,8}", ending):  # a folder may be called v1.2 or run.2026
        return out / "compare.html"
    if ending not in FILES:
        raise ValueError(
            f"--out {out}: no table is written as {ending}; --compare writes {', '.join(FILES)}, or compare.html into a "
            f"folder that exists{nearest(ending, FILES)}"
        )
    return out


def run(args: argparse.Namespace) -> int:
    """Prints the table and writes the page, or the table alone. Raises ValueError where a folder is no finished run and has
    none below it, for a column that does not exist and for an ending that is no table's."""
    path = place_of(args.out)
    wanted = None if args.columns is None else columns.chosen(args.columns.split(","))
    selection = runs.find(args.compare)
    rows = compare_rows.rows_of(selection.runs)
    notes = selection.notes() + compare_rows.remarks(rows)
    labelled = [
        (f"{number}: {row.label}", row.name, {seed: run.results for seed, run in row.runs.items()})
        for number, row in enumerate(rows, start=1)
    ]
    plain = [row.label for row in rows]
    table = comparison.compare(labelled, wanted or comparison.STANDARD, plain)
    for note in notes:
        print(printable(f"note: {note}"), file=sys.stderr)
    print(printable(comparison.as_text(table[:MOST_PRINTED])))
    if len(table) > MOST_PRINTED:
        print(f"the first {MOST_PRINTED} of {len(table)} rows; the page has all")
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.suffix.lower().removeprefix(".")
    if kind in ("html", "htm"):
        text = page.page(rows, comparison.compare(labelled, wanted or columns.chosen(columns.OF_PAGE), plain), notes)
    else:
        text = comparison.tables(table)[kind]
    storage.write_bytes(path, text.encode(errors="backslashreplace"))
    if args.figures:
        folder = path.parent / f"{path.stem}_figures"
        figures.write(folder, plots.draw(page.chosen(rows, page.MOST_DRAWN)))
        print(printable(f"figures (svg, pdf): {folder}"))
    count = sum(len(row.runs) for row in rows)
    print(printable(f"\n{counted(count, 'run')} in {counted(len(rows), 'row')}: {path}"))
    return 0
