"""Whether the tensors of a file fit a ViT, and if not, the few lines that say what differs and which backbone they do fit."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch

from backbone import catalogue, families
from backbone.timm_vit import VisionTransformer
from backbone.weight_files import ANCHOR, State, kind
from utils.text import printable, shortened

MOST_NAMES = 8  # of each kind of fault
LARGEST = 1e18  # a larger weight overflows float32 once it is squared
# What a file may have beyond a feature extractor; nothing else may be missing or left over: a classifier, or the head of
# self-supervised training in its place, and the decoder and mask of masked autoencoders.
NOT_OF_FEATURES = re.compile(r"(head|head_dist)\..+|mask_token|decoder_(embed|blocks|norm|pred|pos_embed)\b.*")
# Beginnings of names by which other libraries' ViTs are known.
LIBRARIES = {
    "encoder.layer.": "the transformers library",
    "encoder.layers.encoder_layer_": "torchvision",
    "transformer.resblocks.": "OpenAI's CLIP",
    "layer1.0.conv1": "a ResNet",
}


def shapes_fit(state: State, vit: VisionTransformer) -> bool:
    """Whether `state` has every tensor of `vit` in its shape; position embeddings may be those of another image size."""
    state, _ = converted(state)
    expected = vit.state_dict()
    return all(
        name in state
        and kind(state[name]) is None
        and (state[name].shape == value.shape or _is_resampled(vit, name, state[name]))
        for name, value in expected.items()
    )


def converted(state: State) -> tuple[State, list[str]]:
    """(`state` by timm's names and without what is no part of a feature extractor, lines on what was changed).

    DINOv2's files have registers under another name and add the class token's position apart, as timm's converter knows."""
    state, notes = dict(state), []
    left = [name for name in state if NOT_OF_FEATURES.fullmatch(name) and not name.startswith(("head.", "head_dist."))]
    if left:
        notes.append(f"backbone_weights: {len(left)} tensors of pre-training alone are left out ({_few(left, 3)})")
    state = {name: tensor for name, tensor in state.items() if not NOT_OF_FEATURES.fullmatch(name)}
    if {"register_tokens", "cls_token", "pos_embed"} <= state.keys():
        position = state["pos_embed"]
        if kind(position) is None and position.dim() == 3 and position.shape[1] > 1:
            state["reg_token"] = state.pop("register_tokens")
            state["cls_token"] = state["cls_token"] + position[:, :1]
            state["pos_embed"] = position[:, 1:]
            notes.append("backbone_weights: DINOv2's register_tokens are timm's reg_token")
    return state, notes


def load_strictly(vit: VisionTransformer, state: State, source: str, name: str) -> list[str]:
    """Loads `state` into `vit`, the backbone `name`; returns a line on each conversion.

    A model on the meta device stays without values. Raises ValueError with what does not fit, a few lines of bounded length."""
    state, notes = converted(state)
    if faults := faults_of(vit, state, name):
        raise ValueError("\n  ".join([f"weights from {printable(source)} do not fit {name}:", *faults]))
    state = {key: value.float() for key, value in state.items()}
    if not next(vit.parameters()).is_meta:
        state = families.conversion(vit)(state, vit)  # timm's: resamples positions to another image size
        vit.load_state_dict(state, strict=True)
    return notes


def faults_of(vit: VisionTransformer, state: State, name: str) -> list[str]:
    """What of `state` does not fit `vit`: odd tensors, else another architecture, else names, shapes and values."""
    expected = vit.state_dict()
    odd = [f"{key} ({what})" for key, tensor in state.items() if (what := kind(tensor))]
    if odd:
        return [f"plain tensors of real numbers are expected, but not so: {_few(odd)}"]
    if apart := _architecture(state, expected, name):
        return apart
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    lines = [f"missing: {_few(missing)}"] if missing else []
    lines += [f"unexpected: {_few(unexpected)}"] if unexpected else []
    shapes = [key for key in state.keys() & expected.keys() if state[key].shape != expected[key].shape]
    shapes = sorted(key for key in shapes if not _is_resampled(vit, key, state[key]))
    lines += [
        f"shape of {k}: file {tuple(state[k].shape)}, model {tuple(expected[k].shape)}" for k in shapes[:MOST_NAMES]
    ]
    lines += [f"and {len(shapes) - MOST_NAMES} more shapes"] * (len(shapes) > MOST_NAMES)
    if lines and (library := next((lib for sign, lib in LIBRARIES.items() if any(sign in key for key in state)), None)):
        return [f"its names are those of {library}; weights with timm's names are needed, as on timm's hub pages"]
    if lines and (other := next(backbones_for(state, name), None)):
        lines.append(f"they fit {other}")
    if not lines:
        strange = sorted(key for key, tensor in state.items() if not torch.isfinite(tensor).all())
        large = sorted(key for key, tensor in state.items() if tensor.numel() and tensor.abs().max() > LARGEST)
        lines += [f"not finite (NaN or infinity), so damaged: {_few(strange)}"] if strange else []
        lines += [f"larger than {LARGEST:g}, so damaged: {_few(large)}"] if large and not strange else []
        if not any(tensor.any() for tensor in state.values()):
            lines.append("every number is 0")
    return lines


def _few(names: Sequence[str], most: int = MOST_NAMES) -> str:
    """The first names, printable and cut to a bounded length, and how many more there are."""
    text = ", ".join(shortened(printable(name).replace("\n", "\\n"), 80) for name in names[:most])
    return f"{text} and {len(names) - most:,} more" if len(names) > most else text


# Architecture ----------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Any], str]] = {
    "width": str,
    "depth": str,
    "patch": "{0[0]}x{0[1]} px".format,
    "channels": str,
}


