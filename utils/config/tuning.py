"""The key `tune` of an experiment file: the small space that `--tune` searches, and `tuned`, what it writes about its choice.

`tune` is not among the settings; `tuned` is, without a part in their hash, so that a run's config.json says where they come
from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from utils.config.strict_json import parse_set
from utils.text import nearest, shown

# Settings on other data or other tasks have no comparable accuracies; seeds are stated apart.
_NOT_TUNED = frozenset(
    {
        "dataset",
        "data_root",
        "data_path",
        "data_split",
        "test_ratio",
        "skip_broken",
        "grey_bits",
        "init_cls",
        "increment",
    }
    | {"shots", "imbalance", "imbalance_order", "subset_seed"}
    | {"shuffle", "class_order_seed", "class_order", "seed", "about", "expected", "tuned", "sweep", "tune"}
)


class Declared(BaseModel):
    """What `--tune` tries, and on which part of the training data."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    space: dict[str, list[Any]] = Field({}, description="{key: [values]}, all combinations")
    tasks: int | None = Field(1, ge=1, description="first tasks that are learned; null: all")
    seeds: list[int] | None = Field(None, min_length=1, description="seeds and class orders; null: the file's first")
    held_out: float = Field(0.2, gt=0, lt=1, description="share of each class's training images that scores")

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: list[int] | None) -> list[int] | None:
        if seeds is not None and (len(set(seeds)) != len(seeds) or not all(0 <= seed < 2**32 for seed in seeds)):
            raise ValueError(f"different seeds in 0..{2**32 - 1} are expected")
        return seeds


class Tuned(BaseModel):
    """How `--tune` chose the settings of a file: what it tried, on what, and every score."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    space: dict[str, list[Any]] = Field(description="the values that were tried of each key, in all combinations")
    chosen: dict[str, Any] = Field(description="the values with the best mean over the seeds of average accuracy")
    scores: list[dict[str, Any]] = Field(
        description="of each setting, by seed: average and last accuracy (percent) on the held-out images"
    )
    tasks: int = Field(ge=1, description="first tasks that were learned")
    seeds: list[int] = Field(description="seeds of the runs, which draw the class orders too")
    held_out: dict[str, Any] = Field(description="share of each class, number of images, digest of their row numbers")
    data: str = Field(description="digest of the training images; no test image was read")
    weights: str = Field(description="hash of the backbone's weights")
    commit: str | None = Field(description="commit of the program; null: not known")
    changed: bool = Field(description="whether files of the program differed from that commit")


def declared(spec: Any, flags: Sequence[str] = ()) -> tuple[Declared, list[str]]:
    """(what the key `tune` says with the space of `--tune KEY=[VALUES] ...` in the place of its own, faults)."""
    values, faults = parse_set(flags)
    faults = [fault.replace("--set ", "--tune ", 1) for fault in faults]
    if spec is not None and not isinstance(spec, Mapping):
        form = 'an object such as {"space": {"init_lr": [0.01, 0.02]}} is expected'
        return Declared.model_validate({}), [*faults, f"tune: {form}; got {shown(spec)}"]
    stated = dict(spec or {}) | ({"space": values} if values else {})
    try:
        read = Declared.model_validate(stated)
    except ValidationError as error:
        faults += [_explained(item) for item in error.errors(include_url=False)]
        return Declared.model_validate({}), faults
    faults += [
        f"tune: {key}: decides data, tasks or seeds and cannot be tuned" for key in read.space if key in _NOT_TUNED
    ]
    return read, faults


def _explained(item: Any) -> str:
    """An error of pydantic as one line for the user."""
    place = ".".join(map(str, item["loc"][:2]))
    if item["type"] == "extra_forbidden":
        return f"tune: {place}: unknown; known are {', '.join(Declared.model_fields)}{nearest(place, Declared.model_fields)}"
    expected = {"list_type": "a list is expected", "dict_type": "an object {key: [values]} is expected"}
    message = expected.get(item["type"], item["msg"].removeprefix("Value error, ").replace("Input should", "should"))
    return f"tune: {place}: {message}; got {shown(item['input'])}"
