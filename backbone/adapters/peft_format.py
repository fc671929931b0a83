"""LoRA to and from the files of the `peft` library: `adapter_config.json` and `adapter_model.safetensors`.

Written for peft on the timm model itself: `PeftModel.from_pretrained(vit, folder)`. Reading is strict: any setting with
which peft would compute another function is refused by name. Needs no peft, unpickles nothing. Format as peft 0.21 writes it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from backbone.adapters.lora import TARGETS, LoRA, Site, linear_of
from backbone.vit import SlottedViT
from utils.config.strict_json import read_json
from utils.files.storage import write_bytes, write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TARGET = {module: target for target, module in TARGETS.items()}
_NAME = re.compile(
    rf"base_model\.model\.blocks\.(0|[1-9]\d*)\.({'|'.join(map(re.escape, _TARGET))})\.lora_([AB])\.weight"
)

# Keys of peft's LoraConfig that do not change what saved weights compute, beside those that are read. Any other key with a
# value that is not empty or false (use_dora, use_rslora, modules_to_save, what a later peft adds ..) is refused.
_HARMLESS = {"auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern"}
_HARMLESS |= {"layers_to_transform", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision"}
_HARMLESS |= {"target_modules", "task_type"}
_READ = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"}
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")  # other starts (pissa, olora ..) change the frozen weights


def save_peft(folder: Path, loras: Mapping[Site, LoRA], base_model: str | None = None) -> None:
    """Writes one LoRA a linear layer, by (layer, target). `base_model`: the frozen model's name, for the reader.

    `backbone.experts.routed.loras_of` gives them for an expert, also for one that others were merged into. Ranks and
    alphas may differ between the layers.
    Raises ValueError if there is nothing to write."""
    if not loras:
        raise ValueError("there is no LoRA to export")
    modules = {where: _module(where) for where in sorted(loras)}
    rank = Counter(lora.rank for lora in loras.values()).most_common(1)[0][0]
    alpha = Counter(lora.alpha for lora in loras.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "target_modules": list(modules.values()),  # in full: a bare "proj" would also mean the patch embedding's
        "r": rank,
        "rank_pattern": {modules[w]: lora.rank for w, lora in loras.items() if lora.rank != rank},
        "lora_alpha": alpha,
        "alpha_pattern": {modules[w]: lora.alpha for w, lora in loras.items() if lora.alpha != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "fan_in_fan_out": False,
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
    }
    tensors = {}
    for where, module in modules.items():
        for letter, tensor in (("A", loras[where].down), ("B", loras[where].up)):
            tensors[f"base_model.model.{module}.lora_{letter}.weight"] = tensor.detach().cpu().contiguous().clone()
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / WEIGHTS, save(tensors, {"format": "pt"}))
    write_json(folder / CONFIG, config)


def load_peft(folder: Path, backbone: SlottedViT) -> dict[Site, LoRA]:
    """The LoRA in `folder` by (layer, target), in the backbone's precision and on its device.

    A `backbone.adapters.lora.Bundle` of a layer's LoRAs is an expert for a `backbone.experts.routed.RoutedLinears`. peft's
    dropout is a setting of training and is not read. Raises ValueError with the file and the fault if the adapter is
    incomplete, damaged, anything but plain LoRA, or does not fit the backbone."""
    config = _read_config(folder / CONFIG)
    loras = {}
    for where, (down, up) in _read_pairs(folder / WEIGHTS, backbone).items():
        linear, rank = linear_of(backbone, *where), len(down)
        module = _module(where)
        if rank != (said := _of(config, "rank_pattern", "r", module)):
            raise ValueError(f"{folder / CONFIG}: {module} has rank {said} there, {rank} in {WEIGHTS}")
        lora = LoRA(linear.in_features, linear.out_features, rank, _of(config, "alpha_pattern", "lora_alpha", module))
        lora.to(linear.weight)
        with torch.no_grad():
            lora.down.copy_(down)
            lora.up.copy_(up)
        loras[where] = lora
    return loras


def _module(where: Site) -> str:
    """timm's name of a linear layer, which peft goes by."""
    return f"blocks.{where[0]}.{TARGETS[where[1]]}"


