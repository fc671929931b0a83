"""Runs every cell and seed of a sweep, several at a time, and prints the paired table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from commands import check, load, outcome, present, report
from utils import engines
from utils.compare import table
from utils.config.sweep import Sweep
from utils.engines import jobs as pool
from utils.files import storage
from utils.report import console
from utils.report import results as report_results
from utils.report.results import result_of
from utils.text import counted, printable

MAIN = Path(__file__).resolve().parents[1] / "main.py"


def run(swept: Sweep, args: argparse.Namespace) -> int:
    """Runs every seed of every cell as a process of main.py, where --engine says, then prints the table.

    Finished runs are not repeated, unless with `--resume never`. Returns the exit code: 1 if a run failed."""
    out, stem = args.out, args.config.stem
    folder = out / stem / f"sweep_{swept.hash}"
    # Each cell has a file: a sweep may take days, and the experiment file may be edited meanwhile. The file has the name of
    # the experiment, so the run folder is the one its settings would give anyway.
    files = [folder / "cells" / str(number) / f"{stem}.json" for number in range(1, len(swept.cells) + 1)]
    finished = FinishedRuns()
    jobs = _jobs(swept, args, folder, files, finished)
    _compare_finished(swept, args, jobs)
    if waiting := sum(job.state == "waiting" for job in jobs):
        _prepare(swept, args, files)
        cells = f"{counted(len(swept.cells), 'cell')}, " * swept.declared
        at_once = f", {args.jobs} at a time" * (args.engine == "local" and args.jobs > 1)
        print(f"{cells}{counted(len(jobs), 'run')}, {len(jobs) - waiting} of them finished before{at_once}")
        engines.load(args.engine).run(jobs, args.jobs, finished.accuracy_of)
    else:
        verb = "is" if len(jobs) == 1 else "are"
        print(f"all {counted(len(jobs), 'run')} of {counted(len(swept.cells), 'cell')} {verb} finished")
    _print_table(swept, args, folder, finished)
    failed = [job for job in jobs if job.state == "failed"]
    for job in failed:
        print(printable(f"failed: {job.cell}, seed {job.seed}: {job.reason}"), file=sys.stderr)
    return 1 if failed else 0


class FinishedRuns:
    """What the table needs of finished runs, each read once: a sweep may have ten thousand."""

    def __init__(self) -> None:
        self._results: dict[Path, dict[str, Any]] = {}

    def results_of(self, run_folder: Path) -> dict[str, Any] | None:
        """The figures of a finished run, None if it is not finished."""
        if run_folder not in self._results and (results := result_of(run_folder)) is not None:
            figures = (*table.COLUMNS, "selection_history", "provenance")
            self._results[run_folder] = {key: results[key] for key in figures if key in results}
        return self._results.get(run_folder)

    def accuracy_of(self, run_folder: Path) -> float | None:
        """The last accuracy of a finished run in percent, None if it is not finished."""
        return (self.results_of(run_folder) or {}).get("last_accuracy")


def _jobs(
    swept: Sweep, args: argparse.Namespace, folder: Path, files: list[Path], finished: FinishedRuns
) -> list[pool.Job]:
    """A job a run, seed by seed, so that the first pairs of cells are complete early."""
    jobs = []
    needs = [engines.keys_of(cell.resolved.all_values) for cell in swept.cells]
    flags = ["--resume", args.resume, *(f"--{name}" for name in ("debug", "profile") if getattr(args, name))]
    for seed in swept.seeds:
        for number, (cell, file) in enumerate(zip(swept.cells, files, strict=True), start=1):
            line = [sys.executable, str(MAIN), "--config", str(file), "--set", f"seed=[{seed}]", "--out", str(args.out)]
            console = folder / "console" / f"{number}_seed_{seed}.txt"
            run_folder = cell.run_folder(args.out, args.config.stem, seed)
            label = cell.label if swept.declared else cell.resolved.settings.model_name
            job = pool.Job(label, seed, [*line, *flags], run_folder, console, needs=needs[number - 1])
            job.threads = 1 if load.is_small(cell.resolved.settings) else None
            if args.resume == "auto" and (accuracy := finished.accuracy_of(run_folder)) is not None:
                job.state, job.accuracy = "done", accuracy
            jobs.append(job)
    return jobs


def _compare_finished(swept: Sweep, args: argparse.Namespace, jobs: list[pool.Job]) -> None:
    """Raises ValueError where the data, classes or weights are no longer those of runs that are finished: the rows would mix
    two of them. Other sources and versions are warned of."""
    now = present.Present()
    cells = {cell.label if swept.declared else cell.resolved.settings.model_name: cell for cell in swept.cells}
    for job in jobs:
        if job.state == "done":
            name = f"seed {job.seed}" + f" of {job.cell}" * swept.declared
            now.compare(cells[job.cell].resolved, job.folder, name)
    now.tell()
    for job in jobs:
        if job.state == "done":
            report.restore(job.folder)


def _prepare(swept: Sweep, args: argparse.Namespace, files: list[Path]) -> None:
    """Checks all cells, writes their files and prints their notes. Raises ValueError before the first process starts."""
    if missing := engines.missing(args.engine, swept.cells[0].resolved.all_values):
        raise ValueError(missing)
    check.ready(swept, args.engine)
    for cell, file in zip(swept.cells, files, strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        storage.write_json(file, cell.values)
    remarks = [engines.remarks(args.engine, engines.keys_of(c.resolved.all_values), args.jobs) for c in swept.cells]
    for note in swept.gather([[*c.resolved.notes, *more] for c, more in zip(swept.cells, remarks, strict=True)]):
        print(printable(f"warning: {note}"), file=sys.stderr)


def _print_table(swept: Sweep, args: argparse.Namespace, folder: Path, finished: FinishedRuns) -> None:
    """Prints the paired table and writes it as text, CSV, Markdown and LaTeX."""
    stem, cells = args.config.stem, []
    for cell in swept.cells:
        results = {seed: finished.results_of(cell.run_folder(args.out, stem, seed)) for seed in swept.seeds}
        cells.append((cell.label, cell.resolved.hash, {s: r for s, r in results.items() if r is not None}))
        present.refuse_mixed(cells[-1][2], cell.label if swept.declared else "")
    parents = [cell.run_folder(args.out, stem, 0).parent for cell in swept.cells]
    if more := sorted({seed for parent in parents for seed in _finished_seeds(parent)} - {*swept.seeds}):
        print(f"not in the table, since not asked for: finished runs of seed {', '.join(map(str, more))}")
    rows = table.compare(cells)
    if not swept.declared:
        folders = [cell.run_folder(args.out, stem, seed) for cell in swept.cells for seed in cells[0][2]]
        print(printable("\n" + console.seed_table([report_results.read(path, "results.json") for path in folders])))
    folder.mkdir(parents=True, exist_ok=True)
    for ending, text in table.tables(rows).items():
        storage.write_bytes(folder / f"table.{ending}", text.encode())
    if swept.declared and len(swept.seeds) > 1:  # one seed has neither deviation nor interval
        print(printable(f"\n{table.as_text(rows)}"))
    finished_runs = [
        (cell.label if swept.declared else "", [cell.run_folder(args.out, stem, seed) for seed in results])
        for cell, (_, _, results) in zip(swept.cells, cells, strict=True)
    ]
    place = folder if swept.declared else parents[0]
    outcome.show(place, stem, outcome.rows_of(finished_runs), with_table=swept.declared)
    if not swept.declared:
        print(printable(f"run folder: {place}"))
    print(printable(f"table (txt, csv, md, tex): {folder}"))


def _finished_seeds(settings_folder: Path) -> Iterator[int]:
    """The seeds with a finished run in the folder of these settings."""
    for path in settings_folder.glob("seed_*/results.json"):
        if (number := path.parent.name.removeprefix("seed_")).isdigit():
            yield int(number)
