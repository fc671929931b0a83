"""`--list`: methods, data sets, backbones and the shipped experiments."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten, wrap

import models
from backbone import catalogue
from utils.config.strict_json import read_json
from utils.data import DATASETS
from utils.data.fetch import megabytes
from utils.text import WIDTH, printable

EXPERIMENTS = Path(__file__).resolve().parents[1] / "exps"


def run(args: argparse.Namespace) -> int:
    print(printable(listing(EXPERIMENTS, models.summaries(), catalogue.names(), args.list)))
    return 0


def listing(experiments: Path, methods: Mapping[str, str], backbones: Sequence[str], what: str = "all") -> str:
    """Methods, data sets, backbones and the shipped experiments with the start of their `about`, or one of these sections."""
    sections = {"methods": ["methods", *(_entry(name, 14, text) for name, text in methods.items())]}
    if what == "data":
        sections["data"] = data_table()
    else:
        sets = [_entry(i.name, 14, f"{i.num_classes or '?':>4} classes  {i.source}") for i in DATASETS.values()]
        sections["data"] = ["data sets", *sets]
    plain = ", ".join(name for name in backbones if "." not in name)
    names = wrap(plain, WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    sections["backbones"] = [f"backbones (timm's also as name.tag, {len(backbones)} in all)", *names]
    sections["exps"] = ["experiments"] if what in ("all", "exps") else []
    for path in sorted(experiments.glob("*.json")) if sections["exps"] else ():
        try:
            about = str(read_json(path)[0].get("about", ""))
        except ValueError as error:
            about = str(error)
        sections["exps"].append(_entry(f"{path.parent.name}/{path.name}", 42, about))
    shown = sections.values() if what == "all" else [sections[what]]
    return "\n\n".join("\n".join(lines) for lines in shown)


def data_table() -> list[str]:
    """A line a data set: classes, training and test images of the published split, how it comes here, source and licence."""
    lines = [f"  {'data sets':<14} classes   training      test  {'comes by':<16}  what it is and its licence"]
    for info in DATASETS.values():
        train, test = (f"{count:,}" for count in info.counts) if info.counts else ("", "")
        size = megabytes(sum(file.size for file in info.files))
        how = "in this program" if info.kind == "embedded" else f"fetch, {size}" if info.files else "your hand"
        text = f"{info.source}; licence: {info.licence}" if info.licence else info.source
        lines.append(f"  {info.name:<14} {info.num_classes or '':>7} {train:>10} {test:>9}  {how:<16}  {text}")
    return lines


def _entry(name: str, width: int, text: str) -> str:
    return f"  {name:<{width}}{text if '  ' in text else shorten(text, WIDTH - width - 2, placeholder=' ...')}"
