"""Experiment files of an older program, Nested-LoRA (github.com/motsun1/Nested-LoRA): its names and defaults become ours.

Files of SEMA-CL need no translation, since our names are theirs. Every change is reported in a note, one line each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from utils.config.schema import WITHOUT_EFFECT, Trained
from utils.text import shown

_BACKBONE = "pretrained_vit_b16_224_nested_lora"
_SAME_BACKBONE = "pretrained_vit_b16_224_adapter"  # both load timm's vit_base_patch16_224 and feed it [0,1]
_EVALUATED = {"none": "combined", "fast_only": "fast", "slow_only": "slow"}
# Keys of the competition between experts, which its SEMA and its plain chain never read.
_COMPETITION = ("nb_tasks", "moe_mode", "moe_val_ratio", "fast_lr_multipliers")
# The program's defaults for keys that a file does not set, as far as they are choices ...
_DEFAULTS = {
    "nested_lora_use_consolidation": False,
    "nested_lora_consolidation_method": "task_arithmetic",
    "nested_lora_consolidation_alpha": 0.1,
}
_SEMA_RATES = {"nested_lora_lr_fast": 0.01, "nested_lora_lr_slow": 0.001}
_FAST_FACTOR = 5  # fast rate of the chain and the competition, in multiples of init_lr
# ... and as far as they are faults: the values that restore them.
_FAULTS: dict[str, dict[str, Any]] = {
    "sema": {"nested_lora_reset": "zero"},
    "nested_lora": {"nested_lora_reset": "zero", "decay_other_rows": True},
    "moe_parallel": {
        "nested_lora_reset": "zero",
        "decay_other_rows": True,
        "moe_loss": "mean",
        "moe_reset": "winner",
        "moe_eval": "sum",
    },
}


def translate(written: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """(values in our names, notes to show, faults where an old and a new name of one key are both set) of a file's values.

    A file counts as Nested-LoRA's if it has one of the keys without effect (`memory_size` ...) or that program's backbone
    name. Only then its defaults are filled in, and "pam" means its mask of equal signs."""
    values = dict(written)
    faults: list[str] = []
    read: list[str] = []  # "old name as new name"
    old = bool(WITHOUT_EFFECT & values.keys()) or values.get("backbone_type") == _BACKBONE

    if values.get("backbone_type") == _BACKBONE:
        values["backbone_type"] = _SAME_BACKBONE
        read.append(f"backbone_type {_BACKBONE} as {_SAME_BACKBONE} (the same checkpoint)")
    dropped = _name_the_competition(values, read, faults, old)
    if "nested_lora_eval_ablation" in values:
        ablation = values.pop("nested_lora_eval_ablation")
        evaluated = _EVALUATED.get(ablation) if isinstance(ablation, str) else None
        if evaluated is None:
            faults.append(f"nested_lora_eval_ablation: none, fast_only or slow_only is expected; got {shown(ablation)}")
        elif "nested_lora_eval" in values:
            faults.append("nested_lora_eval: nested_lora_eval_ablation is its older name; keep one of the two")
        else:
            values["nested_lora_eval"] = evaluated
            read.append(f"nested_lora_eval_ablation {ablation} as nested_lora_eval {evaluated}")
    if old and values.get("nested_lora_consolidation_method") == "pam":
        values["nested_lora_consolidation_method"] = "pam_lite"
        read.append(
            "nested_lora_consolidation_method pam as pam_lite, its mask of equal signs (our pam is another method)"
        )

    notes = []
    if read:
        notes.append(f"names of Nested-LoRA, read as ours: {'; '.join(read)}")
    if dropped:
        notes.append(
            f"keys of the competition, which Nested-LoRA's {written['model_name']} never read: {', '.join(dropped)}"
        )
    if old and _is_nested(values):
        notes += _fill(values)
    return values, notes, faults


def as_written(fault: str, written: Mapping[str, Any]) -> str:
    """A fault of a key of ours under the name that the user wrote. `written`: the values of the file and the command line."""
    key = fault.partition(":")[0]
    older = {"num_experts": "nb_tasks", "nested_lora_eval": "nested_lora_eval_ablation"}.get(key)
    if older is None or older not in written or key in written:
        return fault
    return f"{older} (an older name of {key}){fault.removeprefix(key)}"


def _name_the_competition(values: dict[str, Any], read: list[str], faults: list[str], old: bool) -> list[str]:
    """Its one method with `nb_tasks` or `moe_mode` becomes our method moe_parallel. Returns keys that had no effect there and
    are dropped."""
    method, mode, count = values.get("model_name"), values.get("moe_mode"), values.get("nb_tasks")
    if method == "nested_lora" and ("nb_tasks" in values or mode in ("parallel", "standard")):
        if mode == "parallel" or (mode in (None, "standard") and count not in (None, 1)):
            values["model_name"] = "moe_parallel"
            values["moe_mode"] = "parallel" if mode == "parallel" else "task"
            sign = "moe_mode parallel" if mode == "parallel" else "several nb_tasks"
            read.append(f"model_name nested_lora with {sign} as moe_parallel, moe_mode {values['moe_mode']}")
        elif mode in (None, "standard"):
            return [key for key in _COMPETITION if values.pop(key, None) is not None]
    elif method == "sema" and (old or "nb_tasks" in values):
        return [key for key in _COMPETITION if values.pop(key, None) is not None]
    if "nb_tasks" in values:
        values.pop("nb_tasks")
        if "num_experts" in values:
            faults.append("num_experts: nb_tasks is its older name; keep one of the two")
        else:
            values["num_experts"] = count
            read.append("nb_tasks as num_experts")
    return []


def _is_nested(values: Mapping[str, Any]) -> bool:
    method = values.get("model_name")
    return method in ("nested_lora", "moe_parallel") or (
        method == "sema" and values.get("ffn_adapter_type") == "nested_lora"
    )


def _fill(values: dict[str, Any]) -> list[str]:
    """Adds the program's defaults for keys that the file does not set; returns a note on them, and one on the program's faults,
    which stay off."""
    method, notes = values["model_name"], []
    defaults: dict[str, Any] = dict(_DEFAULTS)
    rate = values.get("init_lr", Trained.model_fields["init_lr"].default)
    if method == "sema":
        defaults |= _SEMA_RATES
    elif isinstance(rate, int | float) and not isinstance(rate, bool):
        defaults |= {"nested_lora_lr_fast": _FAST_FACTOR * rate, "nested_lora_lr_slow": rate}
    if filled := {key: value for key, value in defaults.items() if key not in values}:
        values |= filled
        notes.append(f"the file does not set these keys, so they get Nested-LoRA's defaults: {_listed(filled)}")
    faults = {key: value for key, value in _FAULTS[method].items() if key not in values}
    without_effect = ["nested_lora_reset", "moe_reset"] if not values["nested_lora_use_consolidation"] else []
    if values.get("moe_mode") == "task":
        without_effect += ["moe_loss", "moe_reset"]
    faults = {key: value for key, value in faults.items() if key not in without_effect}
    if faults:
        notes.append(f"faults of Nested-LoRA stay off; these values restore them: {_listed(faults)}")
    return notes


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {shown(value)}" for key, value in values.items())
