"""Builds a backbone and loads its weights strictly: embedded, from timm's hub, from a local file, or seeded random."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from backbone import families, hub, weight_files, weight_fit
from backbone.catalogue import EMBEDDED, SEMA_CL_NAMES, timm_tag
from backbone.timm_vit import PretrainedCfg, VisionTransformer, timm_version
from backbone.vit import SlottedViT
from utils.config.schema import Experiment
from utils.process.seeds import named_seed
from utils.text import first_line, nearest, shortened

EMBEDDED_FILE = Path(__file__).with_name("embedded.safetensors")
WORDS = ("pretrained", "random")  # what backbone_weights may be besides a file


@dataclass(frozen=True)
class BackboneFacts:
    """What a run records about its backbone. `weight_hash`: 16 hex digits of SHA-256 over names, shapes and values; `notes`:
    what was taken off a weight file before it fitted."""

    tag: str
    source: str
    weight_hash: str
    image_size: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    notes: tuple[str, ...] = ()


def input_size(cfg: Experiment) -> int:
    """Side in pixels of the images the backbone gets: the key image_size, else the backbone's default."""
    if cfg.image_size is not None:
        return cfg.image_size
    if cfg.backbone_type == EMBEDDED:
        return int(_embedded_facts()["architecture"]["img_size"])
    return int(_timm_facts(cfg.backbone_type).input_size[-1])


def build(
    cfg: Experiment, *, with_weights: bool = True, say: Callable[[str], None] = print
) -> tuple[SlottedViT, BackboneFacts]:
    """The backbone `cfg` names and the facts about it. `with_weights=False` builds its shapes alone, on the meta device.
    `say` is called before a download.

    Raises ValueError for an unsupported model, image size or number of blocks, weights that do not exist, do not fit or are
    damaged, or a failed download."""
    if fault := _no_such_weights(cfg):
        raise ValueError(fault)
    size, tag, source = input_size(cfg), timm_tag(cfg.backbone_type), cfg.backbone_weights
    vit = _shapes(cfg, size)
    if cfg.backbone_type == EMBEDDED:
        mean, std = _embedded_facts()["mean"], _embedded_facts()["std"]
        path = EMBEDDED_FILE if source == "pretrained" else None
        source = EMBEDDED_FILE.name if path else source
    else:
        mean, std = _timm_facts(cfg.backbone_type).mean, _timm_facts(cfg.backbone_type).std
        path = _local_file(cfg)
    if with_weights:
        from_hub, file = source == "pretrained", None  # the embedded weights' source is their file
        if from_hub:
            pretrained = _timm_facts(cfg.backbone_type)
            with hub.quiet():
                file = hub.fetch(pretrained, tag, say)
            if file and (pretrained.custom_load == "hf" or file.suffix == ".npz"):
                file = None  # a foreign format: timm's reader of it looks for the file by itself
        vit = _create(tag, size, pretrained=from_hub, pretrained_file=file)
    notes: list[str] = []
    if with_weights and cfg.backbone_type == EMBEDDED and path:
        weight_fit.load_strictly(vit, load_file(path), source, EMBEDDED)
    elif with_weights and path:
        notes = _load_file(vit, path, cfg.backbone_type)
    if cfg.backbone_depth is not None:
        vit.blocks = vit.blocks[: cfg.backbone_depth]
    normalise = cfg.input_normalisation
    if normalise == "auto":
        normalise = "none" if cfg.backbone_type in SEMA_CL_NAMES else "backbone"
    used_mean, used_std = (tuple(mean), tuple(std)) if normalise == "backbone" else (None, None)
    weight_hash = hash_weights(vit) if with_weights else ""
    facts = BackboneFacts(tag, source, weight_hash, size, used_mean, used_std, tuple(notes))
    return SlottedViT(vit, used_mean, used_std), facts


def missing(cfg: Experiment) -> str | None:
    """None if the weights `cfg` needs are on this machine, else where they were looked for and how to get them."""
    if fault := _no_such_weights(cfg):
        return fault
    if cfg.backbone_type == EMBEDDED or cfg.backbone_weights == "random":
        return None
    if path := _local_file(cfg):
        return None if os.path.isfile(path) else _no_file(path)  # False where `path.is_file` raises: a name too long
    return hub.missing(_timm_facts(cfg.backbone_type), timm_tag(cfg.backbone_type))


