"""`--check`: what a run would do, before it starts: settings, tasks, parameters, and what is missing on this machine.

Nothing is trained: the method is built over the backbone's shapes alone, which shows in a moment what does not fit.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from textwrap import shorten, wrap
from typing import Any

from commands import check_data, load
from utils import data, engines
from utils.config import sweep
from utils.config.resolve import Resolved
from utils.config.schema import Experiment
from utils.process.machine import check_torchvision, missing_device
from utils.run import tracker
from utils.text import WIDTH, counted, printable


def run(args: argparse.Namespace) -> int:
    check(load.load(args), args.engine, full=args.check == "full")
    return 0


def check(loaded: sweep.Sweep, engine: str = "local", full: bool = False) -> None:
    """Shows what a run would do and what it lacks on this machine; of a sweep the first cell in full, and all cells.

    With `full` every image is decoded. Raises ConfigError with everything that a run would refuse."""
    check_torchvision()
    cells, look = loaded.cells, functools.cache(lambda cfg: check_data.look(cfg, full))
    found = [look(_data_settings(cell.resolved.settings)) for cell in cells]
    planned, faults = _fitted(loaded)
    for faults_of_cell, cell, seen in zip(faults, cells, found, strict=True):
        faults_of_cell += [*seen.faults, *weights_of(cell.resolved)[1], *machine_faults(cell.resolved, engine)]
    if not any(faults[0]) or not found[0].faults:
        show(cells[0].resolved, found[0])
    if loaded.declared:
        print(f"the above is cell 1 of {len(cells)}")
        rows = [(cell.label, cell.resolved.hash, count) for cell, count in zip(cells, planned, strict=True)]
        print(printable(cell_table(rows, len(loaded.seeds))))
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


def show(resolved: Resolved, found: check_data.DataFound) -> None:
    """Settings, and where the data are here also classes, tasks and parameters."""
    from utils.data.tasks import task_sizes

    cfg = resolved.settings
    print(printable(settings_table(resolved.stated, resolved.given, resolved.descriptions())))
    if found.table:
        print(printable(found.table))
    if (count := data.count_classes(cfg.dataset, **data.places(cfg))) is None:
        return
    order, source = class_order(cfg, count)
    sizes = task_sizes(count, cfg.init_cls, cfg.increment)
    print(printable(split_table(sizes, order, source, found.names, stated=not isinstance(cfg.increment, int))))
    try:
        learner = load.outline(resolved, count)
    except ValueError:
        return  # among the faults
    planned = learner.planned_parameters() if learner.says_what_it_trains else None
    print(parameter_table(planned, sum(p.numel() for p in learner.parameters())))


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


def settings_table(values: Mapping[str, Any], stated: Iterable[str], descriptions: Mapping[str, str]) -> str:
    """Every key with its value and, below, its meaning; keys that are not in the file are marked as defaults."""
    stated = set(stated)
    lines, width = ["settings"], max([24, *map(len, values)]) + 2
    for key, value in values.items():
        text = json.dumps(value, ensure_ascii=False)
        text = text if len(text) <= 62 or key != "about" else f'{text[:57]} ..."'
        lines.append(f"  {key:<{width}}{text}{'' if key in stated else '   (default)'}")
        lines += wrap(descriptions.get(key, ""), WIDTH, initial_indent=" " * 30, subsequent_indent=" " * 30)
    return "\n".join(lines)


def split_table(
    sizes: Sequence[int], order: Sequence[int], source: str, names: Sequence[str] = (), stated: bool = False
) -> str:
    """Classes of each task in order of arrival, which `source` says, with their `names` if known; a last task of another size
    is pointed out, unless the file states every size."""
    lines = [f"tasks ({len(order)} classes in {len(sizes)} tasks, {source})"]
    first = 0
    for task, size in enumerate(sizes, start=1):
        task_classes = order[first : first + size]
        ids = ", ".join(f"{c} {names[c]}" for c in task_classes) if names else " ".join(map(str, task_classes))
        ragged = "  (the rest)" if task == len(sizes) > 2 and size != sizes[1] and not stated else ""
        noun = "class" if size == 1 else "classes"
        lines.append(f"  {task:>3}: {size:>3} {noun}{ragged}  {shorten(ids, 72, placeholder=' ...')}")
        first += size
    return "\n".join(lines)


def cell_table(cells: Sequence[tuple[str, str, int | None]], seeds: int) -> str:
    """The cells of a sweep as (label, settings hash, parameters trained in the first task where known), and their count."""
    lines = [f"cell  {'settings':<12}  {'trainable':>12}"]
    for number, (label, run, count) in enumerate(cells, start=1):
        lines.append(f"{number:>4}  {run:<12}  {'-' if count is None else format(count, ','):>12}  {label}")
    runs = counted(len(cells) * seeds, "run")
    return "\n".join([*lines, f"{counted(len(cells), 'cell')} of {counted(seeds, 'seed')}: {runs}"])


def parameter_table(planned: Sequence[tuple[str, int]] | None, total: int) -> str:
    """Trainable parameters by occasion, None if the method does not say, and all parameters at the start."""
    if planned is None:
        why = "the method defines neither `trainable` nor `planned_parameters`"
        lines = ["trainable parameters", f"  not known before training, since {why}"]
    else:
        rows = planned or [("nothing is trained", 0)]
        lines = ["trainable parameters", *(f"  {count:>12,}  {what}" for what, count in rows)]
    return "\n".join([*lines, f"  {total:>12,}  all parameters at the start, the frozen backbone included"])
