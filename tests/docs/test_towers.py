"""The table of image towers in docs/data-and-backbones.md says what timm's configuration of the weights says."""

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
NORMALISATION = {
    "0.5, 0.5": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "CLIP's": ((0.481, 0.458, 0.408), (0.269, 0.261, 0.276)),
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
POOLS = {"class token": "token", "attention pool": "map", "mean of the patches": "avg"}


def rows() -> list[list[str]]:
    text = (ROOT / "docs" / "data-and-backbones.md").read_text(encoding="utf-8")
    lines = text[text.index("| tower |") :].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[: lines.index("")]]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_a_row_is_timms(row):
    _, example, pixels, normalised, norm_before, feature = row
    tag = example.split("`")[1]
    facts = timm.get_pretrained_cfg(tag)
    with torch.device("meta"):
        vit = timm.create_model(tag, num_classes=0, depth=1)
    assert facts.input_size == (3, int(pixels), int(pixels))
    assert tuple(tuple(round(x, 3) for x in part) for part in (facts.mean, facts.std)) == NORMALISATION[normalised]
    assert {"yes": False, "no": True}[norm_before] == isinstance(getattr(vit, "norm_pre", nn.Identity()), nn.Identity)
    assert vit.global_pool == next(pool for words, pool in POOLS.items() if feature.startswith(words))
    assert ("then a norm" in feature) != isinstance(vit.fc_norm, nn.Identity)
    assert ("no class token" in feature) == (vit.cls_token is None)
    assert ("registers" in feature) == (vit.global_pool == "token" and vit.num_prefix_tokens > 1)
    for method in ("simplecil", "ranpac", "nested_lora"):
        for name in example.split("`")[3::2]:
            file = ROOT / "exps" / f"{method}_{name}_cifar.json"
            assert json.loads(file.read_text(encoding="utf-8"))["backbone_type"] == tag
