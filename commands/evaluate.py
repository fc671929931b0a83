"""`--evaluate RUN`: scores a saved run again on every task it learned, and compares with what was recorded."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from utils.process.machine import check_torchvision, flush_denormals, pick_device
from utils.report import console
from utils.run import record as run_record
from utils.text import printable


def run(args: argparse.Namespace) -> int:
    check_torchvision()
    if args.out is not None and (args.out.suffix != ".npz" or args.out.is_dir()):
        raise ValueError(f"--evaluate RUN --out {args.out}: a file FILE.npz is expected, for predictions and scores")
    return evaluate(args.evaluate, args.device or "auto", args.data_root, args.out)


def evaluate(folder: Path, device_name: str, data_root: str | None, out: Path | None = None) -> int:
    """Scores a saved run's model on the test data of every task it learned. Exit code: 0 if each is as recorded, else 1.

    `out`: a file for prediction and scores of every image, see utils/run/predictions.py."""
    from commands import saved
    from utils.evaluation import scores
    from utils.evaluation.by_image import ByImage
    from utils.run import predictions

    flush_denormals()
    device = pick_device(device_name)
    run = saved.load(folder, device, data_root)
    for line in run.notes:
        print(printable(f"warning: {line}"), file=sys.stderr)
    record = run_record.RunRecord.from_dict(run.record)
    images = ByImage(store=True)
    more: dict[str, Any] = {} if out is None else {"images": images}
    now = [score.correct for score in scores.evaluate(run.learner, run.stream, run.task, device, **more)[0]]
    if out is not None:
        predictions.write(out, images, run.stream)
        print(printable(f"predictions and scores of every test image: {out}"))
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
