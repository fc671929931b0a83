"""Runs class-incremental experiments: `python main.py --config exps/quickstart.json`.

The story: read and check the JSON; for each seed build data, backbone and method; for each task learn, consolidate,
evaluate, record; then report. Exit codes: 0 done, 2 bad input, 75 interrupted and resumable, 1 anything else.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import models
from backbone import catalogue
from models import finished, planning
from utils import (
    command,
    compare,
    config,
    data,
    interrupt,
    legacy,
    parallel,
    profile,
    report,
    storage,
    strict_json,
    sweep,
    tracker,
)
from utils.config import Resolved
from utils.runlog import RunLog, SilentLog
from utils.runtime import check_torchvision, environment, flush_denormals, peak_memory, seed_everything

if TYPE_CHECKING:
    import torch

    from backbone.vit import SlottedViT
    from backbone.weights import BackboneFacts
    from models.base import Learner
    from utils.journal import Journal
    from utils.tasks import TaskStream

HERE = Path(__file__).resolve().parent
PROFILED_NOTHING = " (--profile has nothing to measure: --resume never runs it anew)"


def main(argv: list[str] | None = None) -> int:
    # OpenMP threads that spin while they wait make small models up to 20 times slower once the cores are shared. torch
    # reads these when it is imported, which happens later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    gc.set_threshold(50_000, 20, 20)  # collecting as often as Python does by default is a tenth of the start
    command.speak_any_encoding()
    number, processes = parallel.asked()
    if number:  # rank 0 speaks for all
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    ask = command.parser(__doc__ or "")
    args, code, loaded = ask.parse_args(argv), 0, None
    try:
        if args.profile and (args.config is None or args.check or args.list):
            ask.error("--profile measures a run: it goes with --config FILE alone")
        if number and (args.config is None or args.check):
            return 0  # nothing to be shared: rank 0 does it
        if args.list:
            print(command.listing(HERE / "exps", models.summaries(), catalogue.names()))
        elif finished.asked(args):
            code = finished.look(args, HERE / "exps")
        elif args.compare:
            compare.run(args)
        elif args.config is not None:
            loaded = load(args)
            if args.check:
                planning.check(loaded, args.engine)
            elif processes > 1 and (loaded.declared or args.jobs > 1 or args.engine != "local"):
                raise ValueError(
                    "torchrun computes one run: a sweep, --jobs and --engine start processes of their own without it"
                )
            elif loaded.declared or args.jobs > 1 or args.engine != "local":
                code = sweep.run(loaded, args, HERE / "main.py", planning.ready, result_of)
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
        code, text = command.verdict(error, loaded.cells[0].resolved.settings if loaded else None)
        if parallel.lost(error):
            code, text = 1, f"another process of the run has ended, see what it says; {command.SAVED}"
        if number:  # most errors are everybody's: then rank 0 says it, and torchrun ends the others meanwhile
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(2)
        if args.debug:
            traceback.print_exc()
        print(f"{f'process {number}: ' * (processes > 1)}error: {text}", file=sys.stderr)
        return code


def load(args: argparse.Namespace) -> sweep.Sweep:
    """The experiment file with the command line's overrides, checked in full before anything heavy is imported.

    A file without `sweep` has one cell."""
    written, faults = strict_json.read_json(args.config)
    values, notes, older = legacy.translate(written)
    overrides, more = strict_json.parse_set(args.set)
    overrides |= {k: v for k in ("data_root", "device") if (v := getattr(args, k)) is not None}
    values |= overrides
    more += [fault for key in ("data_root", "device") for fault in strict_json.strange(key, getattr(args, key))]
    spec, source = (
        values.pop("sweep", None),
        " ".join([str(args.config), *(f"--set {strict_json.shortened(text, 200)}" for text in args.set)]),
    )
    methods = models.available()

    def resolve_one(values: dict[str, Any], more_notes: Sequence[str] = ()) -> Resolved:
        return config.resolve(
            values,
            source=source,
            settings_of=models.settings_of,
            methods=methods,
            backbones=catalogue.names,
            faults=faults + older + more,
            notes=[*notes, *more_notes],
        )

    return sweep.resolve(spec, values, source, overrides, resolve_one, models.settings_of, methods)


def result_of(folder: Path) -> dict[str, Any] | None:
    """The results of a finished run; None if it is not finished or, said aloud, if the file is damaged."""
    path = folder / "results.json"
    if path.is_dir():
        raise ValueError(f"{path} is a folder, where a file would be written; move it away")
    if not path.is_file():
        return None
    try:
        results, faults = strict_json.read_json(path)
        if faults:
            raise strict_json.ConfigError(str(path), faults)
        try:
            report.seed_table([results])
            if folder.name != f"seed_{results['seed']}":
                raise ValueError(f"seed {results['seed']}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} holds no results ({type(error).__name__}: {error})") from None
        return results
    except ValueError as error:
        print(f"warning: {error}; the run is finished anew from its last checkpoint", file=sys.stderr)
        return None


def run(resolved: Resolved, args: argparse.Namespace) -> None:
    """Every seed in turn, then their mean and standard deviation."""
    cfg = resolved.settings
    folders = {seed: args.out / args.config.stem / resolved.hash / f"seed_{seed}" for seed in cfg.seed}
    if parallel.asked()[1] > 1:
        check_torchvision()
        parallel.start(cfg.device)
    looked = folders.values() if args.resume == "auto" else ()
    found, _ = parallel.from_first(lambda: ([result_of(folder) for folder in looked], {}))
    results: dict[int, dict[str, Any] | None] = dict(zip(folders, found, strict=False))
    if not all(results.get(s) for s in folders):
        check_torchvision()
        from backbone import weights
        from utils import checkpoint, journal

        flush_denormals()
        if lack := tracker.missing(cfg.tracker):
            raise ValueError(lack)
        device, warning = parallel.start(cfg.device)
        notes = [*resolved.notes, *([warning] if warning else [])]
        if (count := data.count_classes(cfg.dataset, **planning.places(resolved))) is not None:
            planning.outline(resolved, count)
        dataset = parallel.in_turn(
            lambda: data.load(cfg.dataset, **planning.places(resolved), test_ratio=cfg.test_ratio)
        )
    told: set[str] = set()
    for seed, folder in folders.items():
        if results.get(seed):
            print(f"seed {seed} is finished: {folder / 'results.json'}{PROFILED_NOTHING * args.profile}")
            continue
        built = parallel.in_turn(lambda: weights.build(cfg))  # before the run has a folder: bad weights are bad input
        if args.resume == "never" and parallel.is_first() and (kept := checkpoint.move_aside(folder)):
            print(f"seed {seed} starts afresh, the folder of the earlier run is kept: {kept}")
        with RunLog(folder) if parallel.is_first() else SilentLog(folder) as log:
            if parallel.is_first():
                checkpoint.point_latest(args.out / "latest", folder)
            for line in notes:
                log.warn(line, console=line not in told)
                told.add(line)
            try:
                results[seed] = run_seed(resolved, seed, dataset, built, device, log, args.profile)
            except journal.Differs as error:  # a device that does not compute the same twice
                log.muted = False
                log.warn(f"the task in progress cannot be taken up inside ({error}): it is learned from its start")
                if parallel.is_first():
                    journal.discard(folder / "checkpoints")
                results[seed] = run_seed(resolved, seed, dataset, weights.build(cfg), device, log, args.profile)
    print("\n" + report.seed_table([r for s in folders if (r := results[s]) is not None], folders[cfg.seed[0]].parent))
    parallel.stop()


def run_seed(
    resolved: Resolved,
    seed: int,
    dataset: data.Dataset,
    built: tuple[SlottedViT, BackboneFacts],
    device: torch.device,
    log: RunLog,
    profiled: bool = False,
) -> dict[str, Any]:
    """One run: all tasks of one seed, from its newest checkpoint if there is one. Writes and returns results.json.

    `built` is the backbone as `weights.build` gives it; the run fills its slots. `profiled`: measure where its time goes."""
    from models.base import SeededInit
    from utils import checkpoint, page, samples
    from utils.evaluation import spans
    from utils.tasks import TaskStream

    cfg, folder = resolved.settings, log.folder
    if cfg.batch_per_process:
        cfg = cfg.model_copy(update={"batch_size": cfg.batch_size * parallel.world()})
    backbone, facts = built
    stream = TaskStream.of(cfg, dataset, seed, facts.image_size, device)
    Method = models.learner_of(cfg.model_name)
    learner: Learner = Method(cfg, backbone.to(device), len(stream.order), SeededInit(seed), log)
    classes = [[stream.order[c] for c in span] for span in spans(stream.sizes)]
    record = report.RunRecord(cfg.model_name, cfg.dataset, seed, stream.order, classes)
    settings = {**resolved.values, "seed": [seed]}
    machine = {**environment(device), "backbone": vars(facts)}
    if parallel.world() > 1:
        machine["processes"] = parallel.world()
    if parallel.is_first():
        tell_processes(folder, log, getattr(cfg, "batch_size", None))
        storage.write_json(folder / "config.json", settings)
        storage.write_json(folder / "environment.json", machine)
    planned = learner.planned_parameters()
    log.info(
        report.banner(
            method=f"{cfg.model_name}  {cfg.prefix}".rstrip(),
            data=f"{cfg.dataset}, {len(stream.order)} classes in {len(stream)} tasks of {'+'.join(map(str, stream.sizes))}",
            backbone=f"{cfg.backbone_type} ({facts.tag}, {facts.image_size} px)",
            weights=f"{facts.source}, hash {facts.weight_hash}",
            device=str(device),
            seeds=cfg.seed,
            trainable=planned[0][1] if planned else 0,
            total=sum(p.numel() for p in learner.parameters()),
            folder=folder,
        )
    )
    if (chosen := stream.measure_workers(cfg, learner.backbone, device)) is not None:
        log.info(chosen)
    start, measured, rows = 0, None, 0
    if (saved := checkpoint.resume(folder, learner, log, facts.weight_hash)) is not None:
        record, measured, rows = report.RunRecord.from_dict(saved.record), saved.measured, saved.rows
        start = len(record.correct)
    if parallel.is_first():
        log.mirror = tracker.of(cfg.tracker, folder, log.rows)
    measuring = profile.running(profiled and parallel.is_first(), lambda: learner.prefix_layer, device)
    with log.bar(len(stream), f"seed {seed}, tasks", level=0, done=start) as bar, interrupt.listening(), measuring:
        for index in range(start, len(stream)):
            journal = checkpoint.journal_of(folder, index, log, facts.weight_hash)
            whole = measured is None
            if measured is None:
                journal.open(rows)
                whole = not journal.begun
                if parallel.is_first():
                    samples.keep(folder, stream, index)
                measured = learn(learner, stream, index, seed, journal)
                parallel.align(learner.own_state() if parallel.world() > 1 else {}, f"after task {index + 1}")
                with profile.part("checkpoint"):
                    checkpoint.save(folder, index, learner, record.to_dict(), log, facts.weight_hash, measured)
            else:
                log.truncate_rows(min(rows, log.rows))
            with profile.part("evaluation"):
                score(learner, stream, index, record, measured)
            profile.tell(log, index, len(stream), whole)  # before the last checkpoint, which counts the rows
            with profile.part("checkpoint"):
                checkpoint.save(folder, index, learner, record.to_dict(), log, facts.weight_hash)
            measured, rows = None, log.rows
            log.info(report.task_table(record))
            bar.update(1)
            interrupt.check(together=True)
    if not parallel.is_first():
        return report.results_json(record)
    if profiled and (table := profile.of_run(page.load_rows(folder / "metrics.jsonl"), len(stream))):
        log.info(table)
    results = report.results_json(record)
    page.write_report(folder, results, settings, machine, defaults=cfg.defaults())
    for kept in folder.glob("cache*"):  # of the frozen prefix: nobody computes with this run again
        shutil.rmtree(kept, ignore_errors=True)
    storage.write_json(folder / "results.json", results)  # last: a folder with it is finished
    return results


def tell_processes(folder: Path, log: RunLog, batch: int | None) -> None:
    """What several processes do with the run's batches, and that a run goes on with another number of them."""
    now, before = parallel.world(), 1
    if (path := folder / "environment.json").is_file():
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            before = int(strict_json.read_json(path)[0].get("processes", 1))
        if before != now:
            log.warn(
                f"the run was begun with {before} process{'es' * (before > 1)} and goes on with {now}: parts of batches are "
                "others, so numbers may differ by rounding, and random draws in training by more"
            )
    if now > 1:
        log.info(f"{now} processes: each computes a part of every batch, a training step takes {batch} images in all")


