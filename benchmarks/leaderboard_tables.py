"""The tables that the docs have of the recorded runs of `benchmarks.leaderboard`, as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from utils.compare.table import interval, signed
from utils.evaluation.metrics import paired_difference, summarise
from utils.text import number

Run = Mapping[str, Any]

RANKED = ("icons", "fashion")  # a nearest mean leaves room on them, and the methods differ
SMOKE = ("digits", "glyphs", "fractals")  # small and easy: they tell heads apart, and that a method works at all
SHORT = ("joint", "ranpac", "nested_lora", "simplecil", "sema", "finetune")  # the README's rows, beside the best
REFERENCE = "ranpac"  # the method with which the others are compared, seed by seed
# keys that bring back what the originals' code does and our defaults do not; exps/<method>_original_<set>.json sets them
ORIGINALS: dict[str, dict[str, Any]] = {
    "l2p": {"batchwise_prompt": True, "decay_other_rows": True},
    "dualprompt": {"batchwise_prompt": True, "scrambled_e_prompt": True, "decay_other_rows": True},
    "coda_prompt": {"cosine_off_by_one": True, "drop_last": True, "decay_other_rows": True},
    "ranpac": {"ranpac_scores": "cosine", "ranpac_ridge": "task"},
    "inflora": {"late_schedule": True, "short_first_basis": True},
    "sd_lora": {"restart_magnitudes": True},
}


def table(runs: Iterable[Run], sets: Sequence[str]) -> str:
    """A Markdown row a method: its head; last and average accuracy on each of `sets`, mean ± std over the seeds; then, set by
    set, the last accuracy with the task known, the number of seeds and the seconds of the fastest run."""
    by = by_method(runs, sets)
    columns = [f"{name} {what}" for name in sets for what in ("last", "average")]
    lines = [
        f"| method | head | {' | '.join(columns)} | task known | n | seconds |",
        "|---|---|" + "---:|" * (len(columns) + 3),
    ]
    for method, of_set in by.items():
        groups = [of_set.get(name, []) for name in sets]
        cells = [mean(group, key) for group in groups for key in ("last_accuracy", "average_accuracy")]
        counts = ", ".join(str(len(group)) for group in groups)
        known = ", ".join(number(summarise(r["task_oracle_accuracy"] for r in group).mean, 1) for group in groups)
        times = ", ".join(number(seconds(group), 0) for group in groups)
        lines.append(f"| {method} | {heads(of_set, sets)} | {' | '.join(cells)} | {known} | {counts} | {times} |")
    return "\n".join(lines)


def ranked_table(runs: Iterable[Run]) -> str:
    return table(runs, RANKED)


def smoke_table(runs: Iterable[Run]) -> str:
    return table(runs, SMOKE)


def against_reference(runs: Iterable[Run]) -> str:
    """A Markdown row a method: the difference of its last accuracy from REFERENCE's on each set of RANKED, paired by seed, with
    its 95 % interval."""
    by = by_method(runs, RANKED)
    lines = [f"| method | {' | '.join(RANKED)} |", "|---|" + "---|" * len(RANKED)]
    for method, of_set in by.items():
        if method == REFERENCE:
            continue
        cells = []
        for name in RANKED:
            theirs, ours = (
                {r["seed"]: r["last_accuracy"] for r in group.get(name, ())}
                for group in (by.get(REFERENCE, {}), of_set)
            )
            gap = paired_difference(ours, theirs)
            # two differences can be equal by chance; their interval is empty then
            limits = f" {interval(gap)}" if gap.n > 2 else f" (n {gap.n})"
            cells.append(f"{signed(gap.mean)}{limits}" if gap.n else "-")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def short_table(runs: Iterable[Run]) -> str:
    """A Markdown row for the best method and each of SHORT: its head, its last accuracy on each set of RANKED, and the number
    of seeds there. The best one is named where all methods have the same seeds."""
    by = by_method(runs, RANKED)
    lines = [f"| method | head | {' | '.join(RANKED)} | n |", "|---|---|" + "---:|" * (len(RANKED) + 1)]
    seeds = {tuple(sorted((r["set"], r["seed"]) for group in of_set.values() for r in group)) for of_set in by.values()}
    for place, (method, of_set) in enumerate(by.items()):
        if place == 0 or method in SHORT:
            cells = " | ".join(mean(of_set.get(name, []), "last_accuracy") for name in RANKED)
            best = " (highest mean)" if place == 0 and len(seeds) == 1 else ""
            counts = ", ".join(str(len(of_set.get(name, []))) for name in RANKED)
            lines.append(f"| `{method}`{best} | {heads(of_set, RANKED)} | {cells} | {counts} |")
    return "\n".join(lines)


def departures(runs: Iterable[Run]) -> str:
    """A Markdown row for each method whose default departs from its original's code: last accuracy on each set of SMOKE with
    the default and with the original's form, the paired difference and its interval."""
    last: dict[tuple[str, str], dict[int, float]] = {}
    for run in runs:
        last.setdefault((run["set"], run["method"]), {})[run["seed"]] = run["last_accuracy"]
    lines = [f"| method | keys of the original's form | {' | '.join(SMOKE)} |", "|---|---|" + "---|" * len(SMOKE)]
    for method, keys in ORIGINALS.items():
        cells = []
        for name in SMOKE:
            ours, theirs = last.get((name, method), {}), last.get((name, f"{method}_original"), {})
            gap = paired_difference(theirs, ours)
            if not gap.n:
                cells.append("-")
                continue
            means = (number(summarise(values[s] for s in ours.keys() & theirs).mean, 1) for values in (ours, theirs))
            # two differences can be equal by chance; their interval is empty then
            limits = "" if gap.low is None or gap.n < 3 else f" [{signed(gap.low)}, {signed(gap.high)}]"
            cells.append(f"{' to '.join(means)}: {signed(gap.mean)}{limits}" + f" (n {gap.n})" * (gap.n < 5))
        shown = ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in keys.items())
        lines.append(f"| {method} | {shown} | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_method(runs: Iterable[Run], sets: Sequence[str]) -> dict[str, dict[str, list[Run]]]:
    """Runs on `sets` by method and set, without the originals' forms: first the methods that have runs on all of the sets, and
    among them the highest mean last accuracy."""
    by: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        if run["set"] in sets and not run["method"].endswith("_original"):
            by.setdefault(run["method"], {}).setdefault(run["set"], []).append(run)

    def place(method: str) -> tuple[int, float]:
        means = [summarise(r["last_accuracy"] for r in group).mean or 0.0 for group in by[method].values()]
        return len(means), sum(means) / len(means)

    return {method: by[method] for method in sorted(by, key=place, reverse=True)}


def mean(runs: Iterable[Run], key: str) -> str:
    """Mean ± standard deviation, in percent."""
    summary = summarise(r[key] for r in runs)
    return number(summary.mean, 1) + (f" ± {number(summary.std, 1)}" if summary.std is not None else "")


def seconds(runs: Iterable[Run]) -> float | None:
    """Of the fastest of some runs of one experiment: the others waited longer for other programs on the machine."""
    return min((r["seconds"] for r in runs), default=None)


def heads(of_set: Mapping[str, Sequence[Run]], sets: Sequence[str]) -> str:
    """The heads that a method's runs have, in the order of `sets`."""
    return ", ".join(dict.fromkeys(r["head"] for name in sets for r in of_set.get(name, ())))
