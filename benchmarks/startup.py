"""How long the program takes to start: `python -m benchmarks.startup`.

Times whole processes, in turn in every round: `--check` of an experiment file, and the same file until its first training step
is done, where the process ends. `import torch` is the lower bound of the second. Processor time is user and system time of the
process; wall time includes waiting, which on a busy machine is most of it. Prints medians of both. One run of each before the
clock starts compiles Python's files.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FIRST_STEP = """
import os, sys, main
import models

def learner_of(name, real=models.learner_of):
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(lambda *step: os._exit(0))
    return real(name)

models.learner_of = learner_of
main.main(sys.argv[1:])
sys.exit("no step was taken")
"""


class Took(NamedTuple):
    processor: float
    wall: float


def took(command: list[str]) -> Took:
    """Seconds of one process. Raises RuntimeError with its output if it fails."""
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=output, stderr=output)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"{command[0]}: exit code {process.returncode}\n{output.read().decode()[-2000:]}")
    return Took(used.ru_utime + used.ru_stime, wall)


def commands(config: str, out: Path) -> dict[str, list[str]]:
    experiment = ["--config", config]
    return {
        "import torch": ["-c", "import torch"],
        "--check": ["main.py", *experiment, "--check"],
        "first training step": ["-c", FIRST_STEP, *experiment, "--out", str(out), "--jobs", "1", "--resume", "never"],
    }


def measure(config: str, rounds: int) -> dict[str, list[Took]]:
    with tempfile.TemporaryDirectory() as out:
        ways = commands(config, Path(out))
        for command in ways.values():
            took(command)
        times: dict[str, list[Took]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, command in ways.items():
                times[name].append(took(command))
    return times


def table(times: dict[str, list[Took]], limits: dict[str, float]) -> str:
    lines = ["| what | processor, s | wall, s | required | |", "|---|---|---|---|---|"]
    for name, runs in times.items():
        processor, wall = (median(values) for values in zip(*runs, strict=True))
        limit = limits.get(name)
        end = "| |" if limit is None else f"{limit:g} s | {'met' if processor <= limit else 'NOT MET'} |"
        lines.append(f"| {name} | {processor:.2f} | {wall:.2f} | {end}")
    return "\n".join(lines)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--config", default="exps/sema_digits_short.json")
    ask.add_argument("--rounds", type=int, default=5)
    args = ask.parse_args()
    print(f"load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {args.rounds} rounds\n", flush=True)
    print(table(measure(args.config, args.rounds), {"--check": 2, "first training step": 8}))


if __name__ == "__main__":
    main()