def learn(learner: Learner, stream: TaskStream, index: int, seed: int, journal: Journal) -> dict[str, Any]:
    """One task: the learner sees its training data alone. Returns what the task's record needs beside its scores.

    Phases that `journal` has are not trained again."""
    seed_everything(seed, "task", index, *parallel.own_seed())
    learner.begin_task()
    learner.journal = journal
    task = stream.task(index, with_past=learner.uses_past, with_test=learner.uses_test)
    learner.learn(task)
    with profile.part("consolidation"):
        learner.consolidate(task)
    journal.finish()
    detect = learner.seconds.get("detect", 0.0)
    return {
        "seconds": {"train": journal.seconds - detect, "detect": detect},
        "trainable_parameters": sum(p.numel() for p in learner.trained.values()),
        "images": learner.views,
        "selections": learner.selections(),
    }


def score(
    learner: Learner, stream: TaskStream, index: int, record: report.RunRecord, measured: Mapping[str, Any]
) -> None:
    """Every task so far is scored once on its test data; the scores and what was `measured` in learning join the record."""
    from utils import evaluation

    seed_everything(record.seed, "score", index, *parallel.own_seed())
    device, start = next(learner.parameters()).device, time.perf_counter()
    renewed = evaluation.renewed_statistics(learner, stream, index)
    ready = time.perf_counter()
    gates = evaluation.gates_of(learner, stream, index)
    scores, by_renewed = evaluation.evaluate(learner, stream, index, device, renewed, gates)
    seconds = {**measured["seconds"], "evaluate": time.perf_counter() - ready}
    controls = evaluation.tell_routing(learner, stream, index, device, gates, scores, record.seed)
    record.add_task(
        scores,
        adapters_per_layer=dict(enumerate(learner.adapters_per_layer())),
        trainable_parameters=measured["trainable_parameters"],
        total_parameters=sum(p.numel() for p in learner.parameters()),
        seconds=seconds,
        images=measured["images"],
        selections=measured["selections"],
        test_evaluations=1 + learner.uses_test + controls,
        peak_memory_bytes=peak_memory(device),
        head_drift=evaluation.drift_of(learner, stream, index, renewed, scores, by_renewed, seconds=ready - start),
    )
    accuracy = [s.correct / s.samples if s.samples else None for s in scores]
    learner.log.row("task", task=index, accuracy=accuracy, adapters=learner.adapters_per_layer(), seconds=seconds)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's notice counts as an interruption
    parallel.leave(main())
