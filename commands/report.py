"""`--report RUN`: writes report.html and the plots of a finished run again, from the files in its folder.

`--report FOLDER`, a sweep's or one with the seeds of an experiment, writes the page of all runs in it. With --figures it also
writes each picture as SVG and PDF for papers.

Nothing is computed anew: the page shows results.json, metrics.jsonl, config.json and environment.json as the run wrote them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import models
from commands import outcome
from utils.compare import runs
from utils.report import results as report_results
from utils.text import printable

PAGE = "report.html"


def run(args: argparse.Namespace) -> int:
    if not (args.report / "results.json").exists() and runs_below(args.report):
        if args.figures:
            raise ValueError(f"--report {args.report} --figures: the figures of several runs are written by --compare")
        print(printable(f"page: {outcome.write_again(args.report)}"))
        return 0
    print(f"report: {write(args.report, args.figures)}")
    if args.figures:
        print(f"figures (svg, pdf): {args.report / 'figures'}")
    return 0


def runs_below(folder: Path) -> bool:
    """Whether `folder` is no run itself and holds a finished one."""
    if (folder / "metrics.jsonl").exists():
        return False
    of_sweep = (folder / "cells").is_dir() and (folder / "table.csv").exists()
    return of_sweep or any(done for _, done in runs.below(folder))


def write(folder: Path, figures: bool = False) -> Path:
    """Writes the page of the finished run in `folder`, with `figures` also those for papers; returns the page's path.

    Raises ValueError if a file of the run is missing or damaged."""
    from utils.report import page

    files = ("results.json", "config.json", "environment.json")
    results, settings, environment = (report_results.read(folder, name) for name in files)
    known = results.get("model_name") in models.available()  # a method's file may be gone since
    schema = models.settings_of(results["model_name"]) if known else None
    defaults = schema.defaults() if schema else {}
    meanings = {key: field.description or "" for key, field in schema.model_fields.items()} if schema else {}
    try:
        return page.write_report(folder, results, settings, environment, None, defaults, meanings, figures)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{folder}: its results are not as this program writes them ({error})") from None


def restore(folder: Path) -> None:
    """Writes the page of a finished run if somebody deleted it, and says so."""
    if not (folder / PAGE).exists():
        print(f"a report was missing and is written again: {write(folder)}")