def _parts(state: State) -> dict[str, Any] | None:
    """Width, depth, patch size and image channels of a ViT, None where its patch embedding is missing or odd."""
    stem = state.get(ANCHOR)
    if stem is None or stem.dim() != 4:
        return None
    depth = sum(bool(re.fullmatch(r"blocks\.\d+\.norm1\.weight", key)) for key in state)
    return {"width": stem.shape[0], "depth": depth, "patch": tuple(stem.shape[2:]), "channels": stem.shape[1]}


def _architecture(state: State, expected: State, name: str) -> list[str]:
    """A line on each part in which the file is another ViT than the model; empty if none differs."""
    of_file, of_model = _parts(state), _parts(expected)
    if of_file is None or of_model is None:
        return []
    apart = [part for part in PARTS if of_file[part] != of_model[part]]
    lines = [
        f"{part} {PARTS[part](of_file[part])} in the file, {PARTS[part](of_model[part])} in {name}" for part in apart
    ]
    if lines and (other := next(backbones_for(state, name), None)):
        lines[-1] += f"; {other} has {', '.join(PARTS[part](of_file[part]) for part in apart)}"
    return lines


def _is_resampled(vit: VisionTransformer, name: str, value: torch.Tensor) -> bool:
    """Whether a tensor holds positions of another image size: embeddings [1, N, D] of a square grid of patches, or BEiT's
    biases [M, H], one for each offset in a square grid and three for the class token."""
    here = vit.get_parameter(name) if name.endswith(("pos_embed", "relative_position_bias_table")) else None
    if here is None or value.dim() != here.dim() or value.shape[-1] != here.shape[-1]:
        return False
    if name == "pos_embed":
        count = value.shape[1] - (0 if getattr(vit, "no_embed_class", False) else vit.num_prefix_tokens)
        return count > 0 and math.isqrt(count) ** 2 == count
    side = math.isqrt(max(len(value) - 3, 0))
    return side % 2 == 1 and side**2 == len(value) - 3


def backbones_for(state: State, near: str) -> Iterator[str]:
    """Yields names of timm's ViTs whose tensors `state` fits, the ones called most like `near` first."""
    import timm

    of_file = _parts(state)
    if of_file is None or of_file["patch"][0] != of_file["patch"][1]:
        return
    size = (of_file["patch"][0], of_file["width"], of_file["depth"])
    alike = [name for name, parts in catalogue.architectures().items() if parts == size and name != near]
    alike.sort(key=lambda name: -difflib.SequenceMatcher(None, name, near).ratio())
    for name in alike[:8]:
        try:
            with torch.device("meta"):
                vit = cast(
                    VisionTransformer, timm.create_model(name, num_classes=0, **families.without_start_values(name))
                )
        except (RuntimeError, TypeError, ValueError):
            continue
        if vit.state_dict().keys() == state.keys() and shapes_fit(state, vit):
            yield name
