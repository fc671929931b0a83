"""Reads what a run left behind: results.json, metrics.jsonl, environment.json."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from utils.config.strict_json import ConfigError, read_json
from utils.files import storage
from utils.report import console
from utils.text import shortened

MOST_BYTES = 2**28  # of a file that a run wrote: the results of thousands of classes and tasks fit
View = TypeVar("View")  # what a caller reads from results.json


def read(run: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of a finished run's folder. Raises ValueError, in one line that begins with the file's path,
    if the file is missing or damaged."""
    path = run / name
    if not path.is_file():
        raise ValueError(f"{path} is missing: {run} is no run folder, or its run is not finished")
    try:
        values, faults = read_json(path, most=MOST_BYTES)
    except ConfigError as error:
        faults = error.faults
    except RecursionError:  # the parser can read deeper lists than the search for faults
        faults = ["it is nested too deep"]
    if faults:
        raise ValueError(f"{path} is damaged: {shortened(faults[0], 200)}")
    # results of versions without provenance have no digest
    sealed = name == "results.json" and ("digest" in values or "provenance" in values)
    if sealed and values.get("digest") != storage.digest_of(values):
        raise ValueError(f"{path} is not as the run wrote it: its digest does not fit its content")
    return values


def read_results(run: Path, view: Callable[[dict[str, Any]], View]) -> View:
    """What `view` makes of the results.json in a run's folder. Raises ValueError as `read` does, and also where `view` misses
    a key or meets a value of the wrong kind: then the file is JSON, but holds no results."""
    results = read(run, "results.json")
    try:
        return view(results)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = shortened(f"{type(error).__name__}: {error}", 200)
        raise ValueError(f"{run / 'results.json'} holds no results ({reason})") from None


def result_of(folder: Path) -> dict[str, Any] | None:
    """The results of the finished run in `folder`, which a resumed experiment does not repeat. None if the run is not finished
    or, with a warning, if its results.json is damaged or changed: then they are computed again from the last checkpoint.
    Raises ValueError where there is no checkpoint either."""

    def of_this_seed(results: dict[str, Any]) -> dict[str, Any]:
        console.seed_table([results])  # the table at the end of the experiment needs these results
        if folder.name != f"seed_{results['seed']}":
            raise ValueError(f"seed {results['seed']}")
        return results

    path = folder / "results.json"
    if path.is_dir():
        raise ValueError(f"{path} is a folder, where a file would be written; move it away")
    if not path.is_file():
        return None
    try:
        return read_results(folder, of_this_seed)
    except ValueError as error:
        if not any(folder.glob("checkpoints/task_*")):
            raise ValueError(
                f"{error}, and the run has no checkpoint from which it could be written again; put the old file back, or "
                "start afresh with --resume never"
            ) from None
        print(f"warning: {error}; the run is finished anew from its last checkpoint", file=sys.stderr)
        return None


def load_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a torn last line (of a killed run) is left out, another bad line raises ValueError."""
    try:
        return [json.loads(line) for line in Path(path).read_bytes().split(b"\n")[:-1]]
    except ValueError as error:
        raise ValueError(f"{path}: not a file of JSON lines ({error})") from error
