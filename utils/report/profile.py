"""Tables of where the time of a run goes, from the rows that the stopwatch leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from utils.process import stopwatch
from utils.process.stopwatch import SECTIONS
from utils.run.log import RunLog
from utils.text import number

Row = Mapping[str, Any]


def tell(log: RunLog, task: int, tasks: int, whole: bool) -> None:
    """The time since the task before as a row and a table; `whole` false if an earlier process had begun the task."""
    if stopwatch.current is not None:
        row = log.row("profile", task=task, whole=whole, **stopwatch.current.lap())
        log.info(table([row], f"time of task {task + 1}/{tasks}"))


# The tables --------------------------------------------------------------------------------------------------------------


def shares(rows: Sequence[Row]) -> list[tuple[str, float, float | None, float | None]]:
    """Of profile rows together: part, seconds, percent of all, images a second where images are counted; last the sum,
    with the training images shown. Parts without time are left out."""
    total = sum(row["total"] for row in rows)
    measured = [(name, *(sum(row[key][name] for row in rows) for key in ("seconds", "images"))) for name in SECTIONS]
    shown = [entry for entry in measured if entry[1] > 0]
    shown.append(("all", total, sum(row["images"]["adapters"] for row in rows)))
    return [(n, s, 100 * s / total if total else None, images / s if images and s else None) for n, s, images in shown]


def table(rows: Sequence[Row], title: str) -> str:
    """Seconds, share and images a second of each part."""
    lines = [f"{title:<32}{'seconds':>10}{'percent':>10}{'images/s':>10}"]
    for name, seconds, share, speed in shares(rows):
        lines.append(f"  {name:<30}{number(seconds):>10}{number(share, 1):>10}{number(speed, 0):>10}")
    return "\n".join(lines + [partly(rows)] * any(not row["whole"] for row in rows))


def of_run(rows: Sequence[Row], tasks: int) -> str | None:
    """The table of all tasks that have a profile among the rows of metrics.jsonl; None if none has."""
    profiles = [row for row in rows if row["kind"] == "profile"]
    return table(profiles, f"time of {len(profiles)} of {tasks} tasks") if profiles else None


def partly(rows: Sequence[Row]) -> str:
    """A sentence on the tasks that were begun by an earlier process, empty if there are none."""
    some = ", ".join(str(row["task"] + 1) for row in rows if not row["whole"])
    return f"  of task {some} only what was spent after the run was resumed" if some else ""
