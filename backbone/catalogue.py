"""Names of the backbones, known without importing torch or timm so that a misspelt one is refused at once."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

EMBEDDED = "embedded"

# SEMA-CL's and LAMDA-PILOT's names. Their environment pins timm 0.6.12, whose `vit_base_patch16_224` is the AugReg
# checkpoint fine-tuned on ImageNet-1k and whose `..._in21k` is the AugReg ImageNet-21k one; today's tags name them exactly.
_IN1K, _IN21K = "vit_base_patch16_224.augreg_in21k_ft_in1k", "vit_base_patch16_224.augreg_in21k"
SEMA_CL_NAMES = {
    "pretrained_vit_b16_224": _IN1K,
    "pretrained_vit_b16_224_adapter": _IN1K,
    "pretrained_vit_b16_224_in21k": _IN21K,
    "pretrained_vit_b16_224_in21k_adapter": _IN21K,
    "vit_base_patch16_224_ease": _IN1K,
    "vit_base_patch16_224_in21k_ease": _IN21K,
    "vit_base_patch16_224_l2p": _IN1K,
    "vit_base_patch16_224_dualprompt": _IN1K,
    "vit_base_patch16_224_coda_prompt": _IN1K,
}
# The files of timm whose models have blocks with a place for a slot (backbone/families.py); other families have other blocks.
_TIMM_FILES = ("vision_transformer.py", "deit.py", "eva.py", "beit.py")
_VIT_DEFAULTS = {"patch_size": 16, "embed_dim": 768, "depth": 12}  # of timm's three families


def timm_tag(name: str) -> str:
    """The timm model name, with tag where one is fixed, behind a `backbone_type`."""
    return SEMA_CL_NAMES.get(name, name)


@cache
def names() -> list[str]:
    """Every accepted `backbone_type`: embedded, SEMA-CL's names, timm's ViTs with and without their tags.

    timm's are read from its source text: importing it would take seconds."""
    accepted = [EMBEDDED, *SEMA_CL_NAMES]
    for text in _sources():
        models = re.findall(r"^def (\w+)\(pretrained", text, re.MULTILINE)
        tagged = [*re.finditer(r"^\s*['\"]([\w]+\.[\w.]+)['\"]: _\w*cfg\(", text, re.MULTILINE)]
        tags = [match[1] for match in tagged]
        for match, after in zip(tagged, [*tagged[1:], None], strict=True):
            # of weights with this note timm makes a second tag, which computes with the activation that they were trained with
            if "natively QuickGELU" in text[match.end() : after.start() if after else None]:
                tags.append(match[1].replace("_clip_", "_clip_quickgelu_"))
        accepted += models + [tag for tag in tags if tag.split(".")[0] in set(models)]
    return sorted(set(accepted), key=lambda n: (n not in (EMBEDDED, *SEMA_CL_NAMES), n))


@cache
def architectures() -> dict[str, tuple[int, ...]]:
    """(patch size in pixels, width, depth) of timm's ViTs by name, read from its source text; tags are left out."""
    sizes = {}
    for text in _sources():
        for name, values in re.findall(
            r"^def (\w+)\(pretrained.*?model_args = dict\((.*?)\)", text, re.MULTILINE | re.DOTALL
        ):
            stated = dict(re.findall(r"(patch_size|embed_dim|depth)=(\d+)", values))
            sizes[name] = tuple(int(stated.get(key, default)) for key, default in _VIT_DEFAULTS.items())
    return sizes


def _sources() -> Iterator[str]:
    """The text of timm's files of such models."""
    spec = importlib.util.find_spec("timm")
    for location in spec.submodule_search_locations or [] if spec else []:
        for file in _TIMM_FILES:
            yield (Path(location) / "models" / file).read_text(encoding="utf-8")