def cached(cfg: Experiment) -> Path | None:
    """The file of the hub's weights that `cfg` names, None if it is not on this machine."""
    return hub.cached(_timm_facts(cfg.backbone_type))


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of the ViT in a weight file, out of their wrappings. Raises ValueError with the path if there are none."""
    if not os.path.isfile(path):
        raise ValueError(_no_file(path))
    return weight_fit.converted(weight_files.read(path)[0])[0]


def fit(cfg: Experiment) -> list[str]:
    """Reads the local weight file that `cfg` names, if any, and fits it to the backbone's shapes without building it.

    Returns a line for each wrapping taken off. Raises ValueError with what does not fit."""
    path = _local_file(cfg)
    if path is None or cfg.backbone_type == EMBEDDED:
        return []
    if not os.path.isfile(path):
        raise ValueError(_no_file(path))
    now = os.stat(path)
    notes, fault = _fitted(cfg.backbone_type, input_size(cfg), path, now.st_mtime_ns, now.st_size)
    if fault:
        raise ValueError(fault)
    return list(notes)


@lru_cache(maxsize=100)  # the cells of a sweep mostly have one file, which may be large
def _fitted(backbone_type: str, size: int, path: Path, *_: int) -> tuple[tuple[str, ...], str]:
    """(lines on wrappings, what does not fit or "") of a file with this time and length."""
    try:
        return tuple(_load_file(_create(timm_tag(backbone_type), size, meta=True), path, backbone_type)), ""
    except ValueError as error:
        return (), str(error)


def _load_file(vit: VisionTransformer, path: Path, name: str) -> list[str]:
    """Loads a weight file into `vit`, the backbone `name`, strictly; returns a line for each wrapping taken off."""
    if not os.path.isfile(path):
        raise ValueError(_no_file(path))
    state, notes = weight_files.read(path, lambda state: weight_fit.shapes_fit(state, vit))
    return notes + weight_fit.load_strictly(vit, state, str(path), name)


def _local_file(cfg: Experiment) -> Path | None:
    """The weight file that `cfg` names, None for the words that stand for other sources."""
    named = cfg.backbone_weights not in WORDS
    return Path(os.path.expanduser(cfg.backbone_weights)) if named else None


def _no_file(path: Path) -> str:
    word = not path.suffix and len(path.parts) == 1  # more likely a misspelt word than a file
    return (
        f"backbone_weights: there is no file {shortened(str(path.absolute()), 500)}; give a .safetensors or .pth file, "
        f"'pretrained' or 'random'{nearest(path.name, WORDS) if word else ''}"
    )


def _no_such_weights(cfg: Experiment) -> str | None:
    """One line if the backbone has no weights of the kind `cfg` asks for, wherever one looks."""
    if cfg.backbone_type == EMBEDDED:
        if cfg.backbone_weights in WORDS:
            return None
        return (
            f"backbone_weights: embedded takes 'pretrained' or 'random', got {cfg.backbone_weights!r}"
            f"{nearest(cfg.backbone_weights, WORDS)}"
        )
    tag = timm_tag(cfg.backbone_type)
    facts = _registered(tag)
    if cfg.backbone_weights != "pretrained" or (facts is not None and facts.has_weights):
        return None
    return f"timm has no pretrained weights called {tag}; set backbone_weights to a file or 'random'"


def hash_weights(module: nn.Module) -> str:
    """16 hex digits of SHA-256 over every tensor's name, shape and bytes, in name order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _registered(tag: str) -> PretrainedCfg | None:
    import timm  # all model families, see backbone/timm_vit.py

    try:
        return timm.get_pretrained_cfg(tag)
    except RuntimeError:  # a model timm has, with a tag it has not
        return None


def _timm_facts(backbone_type: str) -> PretrainedCfg:
    facts = _registered(timm_tag(backbone_type))
    if facts is None:
        raise ValueError(f"backbone_type: timm {timm_version} knows no weights called {timm_tag(backbone_type)!r}")
    return facts


