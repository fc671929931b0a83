"""What the studies share: an arm is trained once a seed, every head is scored on the same features, differences are paired.

A run is stored as one small JSON file, so that a study can be stopped and started; the runs that are part of the repository
are in a .jsonl beside the study.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from utils.evaluation.metrics import paired_difference, summarise

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (1993, 1994, 1995, 1996, 1997)
RANDOM = "_random"  # the same data over an untrained backbone, where adapters have more to gain
HEADS = ("linear", "ncm", "ridge")

Run = dict[str, Any]
Key = tuple[str, str, int]  # set, arm, seed


def shipped(model: str, name: str) -> dict[str, Any]:
    """The experiment file of a method on a set; over an untrained backbone all layers have adapters."""
    values: dict[str, Any] = json.loads((ROOT / "exps" / f"{model}_{name.removesuffix(RANDOM)}.json").read_text())
    values.pop("expected", None)  # its numbers are not a setting
    if name.endswith(RANDOM):
        values["backbone_weights"] = "random"
        if "adapt_start_layer" in values:
            values["adapt_start_layer"] = 0
    return values


@cache
def dataset(name: str) -> Any:
    from utils import data

    return data.load(name)


def train(values: Mapping[str, Any], seed: int, facts: Callable[[Any, list[Any]], Run], *, drift: bool) -> Run:
    """Learns all tasks with the linear head and the ridge head's statistics, and scores all heads after the last task.

    `facts(learner, rows of metrics.jsonl)` adds the numbers of one study. `drift`: also score statistics recomputed on
    the final features."""
    import torch

    import models
    from backbone import catalogue, weights
    from utils.config import resolve
    from utils.data.tasks import TaskStream
    from utils.process.seeds import seed_everything
    from utils.run.log import RunLog

    torch.set_num_threads(1)
    values = dict(values) | {"head": "ridge", "head_projection_dim": None, "head_drift": False, "seed": [seed]}
    cfg = resolve.resolve(
        values, source="arm", settings_of=models.settings_of, methods=models.available(), backbones=catalogue.names
    ).settings
    backbone, known = weights.build(cfg)
    stream = TaskStream.of(cfg, dataset(cfg.dataset), seed, known.image_size)
    with tempfile.TemporaryDirectory() as folder, RunLog(Path(folder) / "run", console=False) as log:
        started, bare = time.perf_counter(), sum(p.numel() for p in backbone.parameters())
        learner: Any = models.build(cfg, backbone, len(stream.order), seed, log)
        trained = []
        for index in range(len(stream)):
            seed_everything(seed, "task", index)
            learner.begin_task()
            task = stream.task(index, with_past=learner.uses_past, with_test=learner.uses_test)
            learner.learn(task)
            learner.consolidate(task)
            trained.append(sum(p.numel() for p in learner.trained.values()))
        rows = [json.loads(line) for line in (log.folder / "metrics.jsonl").read_text().splitlines()]
        result = {"last": last_accuracy(learner, stream), "trained": trained, "adapters": learner.adapters_per_layer()}
        head = getattr(learner, "head", None)
        heads = sum(p.numel() for p in head.parameters()) if head is not None else 0
        result["added"] = sum(p.numel() for p in learner.parameters()) - bare - heads
        result |= facts(learner, rows)
        if drift:
            result["recomputed"] = recomputed(learner, stream)
    return result | {"seconds": time.perf_counter() - started}


def heads_of(learner: Any) -> dict[str, Any]:
    """Functions from features to scores: the trained head, if there is one, and nearest mean and ridge of the statistics."""
    from backbone.heads.heads import StatisticsHead

    ridge = learner.statistics
    ncm = StatisticsHead("ncm", ridge.sums.shape[1], ridge.sums.shape[0])
    ncm.counts.copy_(ridge.counts)
    ncm.sums.copy_(ridge.sums)
    ncm.solve()
    heads = {"linear": getattr(learner, "head", None), "ncm": ncm, "ridge": ridge}
    return {name: head for name, head in heads.items() if head is not None}


def last_accuracy(learner: Any, stream: Any) -> dict[str, float]:
    """Accuracy over all test images, as a fraction, of every head; one pass over the images."""
    import torch

    learner.eval()
    heads = heads_of(learner)
    right, count = dict.fromkeys(heads, 0), 0
    with torch.inference_mode():
        for index in range(len(stream)):
            for images, labels, *_ in stream.test(index).batches(256, augment=False, shuffle=False):
                features = learner.features(images)
                count += len(labels)
                for head, scores in heads.items():
                    right[head] += int((scores(features)[:, : learner.seen].argmax(1) == labels).sum())
    return {head: hits / count for head, hits in right.items()}


def recomputed(learner: Any, stream: Any) -> dict[str, float]:
    """Last accuracy of nearest mean and ridge with statistics of all training images recomputed on the final features."""
    learner.statistics.clear()
    for index in range(len(stream)):
        learner.statistics.add(*learner.features_of(stream.task(index).train))
    learner.statistics.solve()
    accuracies = last_accuracy(learner, stream)
    return {head: accuracies[head] for head in ("ncm", "ridge")}


# Many runs, and tables of them ----------------------------------------------------------------------------------------


def fingerprint(values: Mapping[str, Any]) -> str:
    """Twelve hex digits of an arm's settings, without `about` and the seeds."""
    settings = {k: v for k, v in values.items() if k not in ("about", "seed")}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def run_all(
    worker: Callable[[str, str, int], Run],
    values_of: Callable[[str, str], Mapping[str, Any]],
    keys: Iterable[Key],
    args: argparse.Namespace,
    stored: Path,
) -> dict[Key, Run]:
    """`worker(arm, set, seed)` for every key, `args.jobs` at a time on one thread each; {key: run} of those that are done.

    Skips runs whose file is in `args.out`, and with `args.kept` those in the .jsonl `stored`, unless they have other settings
    than `values_of(arm, set)` returns now. `worker` must be a function at the top of its module. A run that fails is reported
    and left out."""
    wanted = list(keys)
    prints = {key: fingerprint(values_of(key[1], key[0])) for key in wanted}
    known = {key_of(r): r for r in read(stored)} if args.kept else {}
    results = {key: run for key in wanted if (run := known.get(key)) and run["settings"] == prints[key]}
    os.environ["OMP_NUM_THREADS"] = "1"  # for the workers, which are new processes
    names = {key: f"{_stem(key[1])}_{key[2]}_{prints[key]}.json" for key in wanted}
    todo = {key: args.out / key[0] / names[key] for key in wanted if key not in results}
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        waiting = {k: pool.submit(worker, k[1], k[0], k[2]) for k, path in todo.items() if not path.is_file()}
        for key, path in todo.items():
            if (job := waiting.get(key)) is not None:
                try:
                    run = {"set": key[0], "arm": key[1], "seed": key[2], "settings": prints[key], **job.result()}
                except Exception as error:
                    print(f"{', '.join(map(str, key))}: {error}", file=sys.stderr)
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(run))
                print(f"{', '.join(map(str, key))}: {run['seconds']:.0f} s", file=sys.stderr, flush=True)
            results[key] = json.loads(path.read_text())
    return {key: results[key] for key in wanted if key in results}


