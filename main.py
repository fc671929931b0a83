"""Runs class-incremental experiments: `python main.py --config exps/quickstart.json`.

The story: read and check the experiment; for every seed build the backbone and the learner; for every task learn, score and
record; then print the table of the seeds. Whatever else one can ask for (--check, --compare, ...) is a file in commands/ with
the name of its flag. Exit codes: 0 done, 2 bad input, 75 interrupted and resumable, 1 anything else.
"""

from __future__ import annotations

import argparse
import importlib
import signal
from typing import TYPE_CHECKING, Any

from commands import failures, options
from utils.process import interrupt, parallel, startup
from utils.text import printable

if TYPE_CHECKING:
    import torch

    from backbone.vit import SlottedViT
    from backbone.weights import BackboneFacts
    from utils.config.resolve import Resolved
    from utils.data.dataset import Dataset
    from utils.run.log import RunLog


def main(argv: list[str] | None = None) -> int:
    startup.prepare()
    with failures.as_exit_code() as outcome:
        args = options.parse(argv, about=__doc__ or "")
        outcome.debug = args.debug
        if args.command != "run":
            if startup.is_first():  # nothing to share: rank 0 does it alone
                outcome.code = importlib.import_module(f"{options.__package__}.{args.command}").run(args)
            return outcome.code
        from commands import load

        if args.extend is not None:
            extend = importlib.import_module(f"{options.__package__}.extend")
            experiment = extend.experiment(args)
            outcome.settings = experiment.settings
            extend.prepare(experiment, args)
            run(experiment, args)
            return outcome.code
        loaded = load.load(args)
        outcome.settings = loaded.cells[0].resolved.settings
        if load.is_one_run(loaded, args):
            run(loaded.cells[0].resolved, args)
        else:
            outcome.code = importlib.import_module(f"{options.__package__}.sweep").run(loaded, args)
    return outcome.code


def run(experiment: Resolved, args: argparse.Namespace) -> None:
    """Runs every seed in turn, then prints their mean and standard deviation."""
    from commands import load, present
    from utils.report import console
    from utils.run import predictions

    cfg, afresh = experiment.settings, args.resume == "never"
    folders = {seed: args.out / args.config.stem / experiment.hash / f"seed_{seed}" for seed in cfg.seed}
    results = present.finished_results(experiment, folders, afresh)
    if None in results.values():
        from utils.run import folder, journal

        device, notes = load.machine(experiment)
        dataset, shown = load.dataset(experiment), set[str]()
        notes += dataset.notes
    for seed, path in folders.items():
        if (known := results[seed]) is not None:
            remarks = options.PROFILED_NOTHING * args.profile + predictions.lacking(path, cfg.predictions, known)
            print(printable(f"seed {seed} is finished: {path / 'results.json'}{remarks}"))
            continue
        backbone = load.backbone(cfg)  # before the run has a folder: bad weights are bad input
        with folder.open_log(path, args.out / "latest", afresh, [*notes, *backbone[1].notes], shown) as log:
            log.later_runs = sum(results[later] is None for later in cfg.seed[cfg.seed.index(seed) + 1 :])
            try:
                results[seed] = run_seed(experiment, seed, dataset, backbone, device, log, args.profile)
            except journal.Differs as difference:  # this device does not compute the same numbers twice
                folder.discard_task_in_progress(log, difference)
                results[seed] = run_seed(experiment, seed, dataset, load.backbone(cfg), device, log, args.profile)
    by_seed = {seed: results_of_seed for seed, results_of_seed in results.items() if results_of_seed is not None}
    present.refuse_mixed(by_seed)
    place = folders[cfg.seed[0]].parent
    print(printable("\n" + console.seed_table([*by_seed.values()], place if len(by_seed) == 1 else None)))
    if len(by_seed) > 1 and parallel.is_first():
        from commands import outcome

        outcome.show(place, args.config.stem, outcome.rows_of([("", [*folders.values()])]), with_table=False)
        print(printable(f"run folder: {place}"))
    parallel.stop()


def run_seed(
    experiment: Resolved,
    seed: int,
    dataset: Dataset,
    built: tuple[SlottedViT, BackboneFacts],
    device: torch.device,
    log: RunLog,
    profiled: bool = False,
) -> dict[str, Any]:
    """One run: all tasks of one seed, from its newest checkpoint on if there is one. Writes and returns results.json.

    `built` is the backbone as `weights.build` gives it; the run fills its slots. `profiled`: measure where the time goes."""
    import models
    from commands import present
    from utils.config.split import Split
    from utils.data.tasks import TaskStream
    from utils.report import console, page, profile
    from utils.report.results import load_rows
    from utils.run import folder, provenance, task
    from utils.run.state import RunState

    cfg, (backbone, facts) = experiment.settings.for_ranks(parallel.world()), built
    stream = TaskStream.of(cfg, dataset, seed, facts.image_size, device)
    learner = models.build(cfg, backbone.to(device), len(stream.order), seed, log)
    origin = provenance.begin(log, *present.of(experiment, seed, dataset, facts), dataset)
    values = {**experiment.values, "seed": [seed]}
    settings, machine = folder.describe(log, cfg, values, facts, device, origin.sources_changed)
    log.info(console.run_banner(cfg, stream, learner, facts, device, log.folder))
    for text in cfg.remarks_on(Split(stream.sizes, stream.train_images())):
        log.warn(text)
    if (workers := stream.measure_workers(cfg, learner.backbone, device)) is not None:
        log.info(workers)
    run = RunState(log, cfg, stream, learner, seed, origin)
    run.resume()
    with run.in_progress(profiled, device) as bar:
        for index in run.tasks_left():
            if not run.learned:
                run.begin(index)
                run.save(index, learned=task.learn(learner, stream, index, seed, run.journal))
            task.score(learner, stream, index, run.record, run.learned)
            profile.tell(log, index, len(stream), run.whole)  # before the last checkpoint, which counts the rows
            run.save(index)
            log.info(console.task_table(run.record, stream.original_names()))
            bar.update(1)
            interrupt.raise_if_requested(together=True)
    results = run.results()
    if parallel.is_first():
        if profiled and (table := profile.of_run(load_rows(log.folder / "metrics.jsonl"), len(stream))):
            log.info(table)
        page.write_report(log.folder, results, settings, machine, None, cfg.defaults(), cfg.descriptions())
        folder.finish(log, results)
    return results


if __name__ == "__main__":
    for notice in interrupt.NOTICES:  # a scheduler's counts as an interruption
        if signal.getsignal(notice) is not signal.SIG_IGN:
            signal.signal(notice, interrupt.raise_once)
    startup.leave(main())
