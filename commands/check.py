"""`--check`: what a run would do, before it starts: settings, tasks, parameters, and what is missing on this machine.

Nothing is trained: the method is built over the backbone's shapes alone, which shows in a moment what does not fit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from textwrap import shorten, wrap
from typing import Any

from commands import load
from utils import data, engines
from utils.config import sweep
from utils.config.resolve import Resolved
from utils.process.machine import check_torchvision
from utils.run import tracker
from utils.text import WIDTH, counted, printable


def run(args: argparse.Namespace) -> int:
    check(load.load(args), args.engine)
    return 0


def check(loaded: sweep.Sweep, engine: str = "local") -> None:
    """Shows what a run would do and what it lacks on this machine; of a sweep the first cell in full, and all cells."""
    check_torchvision()
    counts = fitted(loaded)
    show(loaded.cells[0].resolved)
    if loaded.declared:
        print(f"the above is cell 1 of {len(loaded.cells)}")
        rows = [(cell.label, cell.resolved.hash, count) for cell, count in zip(loaded.cells, counts, strict=True)]
        print(printable(cell_table(rows, len(loaded.seeds))))
    missing = [lacking(cell.resolved) for cell in loaded.cells]
    if lacks_package := engines.missing(engine, loaded.cells[0].resolved.all_values):
        missing = [[*texts, lacks_package] for texts in missing]
    notes = [
        [
            *cell.resolved.notes,
            *foreseen(cell.resolved),
            *weight_notes(cell.resolved),
            *engines.remarks(engine, cell.resolved.all_values),
            *texts,
        ]
        for cell, texts in zip(loaded.cells, missing, strict=True)
    ]
    print(printable("\n".join(f"note: {line}" for line in loaded.gather(notes))))
    print("the settings are valid" + ("; what is missing on this machine is listed above" if any(missing) else ""))


def ready(swept: sweep.Sweep) -> None:
    """ConfigError if a cell does not fit its backbone or lacks data or weights: said before the first run begins."""
    fitted(swept)
    swept.refuse([lacking(cell.resolved) for cell in swept.cells])


def show(resolved: Resolved) -> None:
    """Settings, and where the data are here also tasks and parameters."""
    from utils.data.tasks import drawn_order, task_sizes

    cfg, where = resolved.settings, load.data_paths(resolved)
    if (count := data.count_classes(cfg.dataset, **where)) is not None:
        order_seed = cfg.seed[0] if cfg.class_order_seed is None else cfg.class_order_seed
        sizes = task_sizes(count, cfg.init_cls, cfg.increment)
        if cfg.class_order is not None:
            order, source = list(cfg.class_order), "the class order of the file"
        else:
            order = drawn_order(count, order_seed, cfg.shuffle)
            source = f"class order of seed {order_seed}" if cfg.shuffle else "in their natural order"
        learner = load.outline(resolved, count)
        print(printable(settings_table(resolved.stated, resolved.given, resolved.descriptions())))
        print(split_table(sizes, order, source))
        planned = learner.planned_parameters() if learner.says_what_it_trains else None
        print(parameter_table(planned, sum(p.numel() for p in learner.parameters())))
    else:
        print(printable(settings_table(resolved.stated, resolved.given, resolved.descriptions())))


def fitted(swept: sweep.Sweep) -> list[int | None]:
    """Parameters that each cell trains in its first task, None without its data. ConfigError if a method or a weight file does
    not fit the backbone."""
    check_torchvision()
    faults: list[list[str]] = []
    counts: list[int | None] = []
    for cell in swept.cells:
        counts.append(None)
        faults.append([])
        try:
            if (
                count := data.count_classes(cell.resolved.settings.dataset, **load.data_paths(cell.resolved))
            ) is not None:
                learner = load.outline(cell.resolved, count)
                planned = learner.planned_parameters()
                if learner.says_what_it_trains:
                    counts[-1] = planned[0][1] if planned else 0
            weight_notes(cell.resolved)
        except ValueError as error:
            faults[-1] = [str(error)]
    swept.refuse(faults)
    return counts


def foreseen(resolved: Resolved) -> list[str]:
    """Keys that will not do what they say with the tasks of this run, where the number of classes is known here."""
    from utils.config.split import Split
    from utils.data.tasks import task_sizes

    cfg = resolved.settings
    if (count := data.count_classes(cfg.dataset, **load.data_paths(resolved))) is None:
        return []
    return list(cfg.remarks_on(Split(task_sizes(count, cfg.init_cls, cfg.increment))))


def lacking(resolved: Resolved) -> list[str]:
    """Data and weights that this machine lacks, each with the way to get it."""
    from backbone import weights

    cfg = resolved.settings
    missing = (
        data.missing(cfg.dataset, **load.data_paths(resolved)),
        weights.missing(cfg),
        tracker.missing(cfg.tracker),
    )
    return [text for text in missing if text]


def weight_notes(resolved: Resolved) -> list[str]:
    """Lines on the wrappings of a local weight file, empty where it is not there. Raises ValueError if it does not fit."""
    from backbone import weights

    return weights.fit(resolved.settings) if weights.missing(resolved.settings) is None else []


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


def split_table(sizes: Sequence[int], order: Sequence[int], source: str) -> str:
    """Classes of each task in order of arrival, which `source` says; a last task of another size is pointed out."""
    lines = [f"tasks ({counted(len(order), 'class', 'classes')} in {counted(len(sizes), 'task')}, {source})"]
    first = 0
    for task, size in enumerate(sizes, start=1):
        ids = " ".join(str(c) for c in order[first : first + size])
        ragged = "  (the rest)" if task == len(sizes) > 2 and size != sizes[1] else ""
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
