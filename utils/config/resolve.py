"""From the values of an experiment file to checked, frozen settings; all faults in one message."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ValidationError

from utils import data
from utils.config import common_names
from utils.config.hashing import settings_hash
from utils.config.schema import WITHOUT_EFFECT, Experiment
from utils.config.strict_json import MOST_FAULTS, ConfigError
from utils.text import counted, nearest, shown

Schema = type[Experiment]
SettingsOf = Callable[[str], Schema]

# Values for required keys that are missing or faulty, so that rules over the other keys can still be checked.
STAND_INS = {"model_name": "", "dataset": "digits", "init_cls": 1, "increment": 1}


class NothingBeside(BaseModel):
    """For files that hold the settings of a method alone."""


@dataclass(frozen=True)
class Resolved:
    """A checked experiment: `settings`, the keys that the user wrote, and `notes` to show once.

    `beside`: what the file says apart from the settings of the method, such as the keys of a cluster."""

    settings: Experiment
    given: frozenset[str]
    notes: tuple[str, ...]
    beside: BaseModel = field(default_factory=NothingBeside)

    @property
    def values(self) -> dict[str, Any]:
        """Every key of the settings with its value, defaults included, as config.json has them."""
        return self.settings.model_dump(mode="json")

    @property
    def all_values(self) -> dict[str, Any]:
        """The settings and what the file says beside them."""
        return self.values | self.beside.model_dump(mode="json")

    @property
    def stated(self) -> dict[str, Any]:
        """The settings, and of the keys beside them those that the user wrote."""
        return {k: v for k, v in self.all_values.items() if k in type(self.settings).model_fields or k in self.given}

    def descriptions(self) -> dict[str, str]:
        """What each key means, with unit and source."""
        beside = {key: field.description or "" for key, field in type(self.beside).model_fields.items()}
        return beside | self.settings.descriptions()

    @cached_property  # a sweep asks for it with every run
    def hash(self) -> str:
        """The hash of the settings that decide a run's numbers, see utils/config/hashing.py; it names the run folder."""
        return settings_hash(self.settings.only | self.values)


def resolve(
    values: dict[str, Any],
    *,
    source: str,
    settings_of: SettingsOf,
    methods: Sequence[str],
    backbones: Callable[[], Sequence[str]],
    faults: Sequence[str] = (),
    notes: Sequence[str] = (),
    beside: type[BaseModel] = NothingBeside,
) -> Resolved:
    """Checks `values` against the settings of their method; raises ConfigError with every fault, else returns the result.

    `methods` and `backbones` are the known names; `settings_of(method)` is the method's Settings class. `faults` come from
    reading the file; a key that one of them names gets no second fault. `notes` precede those of the settings. `beside` is
    the model of keys that the file may hold apart from them."""
    all_faults = list(faults)
    method = values.get("model_name")
    known = isinstance(method, str) and method in methods
    if isinstance(method, str) and not known and not any(fault.startswith("model_name: ") for fault in faults):
        suggestion = nearest(method, methods)
        all_faults.append(f"model_name: {method!r} is not a method{suggestion} (known: {', '.join(methods)})")
    schema = settings_of(str(method)) if known else Experiment
    aliases = {k: n for n, k in common_names.of(schema.model_fields).items() if n in values and k not in values}
    all_faults += common_names.clashes(values, schema.model_fields, str(method))
    values = common_names.read(values, schema.model_fields)
    dropped = sorted(k for k in values if k in (WITHOUT_EFFECT | schema.ignored) and k not in schema.model_fields)
    checked = {k: v for k, v in values.items() if k not in dropped}
    apart = {k: checked.pop(k) for k in list(checked) if k in beside.model_fields}
    if not known:  # the keys of an unknown method cannot be judged, the common ones can
        union = (
            {k for other in _others(methods, settings_of).values() for k in other.accepted_keys()}
            | schema.accepted_keys()
            | beside.model_fields.keys()
        )
        foreign = [k for k in checked if k not in union]  # there may be absurdly many
        near = {k: nearest(k, union) for k in foreign[:MOST_FAULTS]}
        all_faults += [f"{k or shown(k)}: unknown key{near.get(k, '')}" for k in foreign]
        checked = {k: v for k, v in checked.items() if k in schema.model_fields}

    faulty = {fault.partition(":")[0] for fault in all_faults}
    keys_beside: BaseModel = NothingBeside()
    try:
        keys_beside = beside.model_validate({k: v for k, v in apart.items() if k not in faulty})
    except ValidationError as error:
        for item in error.errors():
            all_faults.append(_explain(item, apart[str(item["loc"][0])], beside, str(method), {}))
    settings: Experiment | None = None
    try:
        settings = schema.model_validate(checked)
    except ValidationError as error:
        others = {m: s for m, s in _others(methods, settings_of).items() if m != method} if known else {}
        for number, item in enumerate(error.errors(include_url=False, include_input=False)):
            key = str(item["loc"][0])
            if key not in faulty and number < MOST_FAULTS:
                all_faults.append(_explain(item, checked.get(key), schema, str(method), others, beside.model_fields))
            elif key not in faulty:
                all_faults.append(f"{key}: {item['type'].replace('_', ' ')}")
            faulty.add(key)
        settings = _without_faulty(schema, checked, faulty)
    if settings is not None:
        checks = [*_name_checks(settings, backbones), *settings.cross_checks()]
        all_faults += [fault for keys, fault in checks if not faulty.intersection(keys)]
    if all_faults or settings is None:
        raise ConfigError(source, [_as_written(f, aliases, str(method)) for f in dict.fromkeys(all_faults)])
    ignored = [f"these keys have no effect for {method} and are ignored: {', '.join(dropped)}"] if dropped else []
    return Resolved(settings, frozenset(checked | apart), (*notes, *ignored, *settings.remarks()), keys_beside)


