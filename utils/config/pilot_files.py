"""Experiment files of LAMDA-PILOT (github.com/sun-hailong/LAMDA-PILOT) for the methods that are here: its names become ours.

Read from its exps/*.json, models/*.py and utils/inc_net.py. Its environment pins timm 0.6.12, where `vit_base_patch16_224`
is the AugReg checkpoint that backbone/catalogue.py has under the name `pretrained_vit_b16_224`; today's timm takes another
one by that name. What has no counterpart is refused in one line. Every change is reported in a note.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from utils.text import shown

# A file counts as LAMDA-PILOT's if it has one of these, which it writes and never reads in a method without rehearsal.
_MARKS = frozenset({"memory_size", "memory_per_class", "fixed_memory", "convnet_type", "get_original_convnet"})
_KEYS = {"convnet_type": "backbone_type", "get_original_convnet": "get_original_backbone"}  # until 2023
_METHODS = {"adam_adapter": "aper_adapter", "dual_prompt": "dualprompt", "ranpac_adapter": "ranpac"}
_METHODS |= {"ranpac-phase2": "ranpac"}  # its files have tuned_epoch 0: nothing is adapted
_BACKBONES = {
    "vit_base_patch16_224": "pretrained_vit_b16_224",
    "vit_base_patch16_224_in21k": "pretrained_vit_b16_224_in21k",
    "vit_base_patch16_224_dual_prompt": "vit_base_patch16_224_dualprompt",
}
# Variants of methods that are here, with what they train instead.
_VARIANTS = {"finetune": "the whole ViT", "ssf": "scales and shifts (SSF)", "vpt": "input prompts (VPT)"}
# Values that its files have and that this program has alone.
_ONE_VALUE: dict[str, Any] = {
    "pretrained": True,
    "drop": 0.0,
    "drop_path": 0.0,
    "reinit_optimizer": True,
    "get_original_backbone": True,
    "global_pool": "token",
    "initializer": "uniform",
    "freeze": ["blocks", "patch_embed", "cls_token", "norm", "pos_embed"],
}
# What its code does where the file is silent, and our default does not.
_SILENT: dict[str, dict[str, Any]] = {"finetune": {"trainable": "backbone", "mask_old_classes": True}}
# Faults and other forms of its code, which stay off (docs/originals.md).
_FORMS: dict[str, dict[str, Any]] = {
    "l2p": {"decay_other_rows": True},
    "dualprompt": {"scrambled_e_prompt": True, "decay_other_rows": True},
    "coda_prompt": {"cosine_off_by_one": True, "drop_last": True, "decay_other_rows": True},
    "ranpac": {"ranpac_scores": "cosine", "ranpac_ridge": "task"},
    "slca": {"ca_task_by_size": True},
}


def translate(written: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """(values in our names, notes to show, faults) of a file's values; a file without a mark of LAMDA-PILOT stays as it is."""
    values = dict(written)
    if not _MARKS & values.keys():
        return values, [], []
    faults: list[str] = []
    read: list[str] = []
    for old, new in _KEYS.items():
        if old in values and new in values:
            values.pop(old)
            faults.append(f"{new}: {old} is its older name; keep one of the two")
        elif old in values:
            values[new] = values.pop(old)
            read.append(f"{old} as {new}")
    faults += _no_counterpart(values)
    for key, names in (("model_name", _METHODS), ("backbone_type", _BACKBONES)):
        if isinstance(name := values.get(key), str) and name in names:
            values[key] = names[name]
            read.append(f"{key} {name} as {names[name]}")
    if isinstance(three := values.get("prompt_param"), list):  # components and length are counts, written 8.0
        values["prompt_param"] = [
            int(n) if k < 2 and isinstance(n, float) and n == int(n) else n for k, n in enumerate(three)
        ]
    method = str(values.get("model_name"))
    silent = {key: value for key, value in _SILENT.get(method, {}).items() if key not in values}
    notes = [f"names of LAMDA-PILOT, read as ours: {'; '.join(read)}"] if read else []
    if silent:
        notes.append(f"the file does not set these keys, so they get LAMDA-PILOT's values: {_listed(silent)}")
    if forms := {key: value for key, value in _FORMS.get(method, {}).items() if key not in values}:
        notes.append(
            f"forms of LAMDA-PILOT's code stay off (docs/originals.md); these values restore them: {_listed(forms)}"
        )
    return values | silent, notes, faults


def _no_counterpart(values: dict[str, Any]) -> list[str]:
    """A line for the method, or else for each key, that this program cannot do; a backbone that goes with such a method is
    replaced, so that it is no second fault."""
    method, backbone = values.get("model_name"), values.get("backbone_type")
    family, _, variant = str(method).partition("_")
    if family in ("adam", "aper", "ranpac") and variant in _VARIANTS:
        values["backbone_type"] = "pretrained_vit_b16_224"
        here = "ranpac" if family == "ranpac" else "aper_adapter"
        return [
            f"model_name: LAMDA-PILOT's {method} trains {_VARIANTS[variant]} in the first task, which has no counterpart here; "
            f"{here} trains adapters instead"
        ]
    lines = []
    ending = str(backbone).rpartition("_")[2]
    if ending in ("ssf", "vpt"):
        values["backbone_type"] = "pretrained_vit_b16_224"
        lines.append(f"backbone_type: {backbone} has {_VARIANTS[ending]}, which have no counterpart here")
    elif str(backbone).startswith(("resnet", "cosine_resnet")):
        values["backbone_type"] = "pretrained_vit_b16_224"
        lines.append(f"backbone_type: {backbone} is a convolutional network, which has no counterpart here; take a ViT")
    for key, value in _ONE_VALUE.items():
        if key in values and not (values[key] == value and isinstance(values[key], bool) == isinstance(value, bool)):
            lines.append(f"{key}: {shown(values[key])} has no counterpart here, only {shown(value)} has")
    return lines


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {shown(value)}" for key, value in values.items())
