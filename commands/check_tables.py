"""The tables of `--check`: settings, tasks, cells of a sweep, parameters."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from textwrap import shorten, wrap
from typing import Any

from utils.text import WIDTH, counted

MOST_TASKS = 6  # that the short form shows


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


def difference_table(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """The keys whose value is not the default, one a line; `about` is cut."""
    changed = {key: value for key, value in values.items() if key not in defaults or defaults[key] != value}
    changed = {
        key: value for key, value in changed.items() if key not in ("expected", "tuned")
    }  # what is known of them
    lines = [f"settings that are not the defaults ({len(changed)} of {len(values)}; --check all shows every key)"]
    width = max(map(len, changed), default=0) + 2
    for key, value in changed.items():
        lines.append(
            f"  {key:<{width}}{shorten(json.dumps(value, ensure_ascii=False), WIDTH - width - 2, placeholder=' ...')}"
        )
    return "\n".join(lines)


def split_table(
    sizes: Sequence[int],
    order: Sequence[int],
    source: str,
    names: Sequence[str] = (),
    stated: bool = False,
    most: int | None = None,
) -> str:
    """Classes of each task in order of arrival, which `source` says, with their `names` if known; a last task of another size
    is pointed out, unless the file states every size. Of more than `most` tasks the first and the last are shown."""
    lines = [f"tasks ({len(order)} classes in {len(sizes)} tasks, {source})"]
    first = 0
    for task, size in enumerate(sizes, start=1):
        task_classes = order[first : first + size]
        ids = ", ".join(f"{c} {names[c]}" for c in task_classes) if names else " ".join(map(str, task_classes))
        shown = most is None or len(sizes) <= most or task < most or task == len(sizes)
        if not shown:
            lines += [f"       ... {len(sizes) - most} more"] if task == most else []
            first += size
            continue
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
