"""The experiment file with the overrides of the command line, checked in full before anything heavy is imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import models
from backbone import catalogue
from utils.config import nested_lora_files, resolve, strict_json, sweep
from utils.config.resolve import Resolved
from utils.text import shortened


def load(args: argparse.Namespace) -> sweep.Sweep:
    """The experiment file with the command line's overrides, checked in full before anything heavy is imported.

    A file without `sweep` has one cell."""
    written, faults = strict_json.read_json(args.config)
    values, notes, older = nested_lora_files.translate(written)
    overrides, more = strict_json.parse_set(args.set)
    overrides |= {k: v for k in ("data_root", "device") if (v := getattr(args, k)) is not None}
    values |= overrides
    more += [fault for key in ("data_root", "device") for fault in strict_json.strange(key, getattr(args, key))]
    spec, source = (
        values.pop("sweep", None),
        " ".join([str(args.config), *(f"--set {shortened(text, 200)}" for text in args.set)]),
    )
    methods = models.available()

    def resolve_one(values: dict[str, Any], more_notes: Sequence[str] = ()) -> Resolved:
        return resolve.resolve(
            values,
            source=source,
            settings_of=models.settings_of,
            methods=methods,
            backbones=catalogue.names,
            faults=faults + older + more,
            notes=[*notes, *more_notes],
        )

    return sweep.resolve(spec, values, source, overrides, resolve_one, models.settings_of, methods)
