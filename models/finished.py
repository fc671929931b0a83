"""What main.py does with finished runs, by their own settings: `--evaluate`, `--export`, `--explain`, `--verify`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import models
from utils import cards, explain, page, report
from utils.runtime import check_torchvision, flush_denormals, pick_device
from utils.strict_json import printable

ACTIONS = ("evaluate", "export", "explain", "verify")


def asked(args: argparse.Namespace) -> bool:
    """Whether the command line asks for one of these."""
    return any(getattr(args, name) is not None for name in ACTIONS)


def look(args: argparse.Namespace, exps: Path) -> int:
    """Does what is asked for and returns the exit code. `exps` is the folder of the shipped experiments.

    Raises ValueError for a combination that makes no sense, and for a folder that is no run."""
    chosen = [name for name in ACTIONS if getattr(args, name) is not None]
    if len(chosen) > 1:
        raise ValueError(f"--{chosen[0]} and --{chosen[1]} are two things: ask for one at a time")
    (name,) = chosen
    if args.compare:
        raise ValueError(f"--{name} and --compare are two things: ask for one at a time")
    if args.config is not None or args.set or args.check:
        raise ValueError(f"--{name} RUN takes the run's own settings: --config, --set and --check do not go with it")
    run: Path = getattr(args, name)
    if name == "explain":
        print(printable(explained(run)))
        return 0
    if name == "verify":
        passed, text = cards.verify(run, exps, models.settings_of)
        print(printable(text))
        return 0 if passed else 1
    check_torchvision()
    if name == "export":
        from models import exported

        print(exported.export(run, run / "export", args.data_root))
        return 0
    return evaluate(run, args.device or "auto", args.data_root)


def explained(run: Path) -> str:
    """The sentences of a finished run."""
    results, environment = cards.read(run, "results.json"), cards.read(run, "environment.json")
    rows = page.load_rows(run / "metrics.jsonl")
    try:
        return explain.explain(results, environment, rows)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{run}: its results are not as this program writes them ({error})") from None


def evaluate(folder: Path, device_name: str, data_root: str | None) -> int:
    """Scores a saved run's model on the test data of every task it learned. Exit code: 0 if each is as recorded, else 1."""
    from models import saved
    from utils import evaluation

    flush_denormals()
    device, warning = pick_device(device_name)
    run = saved.load(folder, device, data_root)
    for line in [*run.notes, *([warning] if warning else [])]:
        print(f"warning: {line}", file=sys.stderr)
    record = report.RunRecord.from_dict(run.record)
    now = [score.correct for score in evaluation.evaluate(run.learner, run.stream, run.task, device)[0]]
    print(f"{folder}: {record.model_name} on {record.dataset} after task {run.task + 1}/{len(run.stream)}")
    print(report.again_table(record.samples, record.correct[run.task], now))
    if now == record.correct[run.task]:
        print("every number is as recorded")
        return 0
    print(
        "numbers differ from those recorded: another device, machine or version of torch rounds differently; else the data "
        "or the code changed",
        file=sys.stderr,
    )
    return 1
