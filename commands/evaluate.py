"""`--evaluate RUN`: scores a saved run again on every task it learned, and compares with what was recorded."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from utils.process.machine import check_torchvision, flush_denormals, pick_device
from utils.report import console
from utils.run import record as run_record
from utils.text import printable


def run(args: argparse.Namespace) -> int:
    check_torchvision()
    return evaluate(args.evaluate, args.device or "auto", args.data_root)


def evaluate(folder: Path, device_name: str, data_root: str | None) -> int:
    """Scores a saved run's model on the test data of every task it learned. Exit code: 0 if each is as recorded, else 1."""
    from commands import saved
    from utils.evaluation import scores

    flush_denormals()
    device = pick_device(device_name)
    run = saved.load(folder, device, data_root)
    for line in run.notes:
        print(printable(f"warning: {line}"), file=sys.stderr)
    record = run_record.RunRecord.from_dict(run.record)
    now = [score.correct for score in scores.evaluate(run.learner, run.stream, run.task, device)[0]]
    print(printable(f"{folder}: {record.model_name} on {record.dataset} after task {run.task + 1}/{len(run.stream)}"))
    print(console.again_table(record.samples, record.correct[run.task], now))
    if now == record.correct[run.task]:
        print("every number is as recorded")
        return 0
    print(
        "numbers differ from those recorded: another device, machine or version of torch rounds differently; else the data "
        "or the code changed",
        file=sys.stderr,
    )
    return 1