def _shapes(cfg: Experiment, size: int) -> VisionTransformer:
    """The model on the meta device. ValueError if it has no place for slots, cannot take images of `size` pixels or has fewer
    blocks than are asked for, before any weight is fetched.

    timm cuts off the pixels beyond the last whole patch without a word. A few models are built that way (SigLIP, 384 px
    and patches of 14): their default size passes."""
    vit = _create(timm_tag(cfg.backbone_type), size, meta=True)
    try:
        families.refuse_unfit(vit)
    except ValueError as error:
        raise ValueError(f"{error} (backbone_type {cfg.backbone_type})") from None
    is_default = size == input_size(cfg.model_copy(update={"image_size": None}))
    height, width = vit.patch_embed.patch_size
    step = math.lcm(height, width)
    if not is_default and size % step:
        patch = height if height == width else f"{height}x{width}"
        raise ValueError(
            f"image_size: {size} is no multiple of the patch size {patch} of {cfg.backbone_type}; "
            f"nearest: {max(step, (size + step // 2) // step * step)}"
        )
    if cfg.backbone_depth is not None and cfg.backbone_depth > len(vit.blocks):
        raise ValueError(
            f"backbone_depth: {cfg.backbone_type} has {len(vit.blocks)} blocks, got {cfg.backbone_depth}; "
            f"null takes all of them"
        )
    return vit


def _create(
    tag: str, size: int, *, pretrained: bool = False, pretrained_file: Path | None = None, meta: bool = False
) -> Any:
    """The embedded architecture or timm's model `tag` for `size` pixels; `pretrained` has timm load its weights from
    `pretrained_file`, or fetch them where that is None."""
    sizes: dict[str, Any] = {"img_size": size, "num_classes": 0}
    if pretrained_file:
        # many tags name a second, foreign file at the makers', for which alone custom_load stands
        sizes["pretrained_cfg_overlay"] = {"file": str(pretrained_file), "custom_load": False}
    try:
        with _seeded(), hub.quiet(), torch.device("meta" if meta else "cpu"):
            if tag == EMBEDDED:
                skips = {"weight_init": "skip"} if meta else {}
                return VisionTransformer(**{**_embedded_facts()["architecture"], **sizes, **skips})
            import timm

            if meta:
                sizes |= families.without_start_values(tag)
            with _tensors_left() as left:
                vit = timm.create_model(tag, pretrained=pretrained, **sizes)
    except TypeError as error:
        raise ValueError(f"backbone {tag} cannot be built at {size} px: {error}") from None
    except (OSError, RuntimeError, SafetensorError) as error:  # the hub client's, and a damaged copy in its cache
        cause = first_line(str(error))
        if "state_dict" in cause:  # the next lines name the tensors
            cause = shortened(" ".join(str(error).split()), 300)
        if not pretrained:
            raise ValueError(f"backbone {tag} cannot be built at {size} px: {cause}") from None
        raise ValueError(
            hub.damaged(tag, pretrained_file, cause) if pretrained_file else hub.failed(tag, cause)
        ) from None
    if left:
        cause = f"it has no {', '.join(left[:3])}{f' and {len(left) - 3} more' * (len(left) > 3)}"
        raise ValueError(hub.damaged(tag, pretrained_file, cause) if pretrained_file else hub.failed(tag, cause))
    return vit


@contextmanager
def _tensors_left() -> Iterator[list[str]]:
    """Yields the names of tensors for which a file that is loaded in the block has no values.

    timm loads a file strictly only together with its classifier, which no backbone has here: without it, a tensor that the
    file lacks would remain at its random start value without a word."""
    left: list[str] = []
    load = nn.Module.load_state_dict

    def recorded(self: nn.Module, *args: Any, **how: Any) -> Any:
        result = load(self, *args, **how)
        left.extend(result.missing_keys)
        return result

    nn.Module.load_state_dict = recorded  # type: ignore[method-assign]
    try:
        yield left
    finally:
        nn.Module.load_state_dict = load  # type: ignore[method-assign]


@contextmanager
def _seeded() -> Iterator[None]:
    """A model is built with random start values: always the same ones, and the global generator does not move."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(named_seed("random backbone"))
        yield


def _embedded_facts() -> dict[str, Any]:
    try:
        with safe_open(EMBEDDED_FILE, framework="pt") as file:
            metadata = file.metadata()
        return {k: json.loads(metadata[k]) for k in ("architecture", "mean", "std")}
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:  # the last three: a foreign file
        raise ValueError(f"{EMBEDDED_FILE} is missing or damaged ({error}); restore it from the repository") from None
