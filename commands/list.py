"""`--list`: methods, data sets, backbones and the shipped experiments, all in short, or one kind of them in full.

`--list exps lora` shows the experiments whose name or text has the word.
"""

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
from utils.text import WIDTH, nearest, printable

EXPERIMENTS = Path(__file__).resolve().parents[1] / "exps"
DATA_HEAD = f"  {'data sets':<14} classes   training      test  {'comes by':<16}  what it is and its licence"
KINDS = ("methods", "data", "backbones", "exps")


def run(args: argparse.Namespace) -> int:
    print(printable(listing(args.list or [], EXPERIMENTS, models.summaries(), catalogue.names())))
    return 0


def listing(words: Sequence[str], experiments: Path, methods: Mapping[str, str], backbones: Sequence[str]) -> str:
    """All four kinds in short or, with `words` [kind] or [kind, word], one kind in full, with `word` in it in any case.

    Raises ValueError for another kind, more words, or a word that nothing has."""
    if list(words) in ([], ["all"]):
        return _all(experiments, methods, backbones)
    kind, *more = words
    if kind not in KINDS:
        raise ValueError(f"--list {kind}: is no kind of list{nearest(kind, KINDS)} (known: {', '.join(KINDS)})")
    if len(more) > 1:
        raise ValueError(f"--list {kind} {' '.join(more)}: one word to look for is expected")
    entries = {
        "methods": lambda: methods,
        "data": lambda: dict(zip(DATASETS, data_rows(), strict=True)),
        "backbones": lambda: dict.fromkeys(backbones, ""),
        "exps": lambda: _abouts(experiments),
    }[kind]()
    word = more[0].casefold() if more else ""
    shown = {name: text for name, text in entries.items() if word in f"{name} {text}".casefold()}
    if not shown:
        raise ValueError(f"--list {kind} {more[0]}: none of {len(entries)} has it{nearest(more[0], entries)}")
    head = f"{kind} ({len(shown)} of {len(entries)} with {more[0]})" if more else f"{kind} ({len(entries)})"
    if kind == "backbones":
        return "\n".join([head, _wrapped(list(shown))])
    if kind == "data":
        return "\n".join([DATA_HEAD, *shown.values()])
    width = max(map(len, shown)) + 2
    return "\n".join([head, *(_entry(name, width, text) for name, text in shown.items())])


def _all(experiments: Path, methods: Mapping[str, str], backbones: Sequence[str]) -> str:
    """The names of everything; of methods and data sets also what they are."""
    lines = ["methods", *(_entry(name, 14, text) for name, text in methods.items()), "", "data sets"]
    lines += [_entry(i.name, 14, f"{i.num_classes or '?':>4} classes  {i.source}") for i in DATASETS.values()]
    plain = [name for name in backbones if "." not in name]
    lines += [
        "",
        f"backbones (timm's also as name.tag, {len(backbones)} in all: --list backbones WORD)",
        _wrapped(plain),
    ]
    files = [f"{path.parent.name}/{path.name}" for path in sorted(experiments.glob("*.json"))]
    return "\n".join([*lines, "", f"experiments ({len(files)}; what each shows: --list exps WORD)", _wrapped(files)])


def data_rows() -> list[str]:
    """A line a data set: classes, training and test images of the published split, how it comes here, source and licence."""
    lines = []
    for info in DATASETS.values():
        train, test = (f"{count:,}" for count in info.counts) if info.counts else ("", "")
        size = megabytes(sum(file.size for file in info.files))
        how = "in this program" if info.kind == "embedded" else f"fetch, {size}" if info.files else "your hand"
        text = f"{info.source}; licence: {info.licence}" if info.licence else info.source
        lines.append(f"  {info.name:<14} {info.num_classes or '':>7} {train:>10} {test:>9}  {how:<16}  {text}")
    return lines


def _abouts(experiments: Path) -> dict[str, str]:
    """Each experiment file with its `about`, or with why it cannot be read."""
    abouts = {}
    for path in sorted(experiments.glob("*.json")):
        try:
            abouts[f"{path.parent.name}/{path.name}"] = str(read_json(path)[0].get("about", ""))
        except ValueError as error:
            abouts[f"{path.parent.name}/{path.name}"] = str(error)
    return abouts


def _wrapped(names: Sequence[str]) -> str:
    text = ", ".join(names)
    return "\n".join(wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False))


def _entry(name: str, width: int, text: str) -> str:
    return f"  {name:<{width}}{text if '  ' in text else shorten(text, WIDTH - width - 2, placeholder=' ...')}"
