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

from utils.compare import columns as known
from utils.compare.columns import BY_KEY, Column
from utils.evaluation.metrics import PairedDifference, Summary, paired_difference, summarise
from utils.text import csv_cell, latex, markdown, one_line

STANDARD = tuple(known.COLUMNS[name] for name in known.DEFAULT)
COLUMNS = {column.key: column.title for column in STANDARD}
LEGEND = (
    "percent; std with divisor n-1 over n seeds; difference to the first row over the pairs of equal seeds, "
    "with its 95 % confidence interval (Student's t)"
)
IN_BOLD = "the best mean of a column in bold"


@dataclass(frozen=True)
class TableRow:
    """One experiment: for each column's key its summary and, but for the first row, the difference to the first (None for
    costs). `peeked`: its runs selected something on test data, which `shown` says. `plain` is the label without its number."""

    label: str
    run: str
    summaries: Mapping[str, Summary]
    differences: Mapping[str, PairedDifference | None]
    peeked: bool = False
    plain: str = ""

    @property
    def shown(self) -> str:
        return one_line(self.label) + " (selected on TEST data)" * self.peeked

    @property
    def for_papers(self) -> str:
        return one_line(self.plain or self.label) + " (selected on TEST data)" * self.peeked


def compare(
    experiments: Sequence[tuple[str, str, Mapping[int, Mapping[str, Any]]]],
    columns: Sequence[Column] = STANDARD,
    plain: Sequence[str] = (),
) -> list[TableRow]:
    """Rows from (label, settings hash, numbers by seed); the first is what the others are compared with. The numbers are a
    results.json or, for every column, a run of utils/compare/runs.py; `plain` are the labels for papers, if others."""
    first = experiments[0][2] if experiments else {}
    rows = []
    for index, (label, run, results) in enumerate(experiments):
        summaries = {c.key: summarise(r[c.key] for r in results.values()) for c in columns}
        differences = {
            c.key: paired_difference({s: r[c.key] for s, r in results.items()}, {s: r[c.key] for s, r in first.items()})
            if index and c.better
            else None
            for c in columns
        }
        selections = [entry for r in results.values() for entry in r.get("selection_history", ())]
        peeked = any(entry.get("split") == "test" for entry in selections)
        rows.append(TableRow(label, run, summaries, differences, peeked, plain[index] if plain else ""))
    return rows


def columns_of(rows: Sequence[TableRow]) -> list[Column]:
    return [BY_KEY[key] for key in rows[0].summaries] if rows else list(STANDARD)


def best(rows: Sequence[TableRow], column: Column) -> set[int]:
    """The indices of the rows with the best mean as it is printed; empty for costs and where all are equal. A row that
    selected on test data is never the best."""
    means = {n: row.summaries[column.key].mean for n, row in enumerate(rows) if not row.peeked}
    texts = {n: column.text(mean) for n, mean in means.items() if mean is not None}
    if not column.better or len(set(texts.values())) < 2:
        return set()
    top = max(texts.values(), key=lambda text: column.better * float(text))
    return {n for n, text in texts.items() if text == top}


def counts(row: TableRow) -> tuple[int, int | None]:
    """n and pairs of a row: the largest of its columns, since forgetting may lack (one task)."""
    pairs = [gap.n for gap in row.differences.values() if gap is not None]
    return max((s.n for s in row.summaries.values()), default=0), max(pairs, default=None)


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
    for column in columns_of(rows):
        wide = max([7, *(len(column.text(row.summaries[column.key].mean)) for row in rows)])
        title = column.key if column.better else column.title
        lines.append(f"{title:<{width}}  {'mean':>{wide}} {'std':>6} {'n':>3}")
        if column.better:
            lines[-1] += f" {'difference':>11} {'95 % interval':>18} {'pairs':>6}"
        for row in rows:
            summary, gap = row.summaries[column.key], row.differences[column.key]
            mean, std = column.text(summary.mean), column.text(summary.std)
            lines.append(f"{row.shown:<{width}}  {mean:>{wide}} {std:>6} {summary.n:>3}")
            if column.better:
                lines[-1] += f" {signed(gap.mean if gap else None):>11} {interval(gap):>18} {gap.n if gap else '-':>6}"
        lines.append("")
    return "\n".join([*lines, LEGEND])


