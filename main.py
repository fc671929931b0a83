"""Runs class-incremental experiments: `python main.py --config exps/quickstart.json`.

The story: read and check the JSON; build data and backbone, and for each seed let commands/running.py learn, evaluate and
record task after task; then the table of the seeds. Exit codes: 0 done, 2 bad input, 75 interrupted and resumable, 1 anything
else.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import models
from backbone import catalogue
from commands import check, compare, failures, finished, options
from commands import list as commands_list
from commands import sweep as commands_sweep
from commands.load import load
from utils import data
from utils.config.resolve import Resolved
from utils.process import parallel
from utils.process.machine import check_torchvision, flush_denormals
from utils.report import console
from utils.report.results import result_of
from utils.run import tracker
from utils.run.log import RunLog, SilentLog

HERE = Path(__file__).resolve().parent
PROFILED_NOTHING = " (--profile has nothing to measure: --resume never runs it anew)"


def main(argv: list[str] | None = None) -> int:
    # OpenMP threads that spin while they wait make small models up to 20 times slower once the cores are shared. torch
    # reads these when it is imported, which happens later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    gc.set_threshold(50_000, 20, 20)  # collecting as often as Python does by default is a tenth of the start
    options.speak_any_encoding()
    number, processes = parallel.torchrun_ranks()
    if number:  # rank 0 speaks for all
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    ask = options.parser(__doc__ or "")
    args, code, loaded = ask.parse_args(argv), 0, None
    try:
        if args.profile and (args.config is None or args.check or args.list):
            ask.error("--profile measures a run: it goes with --config FILE alone")
        if number and (args.config is None or args.check):
            return 0  # nothing to be shared: rank 0 does it
        if args.list:
            print(commands_list.listing(HERE / "exps", models.summaries(), catalogue.names()))
        elif finished.asked(args):
            code = finished.look(args, HERE / "exps")
        elif args.compare:
            compare.run(args)
        elif args.config is not None:
            loaded = load(args)
            if args.check:
                check.check(loaded, args.engine)
            elif processes > 1 and (loaded.declared or args.jobs > 1 or args.engine != "local"):
                raise ValueError(
                    "torchrun computes one run: a sweep, --jobs and --engine start processes of their own without it"
                )
            elif loaded.declared or args.jobs > 1 or args.engine != "local":
                code = commands_sweep.run(loaded, args, HERE / "main.py", check.ready, result_of)
            else:
                run(loaded.cells[0].resolved, args)
        elif args.check or args.set:
            ask.error("--config FILE is needed")
        else:
            ask.print_help()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as notice:
        what = f" after {notice}, which is saved" if str(notice) else ": what is finished is saved"
        if not number:
            print(f"\ninterrupted{what}, the same command goes on from there", file=sys.stderr)
        return 75
    except BrokenPipeError:  # the reader has left, as in `main.py --list | head`; nothing more can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        code, text = failures.verdict(error, loaded.cells[0].resolved.settings if loaded else None)
        if parallel.lost(error):
            code, text = 1, f"another process of the run has ended, see what it says; {failures.SAVED}"
        if number:  # most errors are everybody's: then rank 0 says it, and torchrun ends the others meanwhile
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(2)
        if args.debug:
            traceback.print_exc()
        print(f"{f'process {number}: ' * (processes > 1)}error: {text}", file=sys.stderr)
        return code


def run(resolved: Resolved, args: argparse.Namespace) -> None:
    """Every seed in turn, then their mean and standard deviation."""
    cfg = resolved.settings
    folders = {seed: args.out / args.config.stem / resolved.hash / f"seed_{seed}" for seed in cfg.seed}
    if parallel.torchrun_ranks()[1] > 1:
        check_torchvision()
        parallel.start(cfg.device)
    looked = folders.values() if args.resume == "auto" else ()
    found, _ = parallel.broadcast_from_first(lambda: ([result_of(folder) for folder in looked], {}))
    results: dict[int, dict[str, Any] | None] = dict(zip(folders, found, strict=False))
    if not all(results.get(s) for s in folders):
        check_torchvision()
        from backbone import weights
        from commands import running
        from utils.run import folder as run_folder
        from utils.run import journal

        flush_denormals()
        if lack := tracker.missing(cfg.tracker):
            raise ValueError(lack)
        device, warning = parallel.start(cfg.device)
        notes = [*resolved.notes, *([warning] if warning else [])]
        if (count := data.count_classes(cfg.dataset, **check.data_paths(resolved))) is not None:
            check.outline(resolved, count)
        dataset = parallel.first_rank_first(
            lambda: data.load(cfg.dataset, **check.data_paths(resolved), test_ratio=cfg.test_ratio)
        )
    told: set[str] = set()
    for seed, folder in folders.items():
        if results.get(seed):
            print(f"seed {seed} is finished: {folder / 'results.json'}{PROFILED_NOTHING * args.profile}")
            continue
        built = parallel.first_rank_first(
            lambda: weights.build(cfg)
        )  # before the run has a folder: bad weights are bad input
        if args.resume == "never" and parallel.is_first() and (kept := run_folder.move_aside(folder)):
            print(f"seed {seed} starts afresh, the folder of the earlier run is kept: {kept}")
        with RunLog(folder) if parallel.is_first() else SilentLog(folder) as log:
            if parallel.is_first():
                run_folder.point_latest(args.out / "latest", folder)
            for line in notes:
                log.warn(line, console=line not in told)
                told.add(line)
            try:
                results[seed] = running.run_seed(resolved, seed, dataset, built, device, log, args.profile)
            except journal.Differs as error:  # a device that does not compute the same twice
                log.muted = False
                log.warn(f"the task in progress cannot be taken up inside ({error}): it is learned from its start")
                if parallel.is_first():
                    journal.discard(folder / "checkpoints")
                results[seed] = running.run_seed(resolved, seed, dataset, weights.build(cfg), device, log, args.profile)
    print("\n" + console.seed_table([r for s in folders if (r := results[s]) is not None], folders[cfg.seed[0]].parent))
    parallel.stop()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's notice counts as an interruption
    parallel.leave(main())
