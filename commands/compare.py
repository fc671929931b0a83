"""`--compare RUN ...`: finished runs side by side, as a table on the console and one HTML page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from utils.compare import page, runs
from utils.compare import rows as compare_rows
from utils.compare import table as comparison
from utils.files import storage
from utils.text import counted, printable

MOST_PRINTED = 40  # rows of the console's table; the page has all


FILES = (".html", ".htm", ".txt", ".csv", ".md", ".tex")  # a page, or the table alone
OTHER_FILES = (".pdf", ".png", ".svg", ".json", ".xlsx", ".xls", ".docx", ".doc", ".rst", ".tsv", ".xml", ".jpg")


def place_of(out: Path) -> Path:
    """The file to write: `out` itself if it is named as one, else compare.html in that folder. ValueError for other endings."""
    ending = out.suffix.lower()
    if out.is_dir() or ending not in (*FILES, *OTHER_FILES):
        return out / "compare.html"
    if ending in OTHER_FILES:
        raise ValueError(f"--out {out}: --compare writes {', '.join(FILES)}, or compare.html into a folder")
    return out


def run(args: argparse.Namespace) -> int:
    """Prints the table and writes the page. Raises ValueError where a folder is no finished run and has none below it."""
    path = place_of(args.out)
    selection = runs.find(args.compare)
    rows = compare_rows.rows_of(selection.runs)
    notes = selection.notes() + compare_rows.remarks(rows)
    labelled = [
        (f"{number}: {row.label}", row.name, {seed: run.results for seed, run in row.runs.items()})
        for number, row in enumerate(rows, start=1)
    ]
    table = comparison.compare(labelled)
    for note in notes:
        print(printable(f"note: {note}"), file=sys.stderr)
    print(printable(comparison.as_text(table[:MOST_PRINTED])))
    if len(table) > MOST_PRINTED:
        print(f"the first {MOST_PRINTED} of {len(table)} rows; the page has all")
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.suffix.lower().removeprefix(".")
    text = page.page(rows, table, notes) if kind in ("html", "htm") else comparison.tables(table)[kind]
    storage.write_bytes(path, text.encode(errors="backslashreplace"))
    count = sum(len(row.runs) for row in rows)
    print(printable(f"\n{counted(count, 'run')} in {counted(len(rows), 'row')}: {path}"))
    return 0