def as_csv(rows: Sequence[TableRow]) -> str:
    """A line for each row, every number in full precision."""
    parts, columns = ("mean", "std", "n", "difference", "low", "high", "pairs"), columns_of(rows)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    titles = [f"{c.key}_{part}" for c in columns for part in (parts if c.better else parts[:3])]
    writer.writerow(["cell", "settings", *titles, "selected_on_test"])
    for row in rows:
        fields: list[Any] = [csv_cell(one_line(row.label)), csv_cell(one_line(row.run))]
        for c in columns:
            gap = (row.differences[c.key] or (None, None, None, None)) if c.better else ()
            fields += [*row.summaries[c.key], *gap]
        writer.writerow([*fields, "yes" if row.peeked else "no"])
    return out.getvalue()


def tables(rows: Sequence[TableRow]) -> dict[str, str]:
    """The content of table.txt, .csv, .md and .tex, by ending."""
    return {"txt": as_text(rows) + "\n", "csv": as_csv(rows), "md": as_markdown(rows), "tex": as_latex(rows)}


def _titles(rows: Sequence[TableRow]) -> list[str]:
    return [
        "row",
        "n",
        "pairs",
        *(t for c in columns_of(rows) for t in (c.title, "difference")[: 2 if c.better else 1]),
    ]


def as_markdown(rows: Sequence[TableRow]) -> str:
    titles = _titles(rows)
    lines = [f"| {' | '.join(titles)} |", "|---|" + "---:|" * (len(titles) - 1)]
    winners = {c.key: best(rows, c) for c in columns_of(rows)}
    for index, row in enumerate(rows):
        n, pairs = counts(row)
        cells = [markdown(row.for_papers), str(n), "-" if pairs is None else str(pairs)]
        for c in columns_of(rows):
            mean, *deviation = c.spread(row.summaries[c.key]).split(" ", 1)
            cells.append(" ".join([f"**{mean}**" if index in winners[c.key] else mean, *deviation]))
            if c.better:
                gap = row.differences[c.key]
                ends = f" {interval(gap)}" if gap and gap.low is not None else ""
                cells.append(signed(gap.mean if gap else None) + ends)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{LEGEND}; {IN_BOLD}", ""])


def as_latex(rows: Sequence[TableRow]) -> str:
    """A tabular of the package booktabs; labels are escaped, numbers stand in math mode, the best means in bold."""

    def math(text: str) -> str:
        return text if text == "-" else f"${text.replace(',', '{,}')}$"

    titles, winners = _titles(rows), {c.key: best(rows, c) for c in columns_of(rows)}
    lines = [f"% {LEGEND}; {IN_BOLD}", r"% needs \usepackage{booktabs}"]
    if not all(row.for_papers.isascii() for row in rows):
        lines[-1] += " and, for the letters of some labels, XeLaTeX or LuaLaTeX"
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(titles) - 1)}}}", r"\toprule"]
    lines += [" & ".join(map(latex, titles)) + r" \\", r"\midrule"]
    for index, row in enumerate(rows):
        n, pairs = counts(row)
        cells = [latex(row.for_papers), math(str(n)), "-" if pairs is None else math(str(pairs))]
        for c in columns_of(rows):
            mean, *deviation = c.spread(row.summaries[c.key], r"\pm").split(" ", 1)
            bold = rf"\mathbf{{{mean}}}" if index in winners[c.key] else mean
            cells.append(math(" ".join([bold, *deviation])))
            if c.better:
                gap = row.differences[c.key]
                ends = f" ${interval(gap)}$" if gap and gap.low is not None else ""
                cells.append(math(signed(gap.mean if gap else None)) + ends)
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])
