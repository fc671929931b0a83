"""Experiments side by side over the same seeds: mean, deviation and paired difference, as text, CSV, Markdown and LaTeX.

Accuracies are in percent, as in results.json. The difference is to the first row, pair by pair of equal seeds, with
Student's 95 % confidence interval. '-' stands where nothing is defined, an empty field in the CSV.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.evaluation.metrics import PairedDifference, Summary, paired_difference, summarise
from utils.text import csv_cell, latex, markdown, number, one_line

COLUMNS = {"last_accuracy": "last", "average_accuracy": "average", "forgetting": "forgetting"}
LEGEND = (
    "percent; std with divisor n-1 over n seeds; difference to the first row over the pairs of equal seeds, "
    "with its 95 % confidence interval (Student's t)"
)


@dataclass(frozen=True)
class TableRow:
    """One experiment: for each of COLUMNS its summary and, but for the first row, the difference to the first. `peeked`: its
    runs selected something on test data, which `shown` says."""

    label: str
    run: str
    summaries: Mapping[str, Summary]
    differences: Mapping[str, PairedDifference | None]
    peeked: bool = False

    @property
    def shown(self) -> str:
        return one_line(self.label) + " (selected on TEST data)" * self.peeked


def compare(experiments: Sequence[tuple[str, str, Mapping[int, Mapping[str, Any]]]]) -> list[TableRow]:
    """Rows from (label, settings hash, results.json by seed); the first is what the others are compared with."""
    first = experiments[0][2] if experiments else {}
    rows = []
    for index, (label, run, results) in enumerate(experiments):
        summaries = {c: summarise(r[c] for r in results.values()) for c in COLUMNS}
        differences = {
            c: paired_difference({s: r[c] for s, r in results.items()}, {s: r[c] for s, r in first.items()})
            if index
            else None
            for c in COLUMNS
        }
        selections = [entry for r in results.values() for entry in r.get("selection_history", ())]
        peeked = any(entry.get("split") == "test" for entry in selections)
        rows.append(TableRow(label, run, summaries, differences, peeked))
    return rows


def signed(value: float | None) -> str:
    """Two decimals with sign, `-` where undefined."""
    return "-" if value is None else f"{round(value, 2) + 0.0:+.2f}"


def interval(difference: PairedDifference | None) -> str:
    if difference is None or difference.low is None:
        return "-"
    return f"[{signed(difference.low)}, {signed(difference.high)}]"


def as_text(rows: Sequence[TableRow]) -> str:
    """A block for each column, narrow enough for a console."""
    width, lines = max([4, *(len(row.shown) for row in rows)]), []
    for column in COLUMNS:
        lines.append(
            f"{column:<{width}}  {'mean':>7} {'std':>6} {'n':>3} {'difference':>11} {'95 % interval':>18} {'pairs':>6}"
        )
        for row in rows:
            summary, gap = row.summaries[column], row.differences[column]
            lines.append(
                f"{row.shown:<{width}}  {number(summary.mean):>7} {number(summary.std):>6} {summary.n:>3} "
                f"{signed(gap.mean if gap else None):>11} {interval(gap):>18} {gap.n if gap else '-':>6}"
            )
        lines.append("")
    return "\n".join([*lines, LEGEND])


def as_csv(rows: Sequence[TableRow]) -> str:
    """A line for each row, every number in full precision."""
    parts = ("mean", "std", "n", "difference", "low", "high", "pairs")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["cell", "settings", *(f"{column}_{part}" for column in COLUMNS for part in parts), "selected_on_test"]
    )
    for row in rows:
        fields: list[Any] = [csv_cell(one_line(row.label)), csv_cell(one_line(row.run))]
        for column in COLUMNS:
            fields += [*row.summaries[column], *(row.differences[column] or (None, None, None, None))]
        writer.writerow([*fields, "yes" if row.peeked else "no"])
    return out.getvalue()


def tables(rows: Sequence[TableRow]) -> dict[str, str]:
    """The content of table.txt, .csv, .md and .tex, by ending."""
    return {"txt": as_text(rows) + "\n", "csv": as_csv(rows), "md": as_markdown(rows), "tex": as_latex(rows)}


def _cells(row: TableRow, plus_minus: str) -> list[str]:
    """n, pairs, then mean ± std and the difference of each column, for the tables that have a line for each row."""
    # every result has a last accuracy, so its counts are those of the row; forgetting may lack (one task)
    gap = row.differences["last_accuracy"]
    texts = [str(row.summaries["last_accuracy"].n), str(gap.n) if gap else "-"]
    for column in COLUMNS:
        summary, gap = row.summaries[column], row.differences[column]
        deviation = f" {plus_minus} {number(summary.std)}" if summary.std is not None else ""
        texts.append(number(summary.mean) + deviation)
        ends = f" {interval(gap)}" if gap and gap.low is not None else ""
        texts.append(signed(gap.mean if gap else None) + ends)
    return texts


def _titles() -> list[str]:
    return ["cell", "n", "pairs", *(title for name in COLUMNS.values() for title in (name, "difference"))]


def as_markdown(rows: Sequence[TableRow]) -> str:
    lines = [f"| {' | '.join(_titles())} |", "|---|" + "---:|" * (len(_titles()) - 1)]
    for row in rows:
        lines.append(f"| {markdown(row.shown)} | {' | '.join(_cells(row, '±'))} |")
    return "\n".join([*lines, "", LEGEND, ""])


def as_latex(rows: Sequence[TableRow]) -> str:
    """A tabular that needs no package; labels are escaped, numbers stand in math mode."""
    lines = [f"% {LEGEND}", rf"\begin{{tabular}}{{l{'r' * (len(_titles()) - 1)}}}", r"\hline"]
    lines += [" & ".join(_titles()) + r" \\", r"\hline"]
    for row in rows:
        texts = [cell if cell == "-" else f"${cell}$" for cell in _cells(row, r"\pm")]
        lines.append(" & ".join([latex(row.shown), *texts]) + r" \\")
    return "\n".join([*lines, r"\hline", r"\end{tabular}", ""])