def _read_config(path: Path) -> dict[str, Any]:
    """Raises ValueError with every fault."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}; a folder with {CONFIG} and {WEIGHTS} is expected")
    config, faults = read_json(path)
    if config.get("peft_type") != "LORA":
        faults.append(f"peft_type: 'LORA' is expected, got {config.get('peft_type')!r}")
    if config.get("bias", "none") != "none":
        faults.append(f"bias: 'none' is expected, a LoRA here has no biases; got {config['bias']!r}")
    if (start := config.get("init_lora_weights", True)) not in _PLAIN_STARTS:
        faults.append(f"init_lora_weights: {start!r} changes the frozen weights; convert it in peft to a plain LoRA")
    for key, pattern_key, whole in (("r", "rank_pattern", True), ("lora_alpha", "alpha_pattern", False)):
        pattern = config.setdefault(pattern_key, {})
        if not isinstance(pattern, dict):
            faults.append(f"{pattern_key}: an object of module names and numbers is expected, got {pattern!r}")
            continue
        for name, value in ((key, config.get(key)), *pattern.items()):
            fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if not fits or not -1e9 < value < 1e9 or (whole and value < 1):
                faults.append(
                    f"{name}: {'a rank, a whole number from 1' if whole else 'a number'} is expected, got {value!r}"
                )
    faults += [
        f"{key}: {value!r} changes what the adapter computes and cannot be read here; only plain LoRA can"
        for key, value in config.items()
        if value and key not in _HARMLESS | _READ
    ]
    if faults:
        raise ValueError("\n  - ".join([f"{path} is no plain LoRA:", *faults]))
    return config


def _of(config: dict[str, Any], pattern: str, default: str, module: str) -> Any:
    """The module's value by peft's rule: the first pattern that matches the end of its name, else the default."""
    for key, value in config[pattern].items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as error:
            raise ValueError(f"{CONFIG}: {pattern} key {key!r} is no pattern ({error})") from None
    return config[default]


def _read_pairs(path: Path, backbone: SlottedViT) -> dict[Site, tuple[Tensor, Tensor]]:
    """A [R, I] and B [O, R] by site. Raises ValueError with the full list of tensors that do not fit."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}; only safetensors are read, save the adapter as such with peft")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or cannot be read ({str(error)[:150]})") from None
    pairs: dict[Site, dict[str, Tensor]] = {}
    faults = [] if tensors else ["it is empty"]
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            targets = ", ".join(_TARGET)
            faults.append(
                f"{name}: unexpected, base_model.model.blocks.<layer>.<one of {targets}>.lora_A or B.weight is read"
            )
        elif not tensor.is_floating_point() or tensor.dim() != 2 or not torch.isfinite(tensor).all():
            faults.append(f"{name}: a finite matrix is expected, got {tensor.dtype} of shape {list(tensor.shape)}")
        else:
            pairs.setdefault((int(match[1]), _TARGET[match[2]]), {})[match[3]] = tensor
    for (layer, target), pair in sorted(pairs.items()):
        try:
            linear = linear_of(backbone, layer, target)
        except ValueError as error:
            faults.append(str(error))
            continue
        shapes = {letter: tuple(tensor.shape) for letter, tensor in pair.items()}
        if missing := {"A", "B"} - set(pair):
            faults.append(f"{_module((layer, target))}: lora_{missing.pop()} is missing")
        elif shapes["A"][1] != linear.in_features or shapes["B"] != (linear.out_features, shapes["A"][0]):
            sizes = f"A [R, {linear.in_features}] and B [{linear.out_features}, R]"
            faults.append(f"{_module((layer, target))}: {sizes} are expected, got {shapes['A']} and {shapes['B']}")
    if faults:
        raise ValueError("\n  - ".join([f"{path} does not fit this backbone:", *faults]))
    return {where: (pair["A"], pair["B"]) for where, pair in pairs.items()}
