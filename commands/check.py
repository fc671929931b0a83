"""`--check`: what a run would do, before it starts: settings, tasks, parameters, and what is missing on this machine.

Nothing is trained: the method is built over the backbone's shapes alone, which shows in a moment what does not fit.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence

from commands import check_data, load
from commands import check_tables as tables
from utils import data, engines
from utils.config import sweep
from utils.config.resolve import Resolved
from utils.config.schema import Experiment
from utils.process.machine import check_torchvision, missing_device
from utils.run import tracker
from utils.text import printable


def run(args: argparse.Namespace) -> int:
    check(load.load(args), args.engine, args.check)
    return 0


def check(loaded: sweep.Sweep, engine: str = "local", how: str = "short") -> None:
    """Shows what a run would do and what it lacks on this machine; of a sweep the first cell, and a line for each.

    `how`: short: what differs from the defaults, and the first and last of many tasks; headers: every key with its
    meaning and every task; all: the same, with a measured step; full: as headers, and every image is decoded.
    Raises ConfigError with everything that a run would refuse."""
    full = how == "full"
    check_torchvision()
    cells, look = loaded.cells, functools.cache(lambda cfg: check_data.look(cfg, full))
    found = [look(_data_settings(cell.resolved.settings)) for cell in cells]
    planned, faults = _fitted(loaded)
    for faults_of_cell, cell, seen in zip(faults, cells, found, strict=True):
        faults_of_cell += [*seen.faults, *weights_of(cell.resolved)[1], *machine_faults(cell.resolved, engine)]
    if not any(faults[0]) or not found[0].faults:
        show(cells[0].resolved, found[0], short=how == "short")
        if how == "all" and not any(faults[0]):
            _tell_estimate(cells[0].resolved, found[0])
    if loaded.declared:
        print(f"the above is cell 1 of {len(cells)}")
        rows = [(cell.label, cell.resolved.hash, count) for cell, count in zip(cells, planned, strict=True)]
        print(printable(tables.cell_table(rows, len(loaded.seeds))))
    missing = [[*seen.missing, *missing_weights(cell.resolved)] for seen, cell in zip(found, cells, strict=True)]
    notes = []
    for cell, seen, texts in zip(cells, found, missing, strict=True):
        resolved = cell.resolved
        remarks = [
            *foreseen(resolved, seen.images),
            *weights_of(resolved)[0],
            *engines.remarks(engine, resolved.all_values),
        ]
        notes.append([*resolved.notes, *remarks, *seen.notes, *texts])
    print(printable("\n".join(f"note: {line}" for line in loaded.gather(notes))))
    loaded.refuse(faults)
    print("the settings are valid" + ("; what is missing on this machine is listed above" if any(missing) else ""))


def ready(swept: sweep.Sweep, engine: str) -> None:
    """ConfigError if a cell does not fit its backbone or lacks data, weights or device: said before the first run begins."""
    _, faults = _fitted(swept)
    for faults_of_cell, cell in zip(faults, swept.cells, strict=True):
        lacking = data.missing(cell.resolved.settings.dataset, **data.places(cell.resolved.settings))
        faults_of_cell += [
            *([lacking] if lacking else []),
            *weights_of(cell.resolved)[1],
            *missing_weights(cell.resolved),
        ]
        faults_of_cell += machine_faults(cell.resolved, engine)
    swept.refuse(faults)


def show(resolved: Resolved, found: check_data.DataFound, short: bool = False) -> None:
    """Settings, weights, and where the data are here also classes, tasks and parameters."""
    from utils.data.tasks import task_sizes

    cfg = resolved.settings
    if short:
        print(printable(f"{tables.difference_table(resolved.stated, type(cfg).defaults())}\n{sources(cfg)}"))
    else:
        print(printable(tables.settings_table(resolved.stated, resolved.given, resolved.descriptions())))
    if found.table:
        print(printable(found.table))
    if (count := data.count_classes(cfg.dataset, **data.places(cfg))) is None:
        return
    order, source = class_order(cfg, count)
    sizes = task_sizes(count, cfg.init_cls, cfg.increment)
    stated, most = not isinstance(cfg.increment, int), tables.MOST_TASKS if short else None
    print(printable(tables.split_table(sizes, order, source, found.names, stated, most)))
    try:
        learner = load.outline(resolved, count)
    except ValueError:
        return  # among the faults
    planned = learner.planned_parameters() if learner.says_what_it_trains else None
    print(tables.parameter_table(planned, sum(p.numel() for p in learner.parameters())))


def _tell_estimate(resolved: Resolved, found: check_data.DataFound) -> None:
    """Prints what a training step and a pass take here, and what that makes of a run (commands/estimate.py)."""
    from commands import estimate
    from utils.data.tasks import task_sizes
    from utils.process.machine import pick_device

    cfg = resolved.settings
    if (count := data.count_classes(cfg.dataset, **data.places(cfg))) is None:
        return
    sizes, images = task_sizes(count, cfg.init_cls, cfg.increment), found.images
    if not images and data.DATASETS[cfg.dataset].kind == "embedded":
        images = tuple(_images_of_embedded(cfg.dataset))
    arriving = iter([images[k] for k in class_order(cfg, count)[0]] if images else [])
    of_tasks = [sum(next(arriving) for _ in range(size)) for size in sizes] if images else []
    measured = estimate.measure(cfg, sizes, pick_device(cfg.device))
    print(printable("\n".join(estimate.lines(cfg, sizes, of_tasks, measured))))


def sources(cfg: Experiment) -> str:
    """Where the images and the weights come from, a line each."""
    from backbone import weights
    from backbone.catalogue import timm_tag

    info, places = data.DATASETS[cfg.dataset], data.places(cfg)
    where = f": {info.source}"
    if info.kind != "embedded":
        where = f" in {places['path'] if cfg.dataset == 'folder' else places['root']}"
    kind = cfg.backbone_weights if cfg.backbone_weights in weights.WORDS else f"from {cfg.backbone_weights}"
    return f"data        {info.name}{where}\nweights     {timm_tag(cfg.backbone_type)}, {kind}"


def class_order(cfg: Experiment, count: int) -> tuple[list[int], str]:
    """The order in which `count` classes arrive in the run of the first seed, and what it comes from."""
    from utils.data.tasks import drawn_order

    if cfg.class_order is not None:
        return list(cfg.class_order), "the class order of the file"
    seed = cfg.seed[0] if cfg.class_order_seed is None else cfg.class_order_seed
    source = f"class order of seed {seed}" if cfg.shuffle else "in their natural order"
    return drawn_order(count, seed, cfg.shuffle), source


def _fitted(swept: sweep.Sweep) -> tuple[list[int | None], list[list[str]]]:
    """(parameters that each cell trains in its first task, None without its data; what does not fit in each cell)."""
    check_torchvision()
    faults: list[list[str]] = []
    counts: list[int | None] = []
    for cell in swept.cells:
        cfg = cell.resolved.settings
        counts.append(None)
        faults.append([])
        try:
            if (count := data.count_classes(cfg.dataset, **data.places(cfg))) is not None:
                learner = load.outline(cell.resolved, count)
                planned = learner.planned_parameters()
                if learner.says_what_it_trains:
                    counts[-1] = planned[0][1] if planned else 0
        except ValueError as error:
            faults[-1] = [str(error)]
    return counts, faults


def foreseen(resolved: Resolved, images: Sequence[int] = ()) -> list[str]:
    """Keys that will not do what they say with the tasks of this run, where the number of classes is known here. `images`: of
    each class for training, if they were counted; those of an embedded set are counted here if a key depends on them."""
    from utils.config.split import Split
    from utils.data.tasks import task_sizes

    cfg = resolved.settings
    if (count := data.count_classes(cfg.dataset, **data.places(cfg))) is None:
        return []
    sizes = task_sizes(count, cfg.init_cls, cfg.increment)
    few, many = (list(cfg.remarks_on(Split(sizes, [n] * len(sizes)))) for n in (1, 10**12))
    if few == many:
        return many
    if not images and data.DATASETS[cfg.dataset].kind == "embedded":
        images = _images_of_embedded(cfg.dataset)
    if not images:
        return list(cfg.remarks_on(Split(sizes)))
    arriving = iter([images[k] for k in class_order(cfg, count)[0]])
    return list(cfg.remarks_on(Split(sizes, [sum(next(arriving) for _ in range(size)) for size in sizes])))


@functools.cache
def _images_of_embedded(name: str) -> list[int]:
    """Training images of each class of an embedded set, once for all cells of a sweep: drawing a set takes seconds."""
    loaded = data.load(name)
    labels = loaded.train.labels.tolist()
    return [labels.count(k) for k in range(len(loaded.class_names))]


def _data_settings(cfg: Experiment) -> Experiment:
    """The settings of the data alone, equal for all cells that read the same images."""
    keys = ("dataset", "data_root", "data_path", "data_split", *data.reading(cfg))
    return Experiment(model_name="", init_cls=1, increment=1, **{key: getattr(cfg, key) for key in keys})


def weights_of(resolved: Resolved) -> tuple[list[str], list[str]]:
    """(lines on wrappings that are taken off a weight file, why a run would refuse the file)."""
    from backbone import weights

    cfg = resolved.settings
    if cfg.backbone_weights in weights.WORDS:
        return [], []
    if missing := weights.missing(cfg):
        return [], [missing]
    try:
        return weights.fit(cfg), []
    except ValueError as error:
        return [], [str(error)]


def missing_weights(resolved: Resolved) -> list[str]:
    """Weights that a run would download, and from where."""
    from backbone import weights

    text = weights.missing(resolved.settings) if resolved.settings.backbone_weights in weights.WORDS else None
    return [text] if text else []


def machine_faults(resolved: Resolved, engine: str) -> list[str]:
    """What this machine lacks for a run: the device, unless the run goes to a cluster, and packages."""
    faults = [tracker.missing(resolved.settings.tracker), engines.missing(engine, resolved.all_values)]
    if engine == "local":
        faults.append(missing_device(resolved.settings.device))
    return [text for text in faults if text]
