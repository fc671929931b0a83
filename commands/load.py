"""What a run needs before it starts: the checked experiment, the machine, the data and the backbone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import models
from backbone import catalogue
from utils.config import common_names, nested_lora_files, pilot_files, resolve, strict_json, sweep, tuning
from utils.config.resolve import Resolved
from utils.config.schema import Experiment
from utils.engines.settings import Cluster
from utils.process import machine as this_machine
from utils.process import parallel
from utils.text import shortened

SMALL_RUN = 1.2 * 2**30  # bytes that a run with the embedded backbone takes, page included

if TYPE_CHECKING:
    import torch

    from backbone.vit import SlottedViT
    from backbone.weights import BackboneFacts
    from models.learner.base import Learner
    from utils.data.dataset import Dataset


def load(args: argparse.Namespace) -> sweep.Sweep:
    """The experiment file with the overrides of the command line, checked in full before anything heavy is imported.

    A file without `sweep` has one cell. Raises ConfigError with every fault."""
    return _read(args, None)[0]


def space(args: argparse.Namespace) -> tuple[sweep.Sweep, tuning.Declared]:
    """A cell for each setting that --tune is to try, and what the file and the flag say of the search."""
    return _read(args, args.tune)


def _read(args: argparse.Namespace, tried: Sequence[str] | None) -> tuple[sweep.Sweep, tuning.Declared]:
    """The cells of the file's sweep or, with the words `tried` of --tune, of its space; and what the file says of that."""
    values_of_file, faults = strict_json.read_json(args.config)
    values, notes, older = pilot_files.translate(values_of_file)
    values, more_notes, more_older = nested_lora_files.translate(values)
    notes, older = [*notes, *more_notes], [*older, *more_older]
    overrides, more = strict_json.parse_set(args.set)
    overrides |= {k: v for k in ("data_root", "device") if (v := getattr(args, k)) is not None}
    methods = models.available()
    method = overrides.get("model_name", values.get("model_name"))
    fields = models.settings_of(method).model_fields if method in methods else {}
    values = common_names.over(values, overrides, fields)
    more += [fault for key in ("data_root", "device") for fault in strict_json.strange(key, getattr(args, key))]
    spec = values.pop("sweep", None)
    tune, faults_of_tune = tuning.declared(values.pop("tune", None), tried or ())
    more += faults_of_tune
    if tried is not None:
        if spec is not None:
            more.append("sweep: --tune has its space in the place of a sweep; leave it out with --set sweep=null")
        if not tune.space and not faults_of_tune:
            more.append(
                'tune: a space is needed, as --tune init_lr=[0.01,0.02] or "tune": {"space": {...}} in the file'
            )
        spec = tune.space or None
    source = " ".join([str(args.config), *(f"--set {shortened(text, 200)}" for text in args.set)])

    def resolve_one(values: dict[str, Any], notes_of_cell: Sequence[str] = ()) -> Resolved:
        try:
            return resolve.resolve(
                values,
                source=source,
                settings_of=models.settings_of,
                methods=methods,
                backbones=catalogue.names,
                faults=faults + older + more,
                notes=[*notes, *notes_of_cell],
                beside=Cluster,
            )
        except strict_json.ConfigError as error:
            written = values_of_file | overrides
            texts = [nested_lora_files.as_written(fault, written) for fault in error.faults]
            raise strict_json.ConfigError(source, texts) from None

    cells = sweep.resolve(
        spec, values, source, overrides, resolve_one, models.settings_of, methods, Cluster.model_fields
    )
    return cells, tune


def is_one_run(loaded: sweep.Sweep, args: argparse.Namespace) -> bool:
    """Whether this process runs the experiment itself, seed after seed, instead of starting a process for every run.

    Sets `args.jobs` where the command line does not. Raises ValueError under torchrun where it would start processes."""
    if args.jobs is None:
        args.jobs = jobs_by_default(loaded, args)
    if not (loaded.declared or args.jobs > 1 or args.engine != "local"):
        return True
    if parallel.torchrun_ranks()[1] > 1:
        raise ValueError("torchrun computes one run: a sweep, --jobs and --engine start their processes without it")
    return False


def jobs_by_default(loaded: sweep.Sweep, args: argparse.Namespace) -> int:
    """Runs at a time without --jobs: one for each core this process may use, as far as runs are left and the memory has room,
    where all are small; else 1. A profiled run has the machine for itself."""
    if args.engine != "local" or args.profile or parallel.torchrun_ranks()[1] > 1:
        return 1
    folders = (cell.run_folder(args.out, args.config.stem, seed) for cell in loaded.cells for seed in loaded.seeds)
    left = sum(args.resume == "never" or not (folder / "results.json").exists() for folder in folders)
    most = min(left, this_machine.cores())
    if most < 2 or not all(is_small(cell.resolved.settings) for cell in loaded.cells):
        return 1
    free = this_machine.free_memory()
    return max(1, most if free is None else min(most, int(free // SMALL_RUN)))


def is_small(cfg: Experiment) -> bool:
    """Whether one thread is the fastest way to compute a run: the embedded backbone on the CPU."""
    if cfg.backbone_type != catalogue.EMBEDDED or cfg.device.startswith("cuda"):
        return False
    if cfg.device == "cpu":
        return True
    import torch

    return not torch.cuda.is_available()


def machine(experiment: Resolved) -> tuple[torch.device, list[str]]:
    """The device to compute on, and the notes that every run logs. Raises ValueError where something is missing here."""
    from utils.run import tracker

    this_machine.check_torchvision()
    this_machine.flush_denormals()
    if is_small(experiment.settings):
        this_machine.use_one_thread()
    if missing := tracker.missing(experiment.settings.tracker):
        raise ValueError(missing)
    device, warning = parallel.start(experiment.settings.device)
    return device, [*experiment.notes, *([warning] if warning else [])]


def outline(resolved: Resolved, count: int) -> Learner:
    """The method over the backbone's shapes alone: finds in a moment what does not fit, and counts parameters."""
    import torch

    from backbone import weights

    cfg = resolved.settings
    backbone, _ = weights.build(cfg, with_weights=False)
    try:
        with torch.device("meta"):  # nothing is allocated and nothing gets start values
            return models.build(cfg, backbone, count, 0, None)
    except ValueError as error:
        raise ValueError(f"{error} (backbone_type {cfg.backbone_type})") from None


def read_data(experiment: Resolved, training_only: bool = False) -> Dataset:
    """The data set as `data.load` gives it; reading many images shows a bar. With `training_only` no test image is opened."""
    from utils import data
    from utils.run import progress

    cfg = experiment.settings
    with progress.of_images() as bar:
        return data.load(
            cfg.dataset, **data.places(cfg), **data.reading(cfg), progress=bar, training_only=training_only
        )


def dataset(experiment: Resolved) -> Dataset:
    """The data set; before it is read, the method is built on shapes alone, which shows in a moment what does not fit."""
    from utils import data

    cfg = experiment.settings
    if (count := data.count_classes(cfg.dataset, **data.places(cfg))) is not None:
        outline(experiment, count)
    return parallel.first_rank_first(lambda: read_data(experiment))


def backbone(cfg: Experiment) -> tuple[SlottedViT, BackboneFacts]:
    """The backbone with its weights and what is known of them; the first rank fetches what the others then find."""
    from backbone import weights

    return parallel.first_rank_first(lambda: weights.build(cfg))
