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
from utils.text import WIDTH, printable

EXPERIMENTS = Path(__file__).resolve().parents[1] / "exps"


def run(args: argparse.Namespace) -> int:
    print(printable(listing(EXPERIMENTS, models.summaries(), catalogue.names())))
    return 0


def listing(experiments: Path, methods: Mapping[str, str], backbones: Sequence[str]) -> str:
    """Methods, data sets, backbones and the shipped experiments with the start of their `about`."""
    lines = ["methods", *(_entry(name, 14, text) for name, text in methods.items()), "", "data sets"]
    lines += [_entry(i.name, 14, f"{i.num_classes or '?':>4} classes  {i.source}") for i in DATASETS.values()]
    plain = [name for name in backbones if "." not in name]
    lines += ["", f"backbones (timm's also as name.tag, {len(backbones)} in all)"]
    lines += wrap(", ".join(plain), WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    lines += ["", "experiments"]
    for path in sorted(experiments.glob("*.json")):
        try:
            about = str(read_json(path)[0].get("about", ""))
        except ValueError as error:
            about = str(error)
        lines.append(_entry(f"{path.parent.name}/{path.name}", 42, about))
    return "\n".join(lines)


def _entry(name: str, width: int, text: str) -> str:
    return f"  {name:<{width}}{text if '  ' in text else shorten(text, WIDTH - width - 2, placeholder=' ...')}"
