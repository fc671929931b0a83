"""`--tune`: chooses among a small space of settings on held-out training images of the first tasks, and writes what it chose.

No test image is opened. The chosen settings become an experiment file whose key `tuned` says what was tried, with every score.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commands import check, load
from utils.config.sweep import Cell, Sweep
from utils.config.tuning import Declared, Tuned
from utils.files import storage
from utils.text import clock, counted, printable, shell

if TYPE_CHECKING:
    import torch

    from utils.data.dataset import Dataset
    from utils.data.tasks import TaskStream

Score = dict[str, float]  # average and last accuracy in percent, seconds


def run(args: argparse.Namespace) -> int:
    swept, declared = load.space(args)
    check.ready(swept, "local")
    for note in swept.gather([cell.resolved.notes for cell in swept.cells]):
        print(printable(f"note: {note}"))
    path = tune(swept, declared, args.out, args.config.stem)
    print(printable(f"\nwritten: {path}\nrun it: {shell(['python', 'main.py', '--config', str(path)])}"))
    return 0


def tune(swept: Sweep, declared: Declared, out: Path, stem: str) -> Path:
    """Scores every cell with every seed, prints a line for each, and writes the experiment file of the best one.

    Raises ValueError where nothing can be held out, or a setting selects on test data."""
    from utils.data import held_out
    from utils.data import manifest as data_manifest

    first = swept.cells[0].resolved
    device, _ = load.machine(first)
    whole = held_out.training_alone(load.read_data(first, training_only=True))
    dataset, part = held_out.split(whole, declared.held_out)
    seeds = declared.seeds or list(swept.seeds[:1])
    tasks = _tasks_of(swept, declared, dataset, seeds, held_out.without_held_out(whole))
    head = (
        f"{counted(len(swept.cells), 'setting')} of {counted(len(seeds), 'seed')}, {counted(tasks, 'task')} of each, "
    )
    print(f"{head}scored on {part['images']:,} held-out training images of the set", flush=True)
    scores: list[dict[int, Score]] = []
    weights = ""
    for cell in swept.cells:
        scores.append({})
        for seed in seeds:
            scores[-1][seed], weights = score(cell, dataset, seed, tasks, device)
        print(printable(f"  {_line(scores[-1])}  {cell.label}"), flush=True)
    best = max(range(len(scores)), key=lambda k: _mean(scores[k], "average"))  # of equals the first
    print(printable(f"best average: {_line(scores[best])}  {swept.cells[best].label}"))
    facts = {"data": data_manifest.of(whole).digest, "weights": weights, "held_out": part}
    tuned = provenance(swept, declared, scores, best, tasks, seeds, facts)
    return _write(swept, swept.cells[best], tuned, out, stem)


def score(cell: Cell, dataset: Dataset, seed: int, tasks: int, device: torch.device) -> tuple[Score, str]:
    """Accuracies on the held-out images after the first `tasks` tasks of a run of `seed`, and the hash of the weights."""
    import models
    from utils.evaluation import metrics, scores
    from utils.run import task
    from utils.run.journal import Journal
    from utils.run.log import RunLog

    cfg = cell.resolved.settings
    backbone, known = load.backbone(cfg)
    stream = _stream(cell, dataset, seed, known.image_size, device)
    curve: list[float | None] = []
    with tempfile.TemporaryDirectory() as folder, RunLog(Path(folder) / "run", console=False) as log:
        learner = models.build(cfg, backbone.to(device), len(stream.order), seed, log)
        if learner.uses_test:
            raise ValueError(f"{cell.label}: this setting selects on test data, and --tune reads none; leave it out")
        seconds = 0.0
        for index in range(tasks):
            seconds += task.learn(learner, stream, index, seed, Journal())["seconds"]["train"]
            counts, _ = scores.evaluate(learner, stream, index, device)
            curve.append(sum(s.correct for s in counts) / sum(s.samples for s in counts))
    average, last = metrics.average_accuracy(curve) or 0.0, metrics.last_accuracy(curve) or 0.0
    return {"average": 100 * average, "last": 100 * last, "seconds": seconds}, known.weight_hash


def _stream(cell: Cell, dataset: Dataset, seed: int, image_size: int, device: torch.device) -> TaskStream:
    from utils.data.tasks import TaskStream

    return TaskStream.of(cell.resolved.settings, dataset, seed, image_size, device)


def _tasks_of(swept: Sweep, declared: Declared, dataset: Dataset, seeds: Sequence[int], alone: set[int]) -> int:
    """How many tasks are learned. ValueError if a class in them has no image to hold out."""
    import torch

    tasks = 0
    for seed in seeds:
        stream = _stream(swept.cells[0], dataset, seed, 32, torch.device("cpu"))
        tasks = min(declared.tasks or len(stream), len(stream))
        if lacking := sorted(alone.intersection(stream.order[: sum(stream.sizes[:tasks])])):
            names = ", ".join(dataset.class_names[label] for label in lacking[:5])
            raise ValueError(
                f"{names}: a class of one training image has none to hold out; --tune needs two of each class"
            )
    return tasks


def provenance(
    swept: Sweep,
    declared: Declared,
    scores: Sequence[Mapping[int, Score]],
    best: int,
    tasks: int,
    seeds: Sequence[int],
    facts: Mapping[str, Any],
) -> Tuned:
    """The key `tuned` of the file: what was tried and what came out; every setting by the values of its keys."""
    from utils.process.machine import environment

    def chosen(cell: Cell) -> dict[str, Any]:
        return {key: _in(cell, key) for key in declared.space}

    git = environment()["git"] or {"commit": None, "dirty": False}
    rows = [
        {"setting": chosen(cell)}
        | {key: {str(seed): round(of_seed[key], 4) for seed, of_seed in of.items()} for key in ("average", "last")}
        for cell, of in zip(swept.cells, scores, strict=True)
    ]
    return Tuned(
        space=declared.space,
        chosen=chosen(swept.cells[best]),
        scores=rows,
        tasks=tasks,
        seeds=list(seeds),
        commit=git["commit"],
        changed=git["dirty"],
        **facts,
    )


def _in(cell: Cell, key: str) -> Any:
    """The value of a key of the space in a cell, by whichever name it was written."""
    from utils.config import common_names

    settings = cell.resolved.settings
    value = getattr(settings, common_names.of(type(settings).model_fields).get(key, key), None)
    return list(value) if isinstance(value, tuple) else value


def _write(swept: Sweep, cell: Cell, tuned: Tuned, out: Path, stem: str) -> Path:
    """Writes OUT/STEM/tune_HASH/STEM_tuned.json: the file with the chosen values, without its expected numbers."""
    values = {key: value for key, value in cell.values.items() if key not in ("expected", "about", "tuned")}
    about = str(cell.values.get("about", ""))
    chosen = json.dumps(tuned.chosen, ensure_ascii=False)
    tried = (
        f"Chosen by --tune: {chosen}, the best of {counted(len(swept.cells), 'setting')} on held-out training images."
    )
    digest = hashlib.sha256(json.dumps([swept.hash, tuned.tasks, tuned.seeds, tuned.held_out]).encode()).hexdigest()[
        :12
    ]
    path = out / stem / f"tune_{digest}" / f"{stem}_tuned.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_json(path, {"about": f"{about} {tried}".strip(), **values, "tuned": tuned.model_dump(mode="json")})
    return path


def _mean(scores: Mapping[int, Score], key: str) -> float:
    return sum(of[key] for of in scores.values()) / len(scores)


def _line(scores: Mapping[int, Score]) -> str:
    average, last, seconds = (_mean(scores, key) for key in ("average", "last", "seconds"))
    return f"average {average:6.2f}  last {last:6.2f}  {clock(seconds):>6}"
