"""Runs class-incremental experiments: `python main.py --config exps/x.json`.

The story: read and check the JSON; for each seed build data, backbone and method; for each task learn, consolidate,
evaluate, record; then report. Exit codes: 0 done, 2 bad input, 75 interrupted and resumable, 1 anything else.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import models
from backbone import catalogue
from utils import check as texts
from utils import config, data, metrics, report
from utils.config import Resolved
from utils.runtime import RunLog, check_torchvision, environment, peak_memory, pick_device, seed_everything

if TYPE_CHECKING:
    import torch

    from models.base import Learner
    from utils.tasks import TaskStream

HERE = Path(__file__).resolve().parent
EXAMPLES = """five commands to start with:
  python main.py --config exps/quickstart.json
  python main.py --config exps/sema_glyphs.json --check
  python main.py --config exps/quickstart.json --set exp_threshold=1 --set seed=[1,2,3]
  python main.py --config exps/sema_cifar.json --data-root ~/data --device cuda
  python main.py --list"""


def parser() -> argparse.ArgumentParser:
    ask = argparse.ArgumentParser(
        prog="main.py", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ask.add_argument("--config", type=Path, metavar="FILE", help="experiment JSON")
    ask.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key (JSON value, else string)")
    ask.add_argument("--out", type=Path, default=Path("logs"), metavar="DIR", help="where run folders go (default: logs)")
    ask.add_argument("--data-root", metavar="DIR", help="folder that holds the data sets (overrides the key data_root)")
    ask.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N (overrides the key device)")
    ask.add_argument("--check", action="store_true", help="validate, show the resolved settings, tasks and parameters, and stop")
    ask.add_argument("--resume", choices=("auto", "never"), default="auto", help="never: start afresh, moving old folders aside")
    ask.add_argument("--list", action="store_true", help="show methods, data sets, backbones and experiment files")
    ask.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return ask


def main(argv: list[str] | None = None) -> int:
    ask = parser()
    args = ask.parse_args(argv)
    try:
        if args.list:
            print(texts.listing(HERE / "exps", models.available(), catalogue.names()))
        elif args.config is None:
            ask.print_help()
        else:
            resolved = load(args)
            check(resolved) if args.check else run(resolved, args)
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted: what finished is saved, the same command goes on from there", file=sys.stderr)
        return 75
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def load(args: argparse.Namespace) -> Resolved:
    """The experiment file with the command line's overrides, checked in full before anything heavy is imported."""
    values, faults = config.read_json(args.config)
    overrides, more = config.parse_set(args.set)
    values |= overrides
    values |= {k: v for k, v in (("data_root", args.data_root), ("device", args.device)) if v is not None}
    return config.resolve(
        values,
        source=str(args.config),
        settings_of=models.settings_of,
        methods=models.available(),
        backbones=catalogue.names,
        faults=faults + more,
    )


def check(resolved: Resolved) -> None:
    """Shows what a run would do and what it lacks on this machine."""
    import torch

    from backbone import weights
    from utils.tasks import class_order, task_sizes

    check_torchvision()
    cfg = resolved.settings
    where = places(resolved)
    lacking = [data.missing(cfg.dataset, **where), weights.missing(cfg)]
    print(texts.settings_table(resolved.values, resolved.given))
    count = data.count_classes(cfg.dataset, **where)
    if count is not None:
        sizes = task_sizes(count, cfg.init_cls, cfg.increment)
        order_seed = cfg.seed[0] if cfg.class_order_seed is None else cfg.class_order_seed
        print(texts.split_table(sizes, class_order(count, order_seed, cfg.shuffle), cfg.seed[0]))
        backbone, facts = weights.build(cfg, with_weights=False)
        with torch.device("meta"):
            learner = models.learner_of(cfg.model_name)(cfg, backbone, count, _unset, None)
        print(texts.parameter_table(learner.planned_parameters(), sum(p.numel() for p in learner.parameters())))
    for line in (*resolved.notes, *filter(None, lacking)):
        print(f"note: {line}")
    print("the settings are valid" + ("; what is missing here is listed above" if any(lacking) else ""))


def places(resolved: Resolved) -> dict[str, Path | None]:
    """Where the data are looked for."""
    cfg = resolved.settings
    return {"root": Path(cfg.data_root).expanduser(), "path": Path(cfg.data_path).expanduser() if cfg.data_path else None}


def run(resolved: Resolved, args: argparse.Namespace) -> None:
    """Every seed in turn, then their mean and standard deviation."""
    check_torchvision()
    from utils import checkpoint

    cfg = resolved.settings
    folder = args.out / args.config.stem / resolved.hash
    device, warning = pick_device(cfg.device)
    dataset = data.load(cfg.dataset, **places(resolved), test_ratio=cfg.test_ratio)
    results = []
    for seed in cfg.seed:
        place = folder / f"seed_{seed}"
        if args.resume == "never":
            checkpoint.move_aside(place)
        if (place / "results.json").is_file():
            results.append(config.read_json(place / "results.json")[0])
            print(f"seed {seed} is finished: {place / 'results.json'}")
            continue
        with RunLog(place) as log:
            point_latest(args.out / "latest", folder)
            for line in (*resolved.notes, *([warning] if warning else [])):
                log.warn(line)
            results.append(run_seed(resolved, seed, dataset, device, log))
    print("\n" + report.seed_table(results, folder))


