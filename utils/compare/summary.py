"""What several runs show together: a table with a row each for the console, and one sentence computed from its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from utils.compare import columns
from utils.compare import table as comparison
from utils.compare.rows import Arm
from utils.evaluation.metrics import PairedDifference, mean, paired_difference
from utils.text import WIDTH, clock, counted, number, one_line, shortened

COLUMNS = columns.chosen(("last", "average", "forgetting", "trained", "adapters", "time"))
LABEL = 40  # characters of a row's name on the console
TWO_SIDED = 1.96  # standard errors of a 95 % interval


def compared(rows: Sequence[Arm], numbered: bool = False) -> list[comparison.TableRow]:
    """A row of the table for each of `rows`, over its seeds; `numbered` from 1, as in the pictures of a page."""
    names = [f"{n}: {row.label}" if numbered else row.label for n, row in enumerate(rows, start=1)]
    numbers = [{seed: run.results for seed, run in row.runs.items()} for row in rows]
    return comparison.compare(
        [(name, row.name, of_row) for name, row, of_row in zip(names, rows, numbers, strict=True)], COLUMNS
    )


def table(rows: Sequence[Arm]) -> str:
    """A line a row: mean ± std over its seeds, `*` behind the best of a column; accuracies in percent, time of all seeds."""
    lines = [["", *(column.title.removesuffix(" (s)") for column in COLUMNS)]]
    built = compared(rows)
    winners = {column.key: comparison.best(built, column) for column in COLUMNS}
    for index, row in enumerate(built):
        cells = [shortened(row.shown, LABEL)]
        for column in COLUMNS:
            summary = row.summaries[column.key]
            text = column.spread(summary) if column.key != "seconds_in_all" else "-"
            if column.key == "seconds_in_all" and summary.mean is not None:
                text = clock(summary.mean * summary.n)
            cells.append(text + ("*" if index in winners[column.key] else " "))
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    head = shortened(_head(rows), WIDTH * 2)
    return "\n".join(
        [head, *("  ".join([f"{n:<{widths[0]}}", *map(str.rjust, c, widths[1:])]).rstrip() for n, *c in lines)]
    )


def _head(rows: Sequence[Arm]) -> str:
    runs = [run for row in rows for run in row.runs.values()]
    sets, cuts = ({run.results[key] for run in runs} for key in ("dataset", "sizes"))
    tasks = f", {counted(len(next(iter(cuts))), 'task')} of {'+'.join(map(str, next(iter(cuts))))} classes"
    seeds = sorted({run.seed for run in runs})
    shown = f"seed {seeds[0]}" if len(seeds) == 1 else counted(len(seeds), "seed")
    return f"{', '.join(sorted(sets))}{tasks * (len(cuts) == 1)}, {shown} (percent, * the best)"


# ------------------------------------------------------------------------------------------------ the sentence


def sentence(rows: Sequence[Arm]) -> str:
    """One sentence on the last accuracies: the highest row, how far it is from the nearest mean and from joint training,
    whether adapters add anything to their head, and how sure that is. Empty without a finished run."""
    known = [row for row in rows if _last(row) is not None]
    if not known:
        return ""
    if len({run.results["dataset"] for row in known for run in row.runs.values()}) > 1:
        return "The rows are of different data sets, so their accuracies cannot be set against each other."
    parts = [_of_seeds(known[0])] if len(known) == 1 else [*_of_rows(known), *_of_adapters(known)]
    return one_line("; ".join([*parts, *_caution(known)])) + "."


def _of_seeds(row: Arm) -> str:
    last = {seed: run.results["last_accuracy"] for seed, run in row.runs.items()}
    low, high, spread = min(last.values()), max(last.values()), paired_difference(last, dict.fromkeys(last, 0.0))
    text = f"{row.label} ends at {number(spread.mean)} on average over {counted(len(last), 'seed')}"
    if len(last) > 1:
        text += f", between {number(low)} and {number(high)}"
    if len(last) > 2:
        text += f" (95 % interval of the mean {number(spread.low)} to {number(spread.high)})"
    return text


def _of_rows(rows: Sequence[Arm]) -> list[str]:
    best = max((row for row in rows if not _peeked(row)), key=lambda row: _last(row) or 0.0, default=rows[0])
    parts = [f"The highest last accuracy is {number(_last(best))} ({best.label})"]
    alike = len({_model(row) for row in rows}) == 1  # a sweep of one method's keys: no row is a bound of the others
    nearest = next((row for row in rows if _is_nearest_mean(row) and not alike), None)
    joint = next((row for row in rows if _model(row) == "joint" and not alike), None)
    bounds = [("the nearest mean", nearest), ("joint training", joint)]
    others = [(name, row) for name, row in bounds if row is not None and row is not best]
    if not others:
        after = sorted((row for row in rows if row is not best), key=lambda row: _last(row) or 0.0)[-1]
        others = [(f"the next ({after.label})", after)]
    gaps = " and ".join(f"{_gap(best, row)} {name}" for name, row in others)
    return [", ".join([*parts, gaps] if gaps else parts)]


def _gap(one: Arm, other: Arm) -> str:
    gap = _difference(one, other)
    if gap.mean is None:  # no seed in common
        gap = PairedDifference((_last(one) or 0.0) - (_last(other) or 0.0), None, None, 0)
    value = gap.mean or 0.0
    ends = f" {comparison.interval(gap)}" if gap.low is not None and gap.n > 1 else ""
    return f"{number(abs(value))}{ends} {'above' if value >= 0 else 'below'}"


def _of_adapters(rows: Sequence[Arm]) -> list[str]:
    """Whether what is trained adds to the head: the best row that trains against the best that trains nothing, of one head."""
    frozen = [row for row in rows if _trains_nothing(row)]
    pairs = []
    for still in frozen:
        alike = [row for row in rows if _head_of(row) == _head_of(still) and not _trains_nothing(row)]
        alike = [row for row in alike if _model(row) != "joint" and not _peeked(row)]
        if alike:
            pairs.append((max(alike, key=lambda row: _last(row) or 0.0), still))
    if not pairs:
        return []
    trained, still = max(pairs, key=lambda pair: (_last(pair[1]) or 0.0, _last(pair[0]) or 0.0))
    gap = _difference(trained, still)
    value = (_last(trained) or 0.0) - (_last(still) or 0.0) if gap.mean is None else gap.mean
    least = (_margin([still]) or 0.0) if gap.low is None or gap.n < 2 else value - gap.low
    if value > least:
        verb = f"adapters add {number(value)} to"
    elif value < -least:
        verb = f"adapters take {number(-value)} from"
    else:
        verb = "adapters add nothing measurable to"
    return [
        f"{verb} the {_head_of(still)} head ({trained.label} {number(_last(trained))}, {still.label} without training "
        f"{number(_last(still))})"
    ]


def _caution(rows: Sequence[Arm]) -> list[str]:
    most = max(len(row.runs) for row in rows)
    margin = _margin(rows)
    images = max((run.results["tested"] or 0 for row in rows for run in row.runs.values()), default=0)
    if most == 1:
        open_to = f", and {images:,} test images alone leave ±{number(margin, 1)} points open" if margin else ""
        return [f"one seed has no interval{open_to}"]
    return ["two seeds say little about others"] if most == 2 else []


def _margin(rows: Sequence[Arm]) -> float | None:
    """Half the 95 % interval of the best row's last accuracy from its number of test images, in points; None if unknown."""
    best = max(rows, key=lambda row: _last(row) or 0.0)
    share, images = (_last(best) or 0.0) / 100, mean(run.results["tested"] for run in best.runs.values())
    return None if not images else 100 * TWO_SIDED * math.sqrt(share * (1 - share) / images)


def _last(row: Arm) -> float | None:
    return mean(run.results["last_accuracy"] for run in row.runs.values())


def _difference(one: Arm, other: Arm) -> PairedDifference:
    of_one, of_other = ({s: run.results["last_accuracy"] for s, run in row.runs.items()} for row in (one, other))
    return paired_difference(of_one, of_other)


def _peeked(row: Arm) -> bool:
    return any(run.results["selection_history"] for run in row.runs.values())


def _model(row: Arm) -> str:
    return str(row.settings.get("model_name"))


def _head_of(row: Arm) -> str:
    return str(row.settings.get("head"))


def _trains_nothing(row: Arm) -> bool:
    return not any(any(run.results["trainable_parameters"]) for run in row.runs.values())


def _is_nearest_mean(row: Arm) -> bool:
    return _head_of(row) == "ncm" and _trains_nothing(row)
