"""A run folder as a learner again: `load` rebuilds the method of a finished or checkpointed run, ready for evaluation.

It only reads: a run that is still going on may be loaded too. Only main.py continues a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import models
from backbone import catalogue, weights
from backbone.vit import SlottedViT
from backbone.weights import BackboneFacts
from models.learner.base import Learner
from utils import data
from utils.config import resolve, schema
from utils.config.strict_json import read_json
from utils.data import manifest as data_manifest
from utils.data import recipe
from utils.data.dataset import Dataset
from utils.data.tasks import TaskStream
from utils.engines.settings import Cluster
from utils.run import checkpoint, provenance
from utils.run.log import RunLog
from utils.text import counted, nearest


@dataclass(frozen=True)
class SavedRun:
    """A run as its newest whole checkpoint has it.

    `task`: the last one learned (from 0); `record`: results so far, as `report.RunRecord.from_dict` reads them; `notes`: a
    line for each newer checkpoint that is damaged, and one if the data changed.
    """

    folder: Path
    learner: Learner
    stream: TaskStream
    task: int
    record: dict[str, Any]
    notes: list[str]


@dataclass(frozen=True)
class SavedModel:
    """What predicts: `learner.logits` of images as `recipe` makes them are scores of `classes`. `notes` should be said."""

    learner: Learner
    classes: list[str]
    recipe: recipe.Recipe
    notes: tuple[str, ...] = ()


def load(
    folder: Path | str, device: torch.device | None = None, data_root: str | None = None, log: RunLog | None = None
) -> SavedRun:
    """The learner and the tasks of the run in `folder` (OUT/<config name>/<settings hash>/seed_<seed>), on `device`, frozen
    and in evaluation mode as the end of a task left it.

    `data_root` replaces that of the run. Without `log` the learner can predict but not learn on.
    Raises ValueError if the folder is no run, has no whole checkpoint, or backbone weights, classes or the method's code are
    no longer those of the run; FileNotFoundError without its data."""
    folder = Path(folder)
    cfg = _settings(folder, data_root)
    saved, backbone, facts, notes = _newest(folder, cfg)
    dataset = data.load(cfg.dataset, **data.places(cfg), **data.reading(cfg))
    (seed,) = cfg.seed
    notes += _other_data(folder, dataset)
    stream = TaskStream.of(cfg, dataset, seed, facts.image_size, device)
    record = saved.facts["record"]
    if record["class_order"] != stream.order:
        raise ValueError(
            f"{folder}: the run had {len(record['class_order'])} classes in another order than the {len(stream.order)} of "
            f"{cfg.dataset} here; the data set has changed"
        )
    learner = _rebuilt(cfg, backbone.to(device or torch.device("cpu")), saved, log)
    stream.measure_workers(cfg, backbone, device or torch.device("cpu"))
    return SavedRun(folder, learner, stream, saved.task, record, notes)


def load_model(folder: Path | str, device: torch.device | None = None) -> SavedModel:
    """What predicts of the run in `folder`, as `load` has it, without its data. `folder` may also be one with a single finished
    run below it.

    Raises ValueError as `load` does, and for several runs."""
    folder = seed_folder(Path(folder))
    cfg = _settings(folder, None)
    saved, backbone, facts, notes = _newest(folder, cfg)
    learner = _rebuilt(cfg, backbone.to(device or torch.device("cpu")), saved, None)
    order = saved.facts["record"]["class_order"]
    recorded = provenance.read(folder)
    names = data.load(cfg.dataset, **data.places(cfg)).class_names if recorded is None else recorded.now.classes
    if tasks := len(saved.facts["record"]["task_classes"]) - saved.task - 1:
        notes.append(f"{folder}: {counted(tasks, 'task')} of the run {'is' if tasks == 1 else 'are'} not learned yet")
    how = recipe.of(data.DATASETS[cfg.dataset].transforms, facts.image_size, cfg.grey_bits)
    return SavedModel(learner, [names[k] for k in order[: learner.seen]], how, tuple(notes))


def seed_folder(folder: Path) -> Path:
    """`folder`, or the one finished run below it. Raises ValueError for several."""
    if (folder / "config.json").is_file() or not folder.is_dir():
        return folder
    finished = sorted(path.parent for path in folder.glob("**/seed_*/results.json"))
    if len(finished) > 1:
        shown = ", ".join(map(str, finished[:3])) + ", ..." * (len(finished) > 3)
        raise ValueError(f"{folder} holds {len(finished)} finished runs: name one, such as {shown}")
    return finished[0] if finished else folder


def _newest(folder: Path, cfg: schema.Experiment) -> tuple[checkpoint.Checkpoint, SlottedViT, BackboneFacts, list[str]]:
    """The newest whole checkpoint of the run, its backbone, and a line for each newer checkpoint that is damaged."""
    saved, notes = checkpoint.newest(folder / "checkpoints", learned=False)
    if saved is None:
        raise ValueError(
            "; ".join([f"{folder}: the run has no whole checkpoint, so no task of it is finished", *notes])
        )
    backbone, facts = weights.build(cfg)
    if facts.weight_hash != saved.facts["weight_hash"]:
        raise ValueError(
            f"{folder}: the run has backbone weights {saved.facts['weight_hash']}, "
            f"{cfg.backbone_type} ({facts.source}) here is {facts.weight_hash}"
        )
    (seed,) = cfg.seed
    provenance.Identity(facts.weight_hash, seed).refuse_others(saved.facts, folder / "checkpoints")
    return saved, backbone, facts, notes


def _rebuilt(cfg: schema.Experiment, backbone: SlottedViT, saved: checkpoint.Checkpoint, log: RunLog | None) -> Learner:
    """The learner of a checkpoint, frozen and in evaluation mode."""
    learner: Learner = models.build(cfg, backbone, len(saved.facts["record"]["class_order"]), cfg.seed[0], log)
    learner.restore(saved.facts["structure"])
    learner.load_own_state(saved.tensors)
    return learner.eval().requires_grad_(False)


def _other_data(folder: Path, dataset: Dataset) -> list[str]:
    """A line if the data are not those that the run was computed from."""
    try:
        if (recorded := provenance.read(folder)) is None:
            return []
        changes = provenance.data_differs(recorded.now, data_manifest.of(dataset), folder)
    except ValueError as error:
        return [f"{error}: whether the data changed since the run is not known"]
    what = changes.fatal or f"{len(changes.unread)} images changed" * bool(changes.unread)
    return [f"{folder}: the data changed since the run: {what}"] if what else []


def _settings(folder: Path, data_root: str | None) -> schema.Experiment:
    """The run's settings from its config.json, checked as an experiment's are; one seed."""
    path = folder / "config.json"
    if not path.is_file():
        seeds = sorted(str(p.parent) for p in folder.glob("**/seed_*/config.json")) if folder.is_dir() else []
        near = [str(p) for p in folder.parent.glob("*") if p.is_dir()] if folder.parent.is_dir() else []
        hint = f"; it holds the runs {', '.join(seeds[:3])}" if seeds else nearest(str(folder), near)
        raise ValueError(f"{folder} is no run folder: it has no config.json{hint}")
    values, faults = read_json(path)
    if data_root is not None:
        values["data_root"] = data_root
    cfg = checked(values, str(path), faults)
    if len(cfg.seed) != 1:
        raise ValueError(f"{path} names {len(cfg.seed)} seeds: it is an experiment file, not a run's, which has one")
    return cfg


def checked(values: dict[str, Any], source: str, faults: Sequence[str] = ()) -> schema.Experiment:
    """Settings from a file of this program, checked as an experiment's are."""
    return resolved(values, source, faults).settings


def resolved(values: dict[str, Any], source: str, faults: Sequence[str] = ()) -> resolve.Resolved:
    """The same with what was stated and the hash."""
    return resolve.resolve(
        values,
        source=source,
        settings_of=models.settings_of,
        methods=models.available(),
        backbones=catalogue.names,
        faults=faults,
        beside=Cluster,  # runs of older versions have its keys too
    )
