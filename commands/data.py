"""`--data fetch NAME`: downloads published data sets to the data root. A run never does."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from utils import data
from utils.config.schema import Experiment
from utils.data import fetch
from utils.data.dataset import DatasetInfo, File
from utils.run.progress import Bar
from utils.text import clock, counted, nearest, printable, shown


def run(args: argparse.Namespace) -> int:
    verb, *names = args.data
    if verb != "fetch" or not names:
        raise ValueError(f"--data {printable(verb)}: --data fetch NAME is expected, such as --data fetch cifar100")
    infos = [_fetchable(name) for name in names]
    root = Path(args.data_root or Experiment.defaults()["data_root"]).expanduser()
    for info in infos:
        fetch_set(info, root)
    return 0


def fetch_set(info: DatasetInfo, root: Path, patience: float = fetch.PATIENCE) -> None:
    """Fetches what is missing of a set and says what was done. Raises ValueError as `fetch.fetch` does."""
    if data.missing(info.name, root=root) is None:
        print(printable(f"{info.name}: is complete in {root.absolute()}"))
        return
    size = fetch.megabytes(sum(file.size for file in info.files))
    licence = f"; licence: {info.licence}" * bool(info.licence)
    print(
        printable(f"{info.name}: {counted(len(info.files), 'file')}, {size}, to {root.absolute()}{licence}"), flush=True
    )
    start, bars = time.monotonic(), list[Bar]()

    def bar_of(file: File) -> fetch.Progress:
        def show(done: int, size: int) -> None:
            if not bars or bars[-1].text != text:
                bars.append(Bar(size // 10**6, text, 0, 5.0, True, min(done, size) // 10**6))
            bars[-1].update(done // 10**6 - bars[-1].done)
            if done >= size:
                bars[-1].close()

        text = f"{file.address.rpartition('/')[2]}, MB"
        return show

    incomplete = all(fetch.in_place(file, root) for file in info.files)  # folders with gaps, see utils/data/cifar.py
    try:
        count = fetch.fetch(info.files, root, bar_of, patience, anew=incomplete)
    finally:
        for bar in bars:
            bar.close()
    if lacking := data.missing(info.name, root=root):
        raise ValueError(lacking)
    took = clock(time.monotonic() - start)
    print(printable(f"{info.name}: complete, {counted(count, 'file')} fetched and checked in {took}"))


def _fetchable(name: str) -> DatasetInfo:
    """The set `name`. ValueError if it is unknown or nothing of it can be fetched, with what can."""
    known: Sequence[str] = [each for each, info in data.DATASETS.items() if info.files]
    if name not in data.DATASETS:
        raise ValueError(
            f"--data fetch {shown(name)}: not known{nearest(name, data.DATASETS)} (known: {', '.join(known)})"
        )
    info = data.DATASETS[name]
    if info.kind == "embedded":
        raise ValueError(f"--data fetch {name}: the set is part of this program, there is nothing to fetch")
    if not info.files:
        raise ValueError(f"--data fetch {name}: it cannot be fetched by a program; it is needed as {info.source}")
    return info
