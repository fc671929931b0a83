"""What main.py does with finished runs, by their own settings: `--evaluate`, `--export`, `--explain`, `--verify`."""

from __future__ import annotations

import argparse
from pathlib import Path

import models
from commands import verify
from commands.evaluate import evaluate
from commands.explain import explained
from utils.process.machine import check_torchvision
from utils.text import printable

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
        passed, text = verify.verify(run, exps, models.settings_of)
        print(printable(text))
        return 0 if passed else 1
    check_torchvision()
    if name == "export":
        from commands import export

        print(export.export(run, run / "export", args.data_root))
        return 0
    return evaluate(run, args.device or "auto", args.data_root)
