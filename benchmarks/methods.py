"""Methods side by side on the embedded data sets: `python -m benchmarks.methods` runs main.py and prints a Markdown table.

Every cell is mean and standard deviation (divisor n-1) over the seeds; each seed has a different class order, as in SEMA-CL.
All numbers come from results.json files; finished runs are not repeated, so the command can be stopped and started.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.study import cell

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("finetune", "simplecil", "sema", "sema_corrected", "joint")
SETS = ("digits", "glyphs", "fractals")
COLUMNS = ("last_accuracy", "average_accuracy", "forgetting")


def run(experiment: Path, seed: int, out: Path) -> dict | None:
    """One seed of one experiment through the command line; its results.json, or None if it failed (the log says why)."""
    command = [sys.executable, str(ROOT / "main.py"), "--config", str(experiment), "--set", f"seed=[{seed}]"]
    log = out / "console" / f"{experiment.stem}_{seed}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}  # two single-threaded runs beat one on two cores
        done = subprocess.run([*command, "--out", str(out)], stdout=file, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        print(f"{experiment.stem}, seed {seed}: exit {done.returncode}, see {log}", file=sys.stderr)
        return None
    (folder,) = re.findall(r"^run folder: (.+)$", log.read_text(), re.MULTILINE)
    return json.loads((Path(folder) / f"seed_{seed}" / "results.json").read_text())


def table(runs: dict[tuple[str, str], list[dict]]) -> str:
    lines = [
        "| data | method | n | last | average | forgetting | adapters | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, method), results in runs.items():
        cells = [cell([r[column] for r in results]) for column in COLUMNS]
        adapters = cell([float(sum(r["adapters_per_layer"][-1].values())) for r in results])
        seconds = cell([sum(sum(task.values()) for task in r["seconds"]) for r in results])
        lines.append(f"| {name} | {method} | {len(results)} | {' | '.join(cells)} | {adapters} | {seconds} |")
    return "\n".join(lines)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--seeds", type=int, nargs="+", default=[1993, 1994, 1995, 1996, 1997])
    ask.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    ask.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    ask.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    ask.add_argument("--out", type=Path, default=Path("logs/benchmarks"))
    args = ask.parse_args()
    cells = [(name, method) for name in args.sets for method in args.methods]
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {
            (name, method, seed): pool.submit(run, ROOT / "exps" / f"{method}_{name}.json", seed, args.out)
            for seed in args.seeds
            for name, method in cells
        }
    runs = {
        (name, method): [r for seed in args.seeds if (r := jobs[name, method, seed].result()) is not None]
        for name, method in cells
    }
    print(table(runs))


if __name__ == "__main__":
    main()