def run_seed(resolved: Resolved, seed: int, dataset: data.Dataset, device: torch.device, log: RunLog) -> dict[str, Any]:
    """One run: all tasks of one seed, from its newest checkpoint if there is one. Returns the content of results.json."""
    from backbone import weights
    from models.base import SeededInit
    from utils import checkpoint, plots
    from utils.tasks import TaskStream

    cfg = resolved.settings
    backbone, facts = weights.build(cfg)
    stream = TaskStream(
        dataset,
        init_cls=cfg.init_cls,
        increment=cfg.increment,
        seed=seed,
        image_size=facts.image_size,
        class_order_seed=cfg.class_order_seed,
        shuffle=cfg.shuffle,
        num_workers=cfg.num_workers,
    )
    learner: Learner = models.learner_of(cfg.model_name)(cfg, backbone.to(device), len(stream.order), SeededInit(seed), log)
    ends = [sum(stream.sizes[: t + 1]) for t in range(len(stream))]
    classes = [stream.order[end - size : end] for end, size in zip(ends, stream.sizes, strict=True)]
    record = report.RunRecord(cfg.model_name, cfg.dataset, seed, stream.order, classes)
    report.write_json(log.folder / "config.json", {**resolved.values, "seed": [seed]})
    report.write_json(log.folder / "environment.json", {**environment(device), "backbone": vars(facts)})
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
            folder=log.folder,
        )
    )
    saved, complaints = checkpoint.newest(log.folder / "checkpoints")
    for complaint in complaints:
        log.warn(complaint)
    start = 0
    if saved is not None:
        if saved.facts["weight_hash"] != facts.weight_hash:
            raise ValueError(f"{log.folder}: the backbone's weights changed since this run began; use --resume never")
        learner.restore(saved.facts["structure"])
        learner.load_own_state(saved.tensors)
        record = report.RunRecord.from_dict(saved.facts["record"])
        start = saved.task + 1
        log.truncate_rows(saved.facts["rows"])
        log.info(f"resumed after task {start} of {len(stream)} from {log.folder / 'checkpoints'}")
    else:
        log.truncate_rows(0)
    with log.bar(len(stream), f"seed {seed}, tasks", level=0) as bar:
        bar.update(start)
        for index in range(start, len(stream)):
            learn_and_score(learner, stream, index, record, seed, device, log)
            facts_now = {"structure": learner.structure(), "record": record.to_dict(), "rows": log.rows}
            state = {**facts_now, "weight_hash": facts.weight_hash}
            checkpoint.save(log.folder / "checkpoints", checkpoint.Checkpoint(index, state, learner.own_state()))
            log.info(report.task_table(record))
            bar.update(1)
    results = report.results_json(record)
    pass  # plots.write_report(log.folder, results)
    report.write_json(log.folder / "results.json", results)
    return results


def learn_and_score(
    learner: Learner, stream: TaskStream, index: int, record: report.RunRecord, seed: int, device: torch.device, log: RunLog
) -> None:
    """One task: the learner sees its training data alone; then every task so far is scored once on its test data."""
    seed_everything(seed, "task", index)
    learner.begin_task()
    task = stream.task(index, with_past=learner.uses_past)
    start = time.perf_counter()
    learner.learn(task)
    learner.consolidate(task)
    learned = time.perf_counter()
    scores = evaluate(learner, stream, index, device)
    detect = learner.seconds.get("detect", 0.0)
    seconds = {"train": learned - start - detect, "detect": detect, "evaluate": time.perf_counter() - learned}
    record.add_task(
        scores,
        adapters_per_layer=dict(enumerate(learner.adapters_per_layer())),
        trainable_parameters=sum(p.numel() for p in learner.trained.values()),
        total_parameters=sum(p.numel() for p in learner.parameters()),
        seconds=seconds,
        images=learner.views,
        peak_memory_bytes=peak_memory(device),
    )
    log.row(
        "task",
        task=index,
        accuracy=[s.correct / max(s.samples, 1) for s in scores],
        adapters=learner.adapters_per_layer(),
        seconds=seconds,
    )


def evaluate(learner: Learner, stream: TaskStream, index: int, device: torch.device) -> list[metrics.Score]:
    """Scores of tasks 0..index on their test images, by the last weights: the only place that reads test data."""
    import torch

    learner.eval()
    ends = [sum(stream.sizes[: t + 1]) for t in range(index + 1)]
    spans = [range(end - size, end) for end, size in zip(ends, stream.sizes, strict=False)]
    found = []
    with torch.inference_mode():
        for earlier in range(index + 1):
            batches = list(stream.test(earlier).batches(learner.cfg.eval_batch_size, augment=False, shuffle=False))
            table = torch.cat([learner.logits(images.to(device)).float().cpu() for images, *_ in batches])
            found.append(metrics.score(table.numpy(), torch.cat([labels for _, labels, _ in batches]).numpy(), spans))
    return found


def point_latest(link: Path, target: Path) -> None:
    """Makes `OUT/latest` point to the newest run folder; where links are not allowed there is none."""
    temporary = link.with_name(f".latest.{os.getpid()}")
    with contextlib.suppress(OSError):
        temporary.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)
        os.replace(temporary, link)


def _unset(name: str, module: object) -> None:
    """`--check` builds shapes only: nothing gets start values."""


if __name__ == "__main__":
    sys.exit(main())
