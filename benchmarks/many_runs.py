"""Time and memory with ten thousand finished runs: `python -m benchmarks.many_runs [--cells 100] [--seeds 100]`.

Writes the run folders of a small sweep as finished runs leave them (the files that the program reads again), each with
different numbers. Then times two commands as whole processes of main.py: the same sweep again, which reads every folder, skips
all runs and prints the table; and `--compare` over all runs. With `--keep DIR` the folders stay.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from commands import load, options
from utils.data.tasks import drawn_order
from utils.evaluation.metrics import Score
from utils.run import record as run_record

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 30.0  # seconds
BASE = {
    "about": "finished runs of benchmarks/many_runs.py", "model_name": "finetune", "dataset": "digits", "init_cls": 2,
    "increment": 2, "backbone_weights": "random", "image_size": 16, "epochs": 1, "device": "cpu",
}  # fmt: skip
MACHINE = {
    "python": "3.11",
    "torch": "2.0",
    "device": "cpu",
    "command": ["main.py"],
    "backbone": {"weight_hash": "0" * 12},
}
TASKS = 5


def results_of(seed: int, draw: random.Random) -> dict[str, Any]:
    """results.json of a run of five tasks with two classes each."""
    order = drawn_order(10, seed, True)
    record = run_record.RunRecord("finetune", "digits", seed, order, [order[2 * t : 2 * t + 2] for t in range(TASKS)])
    for task in range(TASKS):
        correct = [draw.randrange(73) for _ in range(task + 1)]
        record.add_task(
            [
                Score(72, right, 72, 72, tuple(72 * (j == k) for j in range(task + 1)))
                for k, right in enumerate(correct)
            ],
            adapters_per_layer={0: 1, 1: 1},
            trainable_parameters=1000,
            total_parameters=5000,
            seconds={"train": draw.random(), "detect": 0.0, "evaluate": draw.random()},
            images=300,
            peak_memory_bytes=10**8,
        )
    return run_record.results_json(record)


def make(config: Path, out: Path) -> tuple[int, int]:
    """Writes run folders of all cells and seeds of the sweep in `config`. Returns their number of files, and bytes."""
    swept = load.load(options.parser("").parse_args(["--config", str(config)]))
    draw, files, size = random.Random(1), 0, 0
    for cell in swept.cells:
        settings = cell.resolved.values
        for seed in swept.seeds:
            folder = cell.run_folder(out, config.stem, seed)
            folder.mkdir(parents=True)
            rows = [
                {"kind": "epoch", "time": t, "task": t, "loss": draw.random(), "accuracy": draw.random()}
                for t in range(15)
            ]
            texts = {
                "config.json": json.dumps({**settings, "seed": [seed]}, indent=1),
                "environment.json": json.dumps(MACHINE, indent=1),
                "metrics.jsonl": "".join(f"{json.dumps(row)}\n" for row in rows),
                "report.html": "a page",  # a missing one would be written again
                "run.log": "2026-01-01 00:00:00 INFO  a line of a run's log\n" * 20,
                "results.json": json.dumps(results_of(seed, draw), indent=1),
            }
            for name, text in texts.items():
                (folder / name).write_text(text)
                files, size = files + 1, size + len(text)
    return files, size


def timed(*arguments: str) -> tuple[float, int, str]:
    """Wall seconds of main.py with these arguments, peak memory in MiB, and the first line it printed."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, str(ROOT / "main.py"), *arguments], capture_output=True, text=True)
    took = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"main.py {' '.join(arguments)}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return took, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024, done.stdout.strip().splitlines()[0]


def run(cells: int, seeds: int, place: Path) -> int:
    """Writes the folders below `place`, times both commands and prints the times. Returns 1 if one took over LIMIT."""
    rates = [round(0.001 + k * 1e-5, 6) for k in range(cells)]
    config, out = place / "many.json", place / "logs"
    config.write_text(json.dumps({**BASE, "seed": list(range(seeds)), "sweep": {"init_lr": rates}}))
    start = time.perf_counter()
    files, size = make(config, out)
    print(
        f"{cells * seeds} run folders written in {time.perf_counter() - start:.0f} s: {files} files, {size / 2**20:.0f} MiB"
    )
    slow = False
    for what, arguments in (
        ("the sweep again: all folders read, and the table", ["--config", str(config), "--out", str(out)]),
        ("--compare of all", ["--compare", str(out / "many"), "--out", str(place / "compare.html")]),
    ):
        took, memory, said = timed(*arguments)
        slow |= took > LIMIT
        print(f"{took:6.1f} s, at most {memory} MiB so far: {what} ({said})" + "  TOO SLOW" * (took > LIMIT))
    return int(slow)


if __name__ == "__main__":
    ask = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    ask.add_argument("--cells", type=int, default=100)
    ask.add_argument("--seeds", type=int, default=100)
    ask.add_argument("--keep", type=Path, metavar="DIR", help="write the folders here and leave them")
    args = ask.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        where = args.keep or Path(temporary)
        where.mkdir(parents=True, exist_ok=True)
        sys.exit(run(args.cells, args.seeds, where))
