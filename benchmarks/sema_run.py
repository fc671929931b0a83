"""A whole SEMA run, the plain way and ours, with the same epochs: `python -m benchmarks.sema_run`.

The plain way is `benchmarks/plain_sema.py`, which behaves as the authors' code does. Ours is the shipped learner with
everything that a run does (learning, scoring, checkpoints, logs), with more and more of the keys that a user sets for speed:
- faithful: the defaults, which learn the same as the plain way up to rounding;
- rd_views: descriptors train on the mean tokens of that many stored views of each image;
- rd_views, train_views: adapters train on stored views too, so that later epochs and scans begin at the layers that may expand.
Stored views change the draws of augmentation, hence results, by noise. Expansion is fixed and equal in all ways: one layer in
each later task, from the lowest up; scans and their scores are computed all the same. Each run has a separate process, one
after the other; times are of the whole run without building data and network, memory is the process's peak above what it had
before. Data: handwritten digits for the embedded backbone, else generated patterns of the network's size.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

import models
from backbone import weights
from backbone.vit import SlottedViT
from benchmarks import measure, plain_sema
from benchmarks.plain_sema import Outcome, Plan
from benchmarks.routing import CLOCKS, MIB
from models.learner.start_values import SeededInit
from utils import data
from utils.data.dataset import Dataset
from utils.data.images import ImageArray
from utils.data.tasks import TaskStream
from utils.process.machine import peak_memory
from utils.report.results import load_rows
from utils.run import checkpoint
from utils.run import record as run_record
from utils.run import task as run_task
from utils.run.journal import NOBODY
from utils.run.log import RunLog

SEED, CPU = 1993, torch.device("cpu")


class Ran(NamedTuple):
    seconds: float
    peak: int
    outcome: Outcome


def patterns(classes: int, train: int, test: int, side: int) -> Dataset:
    """Each class is a coarse random picture; its images are that picture with noise."""
    rng = np.random.default_rng(0)
    centres = rng.uniform(40, 215, (classes, 3, 7, 7)).repeat(side // 7, axis=2).repeat(side // 7, axis=3)

    def draw(count: int) -> ImageArray:
        labels = np.repeat(np.arange(classes), count)
        noisy = centres[labels] + rng.normal(0, 40, (len(labels), *centres.shape[1:]))
        return ImageArray(noisy.clip(0, 255).astype(np.uint8), labels)

    return Dataset("patterns", [str(c) for c in range(classes)], draw(train), draw(test), "small")


def digits(classes: int, train: int, test: int) -> Dataset:
    """The first images of each handwritten digit."""
    whole = data.load("digits", root=Path(), path=None, test_ratio=0.2)

    def first(images: Any, count: int) -> ImageArray:
        rows = np.concatenate([np.flatnonzero(images.labels == c)[:count] for c in range(classes)])
        return ImageArray(images.images[torch.from_numpy(rows)].numpy(), images.labels[rows])

    return replace(
        whole,
        class_names=whole.class_names[:classes],
        train=first(whole.train, train),
        test=first(whole.test, test),
    )


def ours(
    cfg: Any, backbone: SlottedViT, stream: TaskStream, init: Any, plan: Plan | None = None
) -> tuple[Any, Outcome]:
    """All tasks of a stream by the shipped learner, as a run does it."""
    with tempfile.TemporaryDirectory() as name, RunLog(Path(name), console=False) as log:
        learner: Any = models.learner_of("sema")(cfg, backbone, len(stream.order), init, log)
        classes = [[stream.order[c]] for c in range(len(stream.order))]
        record = run_record.RunRecord("sema", cfg.dataset, SEED, stream.order, classes)
        task = 0
        real: Callable[[torch.Tensor], dict[int, torch.Tensor]] = learner._layer_scores

        def planned(shifts: torch.Tensor) -> dict[int, torch.Tensor]:
            scores = real(shifts)
            if plan is None:
                return scores
            return {n: torch.full_like(s, 1e9 * (n in plan.get(task, ()))) for n, s in scores.items()}

        learner._layer_scores = planned
        for task in range(len(stream)):
            journal = checkpoint.journal_of(log.folder, task, log, NOBODY)
            journal.open(log.rows)
            measured = run_task.learn(learner, stream, task, SEED, journal)
            checkpoint.save(log.folder, task, learner, record.to_dict(), log, NOBODY, measured)
            run_task.score(learner, stream, task, record, measured)
            checkpoint.save(log.folder, task, learner, record.to_dict(), log, NOBODY)
        losses = [row["loss"] for row in load_rows(log.folder / "metrics.jsonl") if row["kind"] == "epoch"]
        right = [sum(correct) / sum(record.samples[: t + 1]) for t, correct in enumerate(record.correct)]
        return learner, Outcome(losses, right)


def settings(args: dict[str, Any], **keys: Any) -> Any:
    values = {k: args[k] for k in ("func_epoch", "rd_epoch", "batch_size", "rd_dim")}
    common = {"model_name": "sema", "dataset": "digits", "init_cls": args["increment"], "increment": args["increment"]}
    return models.settings_of("sema").model_validate(
        common | values | {"init_lr": 0.005, "rd_lr": 0.01, "prefix_cache_gb": 16.0, "eval_batch_size": 32} | keys
    )


def one_run(args: dict[str, Any], keys: dict[str, Any] | None) -> Ran:
    """Builds data and network, then times a run with these keys, or the plain way if `keys` is None."""
    torch.set_num_threads(args["threads"])
    cfg, classes = settings(args, **(keys or {})), args["tasks"] * args["increment"]
    if args["model"] == "embedded":
        backbone, facts = weights.build(cfg)
        dataset, side = digits(classes, args["images"], args["test_images"]), facts.image_size
    else:
        vit = measure.random_vit(args["model"], args["image_size"])
        backbone, side = SlottedViT(vit), vit.patch_embed.img_size[0]
        dataset = patterns(classes, args["images"], args["test_images"], side)
    stream = TaskStream(dataset, init_cls=args["increment"], increment=args["increment"], seed=SEED, image_size=side)
    top = backbone.depth
    plan = {t: [top - 3 + (t - 1) % 3] for t in range(1, args["tasks"])} if args["expansions"] else {}
    clock, before = CLOCKS[args["clock"]], peak_memory()
    way = plain_sema.run if keys is None else ours
    start = clock()
    outcome = way(cfg, backbone, stream, SeededInit(SEED), plan)[1]
    return Ran(clock() - start, peak_memory() - before, outcome)


def compare(args: dict[str, Any]) -> dict[str, list[Ran]]:
    """Runs every way in turn, in each round; the first is the plain one."""
    views = {"rd_views": args["views"]}
    ways: dict[str, dict[str, Any] | None] = {
        "plain": None,
        "ours, faithful": {},
        f"ours, rd_views {args['views']}": views,
        f"ours, rd_views and train_views {args['views']}": views | {"train_views": args["views"]},
    }
    runs: dict[str, list[Ran]] = {name: [] for name in ways}
    spawn = multiprocessing.get_context("spawn")
    for _ in range(args["rounds"]):
        for name, keys in ways.items():
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:  # a new process: its peak is this run's
                runs[name].append(pool.submit(one_run, args, keys).result())
            print(f"{name}: {runs[name][-1].seconds:.1f} s", flush=True)
    return runs


def table(ways: dict[str, list[Ran]]) -> str:
    lines = ["| way | median, s | times faster | peak, MiB | last accuracy, % |", "|---|---|---|---|---|"]
    first = next(iter(ways.values()))
    for name, runs in ways.items():
        faster = "-" if runs is first else f"{speedup(first, runs):.2f}x"
        peak, last = max(run.peak for run in runs) / MIB, runs[0].outcome.accuracy[-1]
        lines.append(
            f"| {name} | {median(run.seconds for run in runs):.1f} | {faster} | {peak:.0f} | {100 * last:.1f} |"
        )
    return "\n".join(lines)


def speedup(first: list[Ran], runs: list[Ran]) -> float:
    return median(a.seconds / b.seconds for a, b in zip(first, runs, strict=True))


def main() -> None:
    sizes: dict[str, int | str] = {"model": "embedded", "image_size": 224, "tasks": 5, "increment": 2}
    sizes |= {"images": 40, "test_images": 30, "func_epoch": 5, "rd_epoch": 20, "batch_size": 32, "rd_dim": 32}
    ask = measure.arguments(__doc__ or "", **sizes, views=1, expansions=1)
    ask.set_defaults(rounds=1)
    args, device = measure.begin(ask)
    assert device == CPU, "the processes of the runs measure the CPU"
    start = time.perf_counter()
    ways = compare(vars(args))
    print("\n" + table(ways) + f"\n\n{time.perf_counter() - start:.0f} s of wall clock in all\n")
    first, *others = ways.items()
    for name, runs in others:
        print(measure.verdict(name, speedup(first[1], runs), 6))


if __name__ == "__main__":
    main()