def _as_written(fault: str, aliases: Mapping[str, str], method: str) -> str:
    """A fault of a key that the user wrote by its common name."""
    key, colon, rest = fault.partition(":")
    return f"{aliases[key]} ({key} in {method}){colon}{rest}" if key in aliases else fault


def _others(methods: Sequence[str], settings_of: SettingsOf) -> dict[str, Schema]:
    """The settings of the methods, but of those whose file cannot be read: that is no fault of another method's experiment."""
    schemas = {}
    for method in methods:
        with suppress(Exception):  # whatever a file does that somebody is just writing
            schemas[method] = settings_of(method)
    return schemas


def _without_faulty(schema: Schema, values: Mapping[str, Any], faulty: set[str]) -> Experiment | None:
    """Settings with a default or stand-in for each faulty key, so that rules over several keys can still be checked. None if
    a required key has neither."""
    sound = {k: v for k, v in values.items() if k in schema.model_fields and k not in faulty}
    if all(k in STAND_INS or not f.is_required() for k, f in schema.model_fields.items() if k not in sound):
        return schema.model_validate(STAND_INS | sound)
    return None


def _name_checks(settings: Experiment, backbones: Callable[[], Sequence[str]]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Faults that need facts outside the file: names of data set and backbone, number of classes."""
    dataset, backbone = settings.dataset, settings.backbone_type
    if dataset not in data.DATASETS:
        sets = ", ".join(data.DATASETS)
        yield ("dataset",), f"dataset: {dataset!r} is not known{nearest(dataset, data.DATASETS)} (known: {sets})"
    else:
        path = settings.data_path
        count = data.count_classes(dataset, **data.places(settings))
        if count is not None and settings.init_cls > count:
            name = f"{path}" if path else dataset
            fault = f"init_cls: {counted(settings.init_cls, 'class', 'classes')} in the first task, but {name} has only {count}"
            yield ("init_cls", "dataset", "data_path"), fault
        elif count is not None and not isinstance(sizes := settings.increment, int):
            together = settings.init_cls + sum(sizes)
            stated = (
                f"init_cls {settings.init_cls} and {shown(list(sizes))} make {counted(together, 'class', 'classes')}"
            )
            if together != count:
                fault = f"increment: {stated}, {path or dataset} has {count}"
                yield ("increment", "init_cls", "dataset", "data_path"), fault
        if count is not None and settings.class_order is not None and len(settings.class_order) != count:
            fault = f"class_order: has {counted(len(settings.class_order), 'class', 'classes')}, {path or dataset} has {count}"
            yield ("class_order", "dataset", "data_path"), fault
    if backbone not in (names := backbones()):
        yield (
            ("backbone_type",),
            (
                f"backbone_type: {backbone!r} is not known{nearest(backbone, names)} (known: embedded, SEMA-CL's names and "
                f"{len(names)} timm ViT names; `python main.py --list backbones WORD` shows them)"
            ),
        )


EXPECTED = {
    "int_type": "a whole number is expected",
    "float_type": "a number is expected",
    "bool_type": "true or false is expected",
    "string_type": "a text is expected",
    "tuple_type": "a list is expected",
}


def _explain(
    item: Any,
    value: Any,
    schema: type[BaseModel],
    method: str,
    others: Mapping[str, Schema],
    beside: Iterable[str] = (),
) -> str:
    """An error of pydantic as one line for the user."""
    key, kind = str(item["loc"][0]), item["type"]
    if issubclass(schema, Experiment) and key in schema.only:
        return f"{key}: {method} implements only {shown(schema.only[key])}; got {shown(value)}"
    if kind == "extra_forbidden":
        owners = [name for name, other in others.items() if key in other.accepted_keys()]
        belongs = f" of {method}, it belongs to {', '.join(owners)}" if owners else ""
        return f"{key or shown(key)}: unknown key{belongs}{nearest(key, [*schema.model_fields, *beside])}"
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
