"""Reads an experiment's JSON: typed, closed and checked in full, with every fault in one message, before any work starts.

The file is flat and uses SEMA-CL's key names. `Experiment` holds the keys every method has; a method's `Settings` extends
it beside the method's own code (`models/<name>.py`). Nothing downstream reads a raw dict or writes to the result.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticUndefined

from utils import data

# Keys of SEMA-CL and LAMDA-PILOT files that no rehearsal-free method ever read. Accepted, and answered by one line.
NEVER_ACTED = frozenset({"memory_size", "memory_per_class", "fixed_memory", "vpt_type", "prompt_token_num"})
# Keys that say where and how a run happens but not what it computes: they stay out of the settings hash.
NOT_HASHED = frozenset({"about", "prefix", "seed", "device", "num_workers", "data_root", "eval_batch_size"})


class ConfigError(ValueError):
    """Bad input: every fault found in one experiment file, one a line."""

    def __init__(self, source: str, faults: Sequence[str]):
        self.faults = list(faults)
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__("\n  - ".join([f"{source}: {count}", *self.faults]))


def _as_tuple(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else value


def _as_device(value: Any) -> Any:
    """SEMA-CL writes `["0"]` for GPU 0 and `["-1"]` for the CPU; we also take auto, cpu, cuda and cuda:N."""
    if isinstance(value, list):
        if len(value) != 1:
            raise ValueError(f"one device is needed, such as [\"0\"], \"auto\" or \"cpu\"; got {len(value)} entries")
        value = value[0]
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, str) and value.lstrip("-").isdigit():
        return "cpu" if int(value) < 0 else f"cuda:{int(value)}"
    return value


class Experiment(BaseModel):
    """Keys every method understands."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())
    ignored: ClassVar[frozenset[str]] = frozenset()  # keys of other programs' files that never act for this method

    about: str = Field("", description="what the experiment is: source, what it shows, expected number, time, hardware")
    prefix: str = Field("", description="free label, shown in the banner")
    model_name: str = Field(description="method: a file name in models/")
    dataset: str = Field(description="data set, see --list")
    data_root: str = Field("data", description="folder that holds the data sets")
    data_path: str | None = Field(None, description="dataset 'folder' only: directory of class folders, or of train/ and test/")
    test_ratio: float = Field(0.2, gt=0, lt=1, description="dataset 'folder' without test/: share of each class held out for test")
    num_workers: int = Field(0, ge=0, le=64, description="processes that decode image files; results do not depend on it")
    init_cls: int = Field(ge=1, description="classes in the first task")
    increment: int = Field(ge=1, description="classes in each later task; the last task may have fewer")
    shuffle: bool = Field(True, description="permute the classes (numpy legacy generator, as SEMA-CL); false: natural order")
    class_order_seed: int | None = Field(None, ge=0, lt=2**32, description="seed of the class order; null: the run's seed, as SEMA-CL")
    seed: Annotated[tuple[int, ...], BeforeValidator(_as_tuple)] = Field((1993,), description="run seeds; each is one run")
    device: Annotated[str, BeforeValidator(_as_device)] = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description='auto, cpu, cuda, cuda:N, or SEMA-CL\'s ["N"]'
    )
    backbone_type: str = Field("embedded", description="embedded, a SEMA-CL backbone name, or any timm ViT (name or name.tag)")
    backbone_weights: str = Field("pretrained", description="pretrained, random, or the path of a .safetensors/.pth file")
    image_size: int | None = Field(None, ge=8, le=1024, description="side of the input in pixels; null: the backbone's own")
    input_normalisation: Literal["auto", "none", "backbone"] = Field(
        "auto", description="none: images in [0,1] as SEMA-CL; backbone: its mean and std; auto: none for SEMA-CL's names"
    )
    batch_size: int = Field(32, ge=1, description="training images per step")
    eval_batch_size: int = Field(256, ge=1, description="images per step in evaluation")

    def cross_checks(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Yields (keys involved, fault) for rules that span several keys. Skipped when one of the keys is itself faulty."""
        if len(set(self.seed)) != len(self.seed) or not self.seed:
            yield ("seed",), f"seed: a list of different whole numbers is expected, such as [1993, 1994]; got {list(self.seed)}"
        elif not all(0 <= s < 2**32 for s in self.seed):
            yield ("seed",), f"seed: every seed must lie in 0..{2**32 - 1}; got {list(self.seed)}"
        if (self.data_path is not None) != (self.dataset == "folder"):
            yield ("data_path", "dataset"), "data_path: is needed by, and only by, dataset 'folder'"


class Trained(Experiment):
    """Keys of every method that takes gradient steps."""

    optimizer: Literal["sgd", "adam"] = Field("sgd", description="sgd (momentum 0.9) or adam, which means AdamW as in SEMA-CL")
    init_lr: float = Field(0.01, gt=0, le=100, description="learning rate at the start of each phase")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the per-epoch cosine")
    weight_decay: float = Field(0.0005, ge=0, le=10, description="L2 penalty (sgd) or decoupled decay (adam)")

    def cross_checks(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().cross_checks()
        if self.min_lr > self.init_lr:
            yield ("min_lr", "init_lr"), f"min_lr: {self.min_lr} is above init_lr {self.init_lr}"


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

    @property
    def hash(self) -> str:
        """12 hex digits of SHA-256 over all settings that decide a run's numbers, the seed apart."""
        kept = {k: v for k, v in self.values.items() if k not in NOT_HASHED}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def nearest(name: str, known: Iterable[str]) -> str:
    """A did-you-mean clause for `name`, empty if nothing is close."""
    close = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def read_json(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The object in a JSON file and the faults a plain parser would let through: doubled keys, NaN, Infinity.

    Raises ConfigError if the file cannot be read as a JSON object at all."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        siblings = [str(p) for p in path.parent.glob("*.json")] if path.parent.is_dir() else []
        raise ConfigError(str(path), [f"there is no such file{nearest(str(path), siblings)}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), [f"is not UTF-8 text (byte {error.start}); save it as UTF-8"]) from None
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from None
    return parse_json(text, str(path))


def parse_json(text: str, source: str) -> tuple[dict[str, Any], list[str]]:
    """`read_json` on a string."""
    faults: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in items:
            if key in seen:
                faults.append(f"{key}: the key stands twice, with {seen[key]!r} and {value!r}; keep one")
            seen[key] = value
        return seen

    def number(token: str) -> float:
        value = float(token)
        if not math.isfinite(value):
            faults.append(f"{token}: is not a finite number")
        return value

    try:
        values = json.loads(text, object_pairs_hook=pairs, parse_constant=number, parse_float=number)
    except json.JSONDecodeError as error:
        raise ConfigError(source, [f"is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"]) from None
    except (RecursionError, ValueError) as error:
        raise ConfigError(source, [f"is not usable JSON: {error}"]) from None
    if not isinstance(values, dict):
        raise ConfigError(source, [f"a JSON object {{...}} is expected at the top, got {type(values).__name__}"])
    return values, faults


def parse_set(texts: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """`--set key=value` overrides: the value is read as JSON, else taken as a string."""
    values: dict[str, Any] = {}
    faults: list[str] = []
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            faults.append(f"--set {text}: key=value is expected")
            continue
        if key in values:
            faults.append(f"{key}: set twice on the command line")
        try:
            parsed, found = parse_json(f'{{"value": {value}}}', "--set")
            values[key] = parsed["value"] if set(parsed) == {"value"} else value
            faults += [f"{key}: {fault}" for fault in found]
        except ConfigError:
            values[key] = value
    return values, faults


def resolve(
    values: dict[str, Any],
    *,
    source: str,
    settings_of: Callable[[str], type[Experiment]],
    methods: Sequence[str],
    backbones: Callable[[], Sequence[str]],
    faults: Sequence[str] = (),
) -> Resolved:
    """Checks `values` against the method's settings; raises ConfigError with every fault, else returns the result.

    `methods` and `backbones` are the known names; `settings_of(method)` is the method's Settings class."""
    found = list(faults)
    method = values.get("model_name")
    known = isinstance(method, str) and method in methods
    if isinstance(method, str) and not known:
        found.append(f"model_name: {method!r} is not a method{nearest(method, methods)} (known: {', '.join(methods)})")
    schema = settings_of(str(method)) if known else Experiment
    dropped = sorted(k for k in values if k in (NEVER_ACTED | schema.ignored) and k not in schema.model_fields)
    given = {k: v for k, v in values.items() if k not in dropped}
    if not known:  # the method's own keys cannot be judged, the common ones can
        union = {k for m in methods for k in settings_of(m).model_fields} | set(schema.model_fields)
        strange = [k for k in given if k not in union]
        found += [f"{k}: unknown key{nearest(k, union)}" for k in strange]
        given = {k: v for k, v in given.items() if k in schema.model_fields}

    bad: set[str] = set()
    try:
        settings = schema.model_validate(given)
    except ValidationError as error:
        for item in error.errors():
            bad.add(str(item["loc"][0]))
            found.append(_explain(item, schema, str(method), methods if known else (), settings_of))
        good = {k: schema.__pydantic_fields__[k].get_default() for k in schema.model_fields}
        good |= {k: v for k, v in given.items() if k in schema.model_fields and k not in bad}
        bad |= {k for k, v in good.items() if v is PydanticUndefined}
        settings = schema.model_construct(**_coerced(schema, good))
    checks = [*_name_checks(settings, backbones), *settings.cross_checks()]
    found += [fault for keys, fault in checks if not bad.intersection(keys)]
    if found:
        raise ConfigError(source, list(dict.fromkeys(found)))
    notes = [f"these keys never act for {method} and are ignored: {', '.join(dropped)}"] if dropped else []
    return Resolved(settings, frozenset(given), tuple(notes))


def _coerced(schema: type[Experiment], values: dict[str, Any]) -> dict[str, Any]:
    """Values as validation would store them (a seed 5 becomes (5,)), for cross-checks beside other faults."""
    convert = {"seed": _as_tuple, "device": _as_device}
    return {k: convert[k](v) if k in convert and v is not PydanticUndefined else v for k, v in values.items()}


def _name_checks(settings: Experiment, backbones: Callable[[], Sequence[str]]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Names and splits that need a look outside the file: data set, backbone, class count."""
    dataset, backbone = getattr(settings, "dataset", None), settings.backbone_type
    if isinstance(dataset, str) and dataset not in data.DATASETS:
        sets = ", ".join(data.DATASETS)
        yield ("dataset",), f"dataset: {dataset!r} is not known{nearest(dataset, data.DATASETS)} (known: {sets})"
    elif isinstance(dataset, str):
        path = Path(settings.data_path) if settings.data_path else None
        count = data.count_classes(dataset, root=Path(settings.data_root), path=path)
        first = settings.init_cls if isinstance(getattr(settings, "init_cls", None), int) else 0
        if count is not None and first > count:
            yield ("init_cls", "dataset"), f"init_cls: {first} classes in the first task, but {dataset} has only {count}"
    if isinstance(backbone, str) and backbone not in (names := backbones()):
        yield ("backbone_type",), (
            f"backbone_type: {backbone!r} is not known{nearest(backbone, names)} (known: embedded, SEMA-CL's names and "
            f"{len(names)} timm ViT names; `python main.py --list` shows them)"
        )


def _explain(
    item: Any, schema: type[Experiment], method: str, methods: Sequence[str], settings_of: Callable[[str], type[Experiment]]
) -> str:
    """One pydantic error as one line for the user."""
    key, kind = str(item["loc"][0]), item["type"]
    if kind == "extra_forbidden":
        owners = [m for m in methods if m != method and key in settings_of(m).model_fields]
        belongs = f" of {method}, it belongs to {', '.join(owners)}" if owners else ""
        return f"{key}: unknown key{belongs}{nearest(key, schema.model_fields)}"
    meaning = schema.model_fields[key].description or ""
    if kind == "missing":
        return f"{key}: is missing ({meaning})"
    message = item["msg"].removeprefix("Value error, ")
    return f"{key}: {message[0].lower() + message[1:]}; got {item['input']!r} ({meaning})"
