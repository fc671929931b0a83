"""Do the embedded sets rank methods as the published sets do? The table is in docs/results.md.

Spearman's rank correlation between the last accuracies of benchmarks/leaderboard.jsonl (means over seeds) and published
ones, over the methods that have both, for each pair of an embedded and a published set. The 95 % interval is a bootstrap's
over methods (10,000 draws with replacement, without those in which all values of a side are equal).

PUBLISHED is one protocol, so that its rows can be compared: ViT-B/16 pre-trained on ImageNet-21k, 10 tasks, no stored images,
last accuracy. The figures are second-hand, from tables of papers that ran the methods again: leads, not our results.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from benchmarks.leaderboard_tables import RANKED, SMOKE, Run, by_method
from utils.evaluation.metrics import summarise
from utils.text import number

# method: last accuracy in percent on CIFAR-100 and on ImageNet-R
PUBLISHED: Mapping[str, tuple[float, float]] = {
    "l2p": (82.76, 66.49),
    "coda_prompt": (87.00, 72.82),
    "inflora": (86.51, 75.65),
    "ease": (86.54, 77.75),
    "sema": (87.84, 74.82),
    "ranpac": (91.09, 75.28),
    "slca": (91.53, 77.00),
    "joint": (93.48, 87.11),
}
LEAST = 4  # methods from which on a correlation is shown
COLUMNS = ("CIFAR-100", "ImageNet-R")
DRAWS = 10_000


class Correlation(NamedTuple):
    """Spearman's coefficient of n pairs with the ends of its 95 % interval; None where it is not defined."""

    rho: float | None
    low: float | None
    high: float | None
    n: int


def spearman(a: Any, b: Any) -> float | None:
    """Pearson's correlation of the ranks of two sequences [n], equal values sharing their mean rank (Spearman 1904); None if a
    side is constant."""
    from scipy.stats import rankdata

    x, y = rankdata(a), rankdata(b)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def correlation(ours: Mapping[str, float], published: Mapping[str, float], draws: int = DRAWS) -> Correlation:
    """Spearman's coefficient over the methods that both have, with a percentile bootstrap over methods (seed 0)."""
    methods = sorted(ours.keys() & published.keys())
    a, b = np.array([ours[m] for m in methods]), np.array([published[m] for m in methods])
    rho = spearman(a, b) if len(methods) >= LEAST else None
    if rho is None:
        return Correlation(None, None, None, len(methods))
    from scipy.stats import rankdata

    rows = np.random.default_rng(0).integers(len(methods), size=(draws, len(methods)))
    x, y = (rankdata(values[rows], axis=1) for values in (a, b))  # [draws, n]
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    spread = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    coefficients = (x * y).sum(axis=1)[spread > 0] / spread[spread > 0]
    low, high = np.quantile(coefficients, [0.025, 0.975])
    return Correlation(rho, float(low), float(high), len(methods))


def table(runs: Iterable[Run]) -> str:
    """A Markdown row for each embedded set."""
    runs = list(runs)
    lines = [f"| set | methods | {' | '.join(COLUMNS)} |", "|---|---:|" + "---|" * len(COLUMNS)]
    for name in (*RANKED, *SMOKE):
        by = by_method(runs, (name,))
        means = {m: summarise(r["last_accuracy"] for r in groups[name]).mean or 0.0 for m, groups in by.items()}
        results = [correlation(means, {m: v[i] for m, v in PUBLISHED.items()}) for i in range(len(COLUMNS))]
        cells = [
            f"{number(r.rho, 2)} [{number(r.low, 2)}, {number(r.high, 2)}]" if r.rho is not None else "-"
            for r in results
        ]
        lines.append(f"| {name} | {results[0].n} | {' | '.join(cells)} |")
    return "\n".join(lines)
