"""From the values of an experiment file to checked, frozen settings; all faults in one message."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from utils import data
from utils.config.schema import LATER, NEVER_ACTED, NOT_HASHED, Experiment
from utils.config.strict_json import ConfigError
from utils.text import nearest, shown

Schema = type[Experiment]


SettingsOf = Callable[[str], Schema]


# Values for required keys that are missing or faulty, so that the rules over the others can still be checked.
STAND_INS = {"model_name": "", "dataset": "digits", "init_cls": 1, "increment": 1}


@dataclass(frozen=True)
class Resolved:
    """A checked experiment: `settings`, the keys the user gave, and `notes` to show once."""

    settings: Experiment
    given: frozenset[str]
    notes: tuple[str, ...]

    @property
    def values(self) -> dict[str, Any]:
        """Every key with its value, defaults included, ready for JSON."""
        return self.settings.model_dump(mode="json")

    @cached_property  # a sweep asks for it with every run
    def hash(self) -> str:
        """12 hex digits of SHA-256 over all settings that decide a run's numbers, the seed apart."""
        deciding = {k: v for k, v in self.values.items() if k not in NOT_HASHED and LATER.get(k, ...) != v}
        return hashlib.sha256(json.dumps(self.settings.only | deciding, sort_keys=True).encode()).hexdigest()[:12]


def resolve(
    values: dict[str, Any],
    *,
    source: str,
    settings_of: SettingsOf,
    methods: Sequence[str],
    backbones: Callable[[], Sequence[str]],
    faults: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Resolved:
    """Checks `values` against the method's settings; raises ConfigError with every fault, else returns the result.

    `methods` and `backbones` are the known names; `settings_of(method)` is the method's Settings class. `faults` are those
    found in reading; a key that one of them names gets no second fault. `notes` come before the result's own."""
    found = list(faults)
    method = values.get("model_name")
    known = isinstance(method, str) and method in methods
    if isinstance(method, str) and not known:
        found.append(f"model_name: {method!r} is not a method{nearest(method, methods)} (known: {', '.join(methods)})")
    schema = settings_of(str(method)) if known else Experiment
    dropped = sorted(k for k in values if k in (NEVER_ACTED | schema.ignored) and k not in schema.model_fields)
    given = {k: v for k, v in values.items() if k not in dropped}
    if not known:  # the method's own keys cannot be judged, the common ones can
        union = {k for m in methods for k in settings_of(m).accepted_keys()} | schema.accepted_keys()
        found += [f"{k or shown(k)}: unknown key{nearest(k, union)}" for k in given if k not in union]
        given = {k: v for k, v in given.items() if k in schema.model_fields}

    bad = {fault.partition(":")[0] for fault in found}
    settings: Experiment | None = None
    try:
        settings = schema.model_validate(given)
    except ValidationError as error:
        for item in error.errors():
            key = str(item["loc"][0])
            if key not in bad:
                others = {m: settings_of(m) for m in methods if m != method} if known else {}
                found.append(_explain(item, given.get(key), schema, str(method), others))
            bad.add(key)
        # what spans several keys is still judged: faulty ones get a default or stand-in, and no fault that involves them counts
        kept = {k: v for k, v in given.items() if k in schema.model_fields and k not in bad}
        if all(k in STAND_INS or not f.is_required() for k, f in schema.model_fields.items() if k not in kept):
            settings = schema.model_validate(STAND_INS | kept)
    if settings is not None:
        checks = [*_name_checks(settings, backbones), *settings.cross_checks()]
        found += [fault for keys, fault in checks if not bad.intersection(keys)]
    if found or settings is None:
        raise ConfigError(source, list(dict.fromkeys(found)))
    ignored = [f"these keys have no effect for {method} and are ignored: {', '.join(dropped)}"] if dropped else []
    return Resolved(settings, frozenset(given), (*notes, *ignored, *settings.remarks()))


def _name_checks(settings: Experiment, backbones: Callable[[], Sequence[str]]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Names and splits that need a look outside the file: data set, backbone, class count."""
    dataset, backbone = settings.dataset, settings.backbone_type
    if dataset not in data.DATASETS:
        sets = ", ".join(data.DATASETS)
        yield ("dataset",), f"dataset: {dataset!r} is not known{nearest(dataset, data.DATASETS)} (known: {sets})"
    else:
        path = Path(settings.data_path).expanduser() if settings.data_path else None
        count = data.count_classes(dataset, root=Path(settings.data_root).expanduser(), path=path)
        if count is not None and settings.init_cls > count:
            where = f"{path}" if path else dataset
            fault = f"init_cls: {settings.init_cls} classes in the first task, but {where} has only {count}"
            yield ("init_cls", "dataset", "data_path"), fault
        if count is not None and settings.class_order is not None and len(settings.class_order) != count:
            fault = f"class_order: has {len(settings.class_order)} classes, {path or dataset} has {count}"
            yield ("class_order", "dataset", "data_path"), fault
    if backbone not in (names := backbones()):
        yield (
            ("backbone_type",),
            (
                f"backbone_type: {backbone!r} is not known{nearest(backbone, names)} (known: embedded, SEMA-CL's names and "
                f"{len(names)} timm ViT names; `python main.py --list` shows them)"
            ),
        )


EXPECTED = {
    "int_type": "a whole number is expected",
    "float_type": "a number is expected",
    "bool_type": "true or false is expected",
    "string_type": "a text is expected",
    "tuple_type": "a list is expected",
}


def _explain(item: Any, value: Any, schema: Schema, method: str, others: Mapping[str, Schema]) -> str:
    """One pydantic error as one line for the user."""
    key, kind = str(item["loc"][0]), item["type"]
    if key in schema.only:
        return f"{key}: {method} implements only {shown(schema.only[key])}; got {shown(value)}"
    if kind == "extra_forbidden":
        owners = [name for name, other in others.items() if key in other.accepted_keys()]
        belongs = f" of {method}, it belongs to {', '.join(owners)}" if owners else ""
        return f"{key or shown(key)}: unknown key{belongs}{nearest(key, schema.model_fields)}"
    meaning = schema.model_fields[key].description or "see the method's file"
    if kind == "missing":
        return f"{key}: is missing ({meaning})"
    message = EXPECTED.get(kind) or item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if kind == "literal_error":
        message += nearest(str(value), re.findall("'([^']+)'", message))
    elif kind == "string_pattern_mismatch":
        message = "is not understood"
    elif isinstance(value, str) and kind in ("int_type", "float_type"):
        message += ", written without quotes"
    return f"{key}: {message}; got {shown(value)} ({meaning})"
