"""Builds a backbone and loads its weights strictly: embedded, from timm's hub, from a local file, or seeded random."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models import PretrainedCfg
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from backbone.catalogue import EMBEDDED, SEMA_CL_NAMES, timm_tag
from backbone.vit import SlottedViT
from utils.config import Experiment
from utils.runtime import named_seed

EMBEDDED_FILE = Path(__file__).with_name("embedded.safetensors")
# A classifier in the file is not part of a feature extractor; nothing else may be missing or left over.
CLASSIFIER = ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")


@dataclass(frozen=True)
class BackboneFacts:
    """What a run records about its backbone. `weight_hash`: 16 hex digits of SHA-256 over names, shapes and values."""

    tag: str
    source: str
    weight_hash: str
    image_size: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def input_size(cfg: Experiment) -> int:
    """Side in pixels of the images the backbone gets: the key image_size, else the backbone's own."""
    if cfg.image_size is not None:
        return cfg.image_size
    if cfg.backbone_type == EMBEDDED:
        return int(_embedded_facts()["architecture"]["img_size"])
    return int(_timm_facts(cfg.backbone_type).input_size[-1])


def build(cfg: Experiment, *, with_weights: bool = True) -> tuple[SlottedViT, BackboneFacts]:
    """The backbone `cfg` names and the facts about it. `with_weights=False` builds its shapes alone, on the meta device.

    Raises ValueError for an unsupported model, weights that do not fit or are damaged, or a failed download."""
    size = input_size(cfg)
    if cfg.backbone_type == EMBEDDED:
        if cfg.backbone_weights not in ("pretrained", "random"):
            raise ValueError(f"backbone_weights: embedded takes 'pretrained' or 'random', got {cfg.backbone_weights!r}")
        facts = _embedded_facts()
        mean, std = facts["mean"], facts["std"]
        with _seeded(), torch.device("cpu" if with_weights else "meta"):
            vit: VisionTransformer = VisionTransformer(**{**facts["architecture"], "img_size": size, "num_classes": 0})
        tag, source = "embedded", str(EMBEDDED_FILE.name)
        state = load_file(EMBEDDED_FILE) if cfg.backbone_weights == "pretrained" and with_weights else None
    else:
        tag = timm_tag(cfg.backbone_type)
        source = cfg.backbone_weights
        vit = _timm_model(tag, size, pretrained=source == "pretrained" and with_weights, meta=not with_weights)
        mean, std = _timm_facts(cfg.backbone_type).mean, _timm_facts(cfg.backbone_type).std
        local = source not in ("pretrained", "random")
        state = read_weights(Path(source)) if local and with_weights else None
    source = "random" if cfg.backbone_weights == "random" else source
    if state is not None:
        load_strictly(vit, state, source)
    normalise = cfg.input_normalisation
    if normalise == "auto":
        normalise = "none" if cfg.backbone_type in SEMA_CL_NAMES else "backbone"
    used_mean, used_std = (tuple(mean), tuple(std)) if normalise == "backbone" else (None, None)
    weight_hash = hash_weights(vit) if with_weights else ""
    return SlottedViT(vit, used_mean, used_std), BackboneFacts(tag, source, weight_hash, size, used_mean, used_std)


def missing(cfg: Experiment) -> str | None:
    """None if the weights `cfg` needs are on this machine, else where they were looked for and how to get them."""
    if cfg.backbone_type == EMBEDDED or cfg.backbone_weights == "random":
        return None
    if cfg.backbone_weights != "pretrained":
        path = Path(cfg.backbone_weights)
        return None if path.is_file() else f"backbone_weights: no file {path}"
    from huggingface_hub import constants, try_to_load_from_cache

    pretrained = _timm_facts(cfg.backbone_type)
    repository = pretrained.hf_hub_id or ""
    repository += f"{pretrained.architecture}.{pretrained.tag}" if repository.endswith("/") else ""
    for file in ("model.safetensors", "pytorch_model.bin"):
        if isinstance(try_to_load_from_cache(repository, file), str):
            return None
    return (
        f"weights of {timm_tag(cfg.backbone_type)}: not in {constants.HF_HUB_CACHE}; they are downloaded from the Hugging Face "
        f"hub ({repository}) on the first run, or fetch model.safetensors elsewhere and set backbone_weights to its path"
    )


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a .safetensors or .pth/.bin file. Raises ValueError with the path if it is missing or damaged."""
    if not path.is_file():
        raise ValueError(
            f"backbone_weights: there is no file {path}; give a .safetensors or .pth file, 'pretrained' or 'random'"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        SafetensorError,
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        torch.serialization.pickle.UnpicklingError,
    ) as error:
        cause = str(error).splitlines()[0][:150] if str(error) else type(error).__name__
        raise ValueError(f"backbone_weights: {path} is damaged or not a plain weight file ({cause})") from None
    state = state.get("model", state.get("state_dict", state)) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"backbone_weights: {path} holds no mapping of names to tensors")
    return state


def load_strictly(vit: VisionTransformer, state: dict[str, torch.Tensor], source: str) -> None:
    """Loads `state` into `vit`; only a classifier may be left over. Raises ValueError with the full lists otherwise."""
    state = {k: v.float() for k, v in state.items() if k not in CLASSIFIER}
    own = vit.state_dict()
    if set(state) == set(own):
        state = checkpoint_filter_fn(
            state, vit
        )  # timm's: resamples position and patch embeddings to another image size
    lines = [f"missing: {', '.join(sorted(set(own) - set(state)))}"] if set(own) - set(state) else []
    lines += [f"unexpected: {', '.join(sorted(set(state) - set(own)))}"] if set(state) - set(own) else []
    lines += [
        f"shape of {k}: file {tuple(v.shape)}, model {tuple(own[k].shape)}"
        for k, v in state.items()
        if k in own and v.shape != own[k].shape
    ]
    if lines:
        raise ValueError(f"weights from {source} do not fit {type(vit).__name__}:\n  " + "\n  ".join(lines))
    vit.load_state_dict(state, strict=True)


def hash_weights(module: nn.Module) -> str:
    """16 hex digits of SHA-256 over every tensor's name, shape and bytes, in name order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _timm_facts(backbone_type: str) -> PretrainedCfg:
    facts = timm.get_pretrained_cfg(timm_tag(backbone_type))
    if facts is None:
        raise ValueError(f"backbone_type: timm {timm.__version__} knows no weights called {timm_tag(backbone_type)!r}")
    return facts


def _timm_model(tag: str, size: int, *, pretrained: bool, meta: bool) -> Any:
    try:
        with _seeded(), torch.device("meta" if meta else "cpu"):
            return timm.create_model(tag, pretrained=pretrained, num_classes=0, img_size=size)
    except TypeError as error:
        raise ValueError(f"backbone {tag} cannot be built at {size} px: {error}") from None
    except (OSError, RuntimeError) as error:  # the hub client's network and cache errors are of both kinds
        if not pretrained:
            raise
        raise ValueError(
            f"the weights of {tag} could not be loaded from the Hugging Face hub ({str(error).splitlines()[0][:150]}); on a "
            f"machine without internet set backbone_weights to a local .safetensors file, or backbone_type to 'embedded'"
        ) from None


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
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{EMBEDDED_FILE} is missing or damaged ({error}); restore it from the repository") from None
    return {k: json.loads(metadata[k]) for k in ("architecture", "mean", "std")}
