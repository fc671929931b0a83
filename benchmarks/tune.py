"""Chooses an experiment's settings without its test set: `python -m benchmarks.tune exps/sema_digits.json key=v1,v2 ...`

Calls `main.py --tune` over all tasks, with seeds (hence class orders) that the reported runs do not use: how the settings of
the leaderboard were chosen. Prints a line for each grid point, best average accuracy first. Where the first task alone should
decide, which is what a learner could know in time, call `main.py --tune` itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import main as program
from utils.config.strict_json import read_json


def value(text: str) -> object:
    """JSON, else text, as `--set` reads it."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def flags(experiment: Path, grid: list[str], seeds: list[int], out: Path) -> list[str]:
    """The arguments of main.py."""
    pairs = (text.partition("=") for text in grid)
    space = [f"{key}={json.dumps([value(v) for v in values.split(',')])}" for key, _, values in pairs]
    tune = json.dumps({"tasks": None, "seeds": seeds})
    common = ["--config", str(experiment), "--set", f"tune={tune}", "--set", "sweep=null", "--device", "cpu"]
    return [*common, "--out", str(out), "--tune", *space]


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("experiment", type=Path)
    ask.add_argument("grid", nargs="+", metavar="key=v1,v2")
    ask.add_argument("--seeds", type=int, nargs="+", default=[7])
    ask.add_argument("--out", type=Path, default=Path("logs"))
    args = ask.parse_args()
    if code := program.main(flags(args.experiment, args.grid, args.seeds, args.out)):
        return code
    (path, *_) = sorted((args.out / args.experiment.stem).glob("tune_*/*.json"), key=lambda p: -p.stat().st_mtime)
    rows = []
    for row in read_json(path)[0]["tuned"]["scores"]:
        average, last = (sum(row[key].values()) / len(row[key]) for key in ("average", "last"))
        rows.append((average, f"average {average:.1f}  last {last:.1f}  {json.dumps(row['setting'])}"))
    print("\nbest average first", *(line for _, line in sorted(rows, reverse=True)), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
