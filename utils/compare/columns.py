"""The columns of a comparison's tables: what one can choose with --columns, and how each number is written.

A column has a number a run, read by `key`: those of results.json, and those that `figures` adds to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.evaluation.metrics import Summary
from utils.text import nearest, number


@dataclass(frozen=True)
class Column:
    """`name` on the command line, `title` in tables. `better`: 1 if higher is better, -1 if lower is, 0 if it is a matter
    of cost; only the first two have a best value and paired differences."""

    name: str
    key: str
    title: str
    better: int
    digits: int = 2

    def text(self, value: float | None) -> str:
        """The number with its digits, thousands apart; `-` for None."""
        if value is None:
            return "-"
        return number(value, self.digits) if self.better else f"{value:,.{self.digits}f}"

    def spread(self, summary: Summary, plus_minus: str = "±") -> str:
        """Mean ± std; without the latter for one seed, and for a cost that is the same in all seeds."""
        alike = summary.std is None or (not self.better and summary.std == 0)
        return self.text(summary.mean) + ("" if alike else f" {plus_minus} {self.text(summary.std)}")


COLUMNS = {
    column.name: column
    for column in (
        Column("last", "last_accuracy", "last", 1),
        Column("average", "average_accuracy", "average", 1),
        Column("task_mean", "final_task_mean", "task mean", 1),
        Column("task_known", "task_oracle_accuracy", "task known", 1),
        Column("forgetting", "forgetting", "forgetting", -1),
        Column("transfer", "backward_transfer", "transfer", 1),
        Column("parameters", "parameters", "parameters", 0, 0),
        Column("trained", "trained_in_last_task", "trained", 0, 0),
        Column("adapters", "adapters_at_end", "adapters", 0, 1),
        Column("time", "seconds_in_all", "time (s)", 0, 1),
        Column("memory", "peak_mib", "memory (MiB)", 0, 0),
        Column("learning", "learning_accuracy", "learning", 1),
        Column("ece", "ece", "ECE", -1),
        Column("operations", "gigaflop", "GFLOP an image", 0, 3),
        Column("cpu_hours", "cpu_hours", "CPU hours", 0, 3),
        Column("gpu_hours", "gpu_hours", "GPU hours", 0, 3),
    )
}
BY_KEY = {column.key: column for column in COLUMNS.values()}
DEFAULT = ("last", "average", "forgetting")
OF_PAGE = (*DEFAULT, "parameters", "adapters", "time")


def chosen(names: Sequence[str]) -> tuple[Column, ...]:
    """The columns of these names. ValueError, in one line, for an unknown or repeated name, and for none."""
    if not any(names):
        raise ValueError(f"--columns: names separated by commas are expected, of {', '.join(COLUMNS)}")
    for index, name in enumerate(names):
        if name not in COLUMNS:
            raise ValueError(
                f"--columns: there is no column {name!r}; there are {', '.join(COLUMNS)}{nearest(name, COLUMNS)}"
            )
        if name in names[:index]:
            raise ValueError(f"--columns: {name!r} is named twice; leave one out")
    return tuple(COLUMNS[name] for name in names)


def figures(results: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers of columns that results.json does not have as such, by key; an exception where it is none."""
    trained, total = results["trainable_parameters"], results["total_parameters"]
    layers, peak = results["adapters_per_layer"], results["peak_memory_bytes"]
    operations = (results.get("operations") or [None])[-1]  # this and what follows: None in runs of older versions
    return {
        "parameters": total[-1] if total else None,
        "trained_in_last_task": trained[-1] if trained else None,
        "adapters_at_end": sum(layers[-1].values()) if layers else None,
        "seconds_in_all": sum(seconds or 0.0 for entry in results["seconds"] for seconds in entry.values()),
        "peak_mib": peak / 2**20 if peak else None,
        "learning_accuracy": results.get("learning_accuracy"),
        "ece": (results.get("calibration") or {}).get("ece"),
        "gigaflop": operations / 1e9 if operations else None,
        "cpu_hours": results.get("cpu_hours"),
        "gpu_hours": results.get("gpu_hours"),
    }
