"""Links from the page of several runs to the report of each."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.compare.rows import Arm
from utils.report.html import Block, Link, Table, folded


def reports_of(rows: Sequence[Arm], place: Path | None) -> list[dict[int, str]]:
    """For each row the path, from a page in the folder `place`, of the report of each seed that has one."""
    if place is None:
        return [{} for _ in rows]
    return [
        {
            seed: os.path.relpath(run.folder / "report.html", place)
            for seed, run in row.runs.items()
            if (run.folder / "report.html").is_file()
        }
        for row in rows
    ]


def report_table(rows: Sequence[Arm], reports: Sequence[Mapping[int, str]]) -> list[Block]:
    """A link to the report of each seed, of rows that have several."""
    body = [
        [f"{n}: {row.label}", Link(f"seed {seed}", path)]
        for n, (row, paths) in enumerate(zip(rows, reports, strict=True), start=1)
        for seed, path in paths.items()
        if len(row.runs) > 1
    ]
    return folded(f"{len(body)} reports", Table(["row", "report"], body, "rows")) if body else []
