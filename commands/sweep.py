"""Runs every cell and seed of a sweep, several at a time, and prints the paired table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from utils import engines
from utils.compare import table
from utils.config.sweep import Sweep
from utils.engines import jobs as pool
from utils.files import storage


def run(
    swept: Sweep,
    args: argparse.Namespace,
    program: Path,
    ready: Callable[[Sweep], None],
    result_of: Callable[[Path], dict[str, Any] | None],
) -> int:
    """Every seed of every cell as a process of `program`, where --engine says, then the table. Exit code: 1 if a run failed.

    What is finished is not run again, unless `--resume never`. `ready` is asked before the first process starts."""
    out, stem = args.out, args.config.stem
    folder = out / stem / f"sweep_{swept.hash}"
    # a cell's own file: a sweep may take days, and the experiment file may be edited meanwhile. Its name is the config's, so
    # the run folder is the one its settings would give anyway
    files = [folder / "cells" / str(number) / f"{stem}.json" for number in range(1, len(swept.cells) + 1)]

    known: dict[Path, dict[str, Any]] = {}  # what the table needs of the finished runs: ten thousand are read once

    def look(run_folder: Path) -> dict[str, Any] | None:
        if run_folder not in known and (results := result_of(run_folder)) is not None:
            known[run_folder] = {k: results[k] for k in (*table.COLUMNS, "selection_history") if k in results}
        return known.get(run_folder)

    def accuracy_of(run_folder: Path) -> float | None:
        return (look(run_folder) or {}).get("last_accuracy")

    jobs, needs = [], [engines.keys_of(cell.resolved.values) for cell in swept.cells]
    for seed in swept.seeds:  # seed by seed, so that the first pairs are there early
        for number, (cell, file) in enumerate(zip(swept.cells, files, strict=True), start=1):
            line = [sys.executable, str(program), "--config", str(file), "--set", f"seed=[{seed}]", "--out", str(out)]
            line += ["--resume", args.resume, *(f"--{name}" for name in ("debug", "profile") if getattr(args, name))]
            console = folder / "console" / f"{number}_seed_{seed}.txt"
            job = pool.Job(cell.label, seed, line, cell.run_folder(out, stem, seed), console, needs=needs[number - 1])
            if args.resume == "auto" and (accuracy := accuracy_of(job.folder)) is not None:
                job.state, job.accuracy = "done", accuracy
            jobs.append(job)
    if waiting := sum(job.state == "waiting" for job in jobs):
        if lack := engines.missing(args.engine, swept.cells[0].resolved.values):
            raise ValueError(lack)
        ready(swept)
        for cell, file in zip(swept.cells, files, strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            storage.write_json(file, cell.values)
        asked = [engines.remarks(args.engine, keys, args.jobs) for keys in needs]
        for note in swept.gather([[*c.resolved.notes, *more] for c, more in zip(swept.cells, asked, strict=True)]):
            print(f"warning: {note}", file=sys.stderr)
        print(f"{len(swept.cells)} cells, {len(jobs)} runs, {len(jobs) - waiting} of them finished before")
        engines.load(args.engine).run(jobs, args.jobs, accuracy_of)
    else:
        print(f"all {len(jobs)} runs of {len(swept.cells)} cells are finished")

    found = []
    for cell in swept.cells:
        results = {seed: look(cell.run_folder(out, stem, seed)) for seed in swept.seeds}
        found.append((cell.label, cell.resolved.hash, {s: r for s, r in results.items() if r is not None}))
    places = [cell.run_folder(out, stem, 0).parent for cell in swept.cells]
    if more := sorted({seed for place in places for seed in _finished(place)} - {*swept.seeds}):
        print(f"not in the table, since not asked for: finished runs of seed {', '.join(map(str, more))}")
    rows = table.compare(found)
    folder.mkdir(parents=True, exist_ok=True)
    for ending, text in table.tables(rows).items():
        storage.write_bytes(folder / f"table.{ending}", text.encode())
    print(f"\n{table.as_text(rows)}\ntable (txt, csv, md, tex): {folder}")
    failed = [job for job in jobs if job.state == "failed"]
    for job in failed:
        print(f"failed: {job.cell}, seed {job.seed}: {job.reason}", file=sys.stderr)
    return 1 if failed else 0


def _finished(place: Path) -> Iterator[int]:
    """The seeds with a finished run in a settings folder."""
    for path in place.glob("seed_*/results.json"):
        if (number := path.parent.name.removeprefix("seed_")).isdigit():
            yield int(number)