def keep(results: Mapping[Key, Run], path: Path) -> None:
    """Adds the runs to those in `path`, or replaces them, one a line, without their seconds, which depend on the load of the
    machine."""
    runs = {key_of(run): run for run in read(path)} | dict(results)
    lines = (json.dumps({k: v for k, v in run.items() if k != "seconds"}) for run in runs.values())
    path.write_text("".join(f"{line}\n" for line in lines))


def read(path: Path) -> list[Run]:
    """The runs in a .jsonl; none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def key_of(run: Run) -> Key:
    return run["set"], run["arm"], run["seed"]


def _stem(arm: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in arm)


def cell(values: Iterable[float | None], digits: int = 1) -> str:
    """Mean ± standard deviation over seeds; '-' without values."""
    summary = summarise(values)
    if summary.mean is None:
        return "-"
    return f"{summary.mean:.{digits}f}" + (f" ± {summary.std:.{digits}f}" if summary.std is not None else "")


def by_arm(results: Mapping[Key, Run], name: str, arms: Sequence[str]) -> dict[str, dict[int, Run]]:
    """{arm: {seed: run}} of one set, without arms that have no run."""
    runs_of = {arm: {k[2]: r for k, r in results.items() if k[:2] == (name, arm)} for arm in arms}
    return {arm: runs for arm, runs in runs_of.items() if runs}


def differences(runs: Mapping[str, Mapping[int, Run]], references: Sequence[str]) -> str:
    """Markdown: each arm minus each reference, for each head on the same seeds, in percentage points of last accuracy with a
    95 % interval."""
    references = [arm for arm in references if arm in runs]
    head = ["difference in last accuracy", *(f"{h} - {arm}" for arm in references for h in HEADS)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for arm, of_arm in runs.items():
        row = [arm]
        for reference in references:
            for kind in HEADS:
                accuracy, other = (
                    {s: 100 * r["last"][kind] for s, r in seeds.items() if kind in r["last"]}
                    for seeds in (of_arm, runs[reference])
                )
                d = paired_difference(accuracy, other)
                text = "-" if d.mean is None else f"{d.mean:+.1f}"
                row.append(text if d.low is None or arm == reference else f"{text} [{d.low:+.1f}, {d.high:+.1f}]")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def parser(doc: str, sets: Sequence[str], arms: Sequence[str], out: str) -> argparse.ArgumentParser:
    """The options of every study."""
    ask = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    ask.add_argument("--sets", nargs="+", choices=sets, default=sets)
    ask.add_argument(
        "--arms", nargs="+", choices=arms, default=arms, metavar="ARM", help=f"arms among {', '.join(arms)}"
    )
    ask.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    ask.add_argument("--out", type=Path, default=Path("logs/benchmarks") / out)
    ask.add_argument("--kept", action="store_true", help="use the runs stored in the repository")
    ask.add_argument("--keep", action="store_true", help="store these runs in the repository, for --kept")
    return ask
