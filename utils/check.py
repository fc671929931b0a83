"""What `--list` and `--check` print: names, the resolved settings, the task table, parameter counts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import shorten, wrap
from typing import Any

from utils.data import DATASETS

WIDTH = 100


def listing(experiments: Path, methods: Sequence[str], backbones: Sequence[str]) -> str:
    """Methods, data sets, backbones and the shipped experiments with the start of their `about`."""
    lines = ["methods", f"  {', '.join(methods)}", "", "data sets"]
    lines += [f"  {info.name:<14}{info.num_classes or '?':>4} classes  {info.source}" for info in DATASETS.values()]
    plain = [name for name in backbones if "." not in name]
    lines += ["", f"backbones (timm's also as name.tag, {len(backbones)} in all)"]
    lines += wrap(", ".join(plain), WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    lines += ["", "experiments"]
    for path in sorted(experiments.glob("*.json")):
        about = json.loads(path.read_text(encoding="utf-8")).get("about", "")
        lines.append(f"  {path.parent.name}/{path.name:<36}{shorten(about, WIDTH - 42, placeholder=' ...')}")
    return "\n".join(lines)


def settings_table(values: Mapping[str, Any], given: Iterable[str]) -> str:
    """Every key with its value; those not in the file are marked as defaults."""
    stated = set(given)
    lines = ["settings"]
    for key, value in values.items():
        text = shorten(json.dumps(value, ensure_ascii=False), 62, placeholder=' ..."')
        lines.append(f"  {key:<26}{text}{'' if key in stated else '   (default)'}")
    return "\n".join(lines)


def split_table(sizes: Sequence[int], order: Sequence[int], seed: int) -> str:
    """Classes of each task in order of arrival; a last task of another size is pointed out."""
    lines = [f"tasks ({len(order)} classes in {len(sizes)} tasks, class order of seed {seed})"]
    first = 0
    for task, size in enumerate(sizes, start=1):
        ids = " ".join(str(c) for c in order[first : first + size])
        ragged = "  (the rest)" if task == len(sizes) > 2 and size != sizes[1] else ""
        lines.append(f"  {task:>3}: {size:>3} classes{ragged}  {shorten(ids, 72, placeholder=' ...')}")
        first += size
    return "\n".join(lines)


def parameter_table(planned: Sequence[tuple[str, int]], total: int) -> str:
    """Trainable parameters by occasion, and all parameters at the start."""
    lines = ["trainable parameters", *(f"  {count:>12,}  {what}" for what, count in planned or [("nothing is trained", 0)])]
    return "\n".join([*lines, f"  {total:>12,}  all parameters at the start, the frozen backbone included"])
