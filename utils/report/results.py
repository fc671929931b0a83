"""Reads what a run left behind: results.json, metrics.jsonl, environment.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from utils.config import strict_json
from utils.config.strict_json import read_json
from utils.report import console


def result_of(folder: Path) -> dict[str, Any] | None:
    """The results of a finished run; None if it is not finished or, said aloud, if the file is damaged."""
    path = folder / "results.json"
    if path.is_dir():
        raise ValueError(f"{path} is a folder, where a file would be written; move it away")
    if not path.is_file():
        return None
    try:
        results, faults = strict_json.read_json(path)
        if faults:
            raise strict_json.ConfigError(str(path), faults)
        try:
            console.seed_table([results])
            if folder.name != f"seed_{results['seed']}":
                raise ValueError(f"seed {results['seed']}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} holds no results ({type(error).__name__}: {error})") from None
        return results
    except ValueError as error:
        print(f"warning: {error}; the run is finished anew from its last checkpoint", file=sys.stderr)
        return None


def load_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a torn last line (of a killed run) is left out, another bad line raises ValueError."""
    try:
        return [json.loads(line) for line in Path(path).read_bytes().split(b"\n")[:-1]]
    except ValueError as error:
        raise ValueError(f"{path}: not a file of JSON lines ({error})") from error


def read(run: Path, name: str) -> dict[str, Any]:
    """A JSON file of a finished run's folder. Raises ValueError if it is missing or damaged."""
    path = run / name
    if not path.is_file():
        raise ValueError(f"{path} is missing: {run} is no run folder, or its run is not finished")
    values, faults = read_json(path)
    if faults:
        raise ValueError(f"{path}: {faults[0]}")
    return values
