"""Methods learn over the other families of ViTs, or refuse one by the property that is missing, before anything is trained."""

import json

import pytest
import timm

import main
import models
from backbone.vit import SlottedViT
from tests.helpers.runs import rows_of, tiny_experiment
from tests.helpers.vits import SMALL, small


@pytest.mark.parametrize(
    ("method", "name", "lacks"),
    [
        ("l2p", "vit_small_patch16_dinov3", "the attention of this backbone has a position for each of its tokens"),
        ("l2p", "beit_base_patch16_224", "the attention of this backbone has a position for each of its tokens"),
        ("dualprompt", "vit_small_patch16_dinov3", "EvaAttention, takes no prefix: it is no plain attention"),
        ("coda_prompt", "beit_base_patch16_224", "takes no prefix: it is no plain attention"),
        ("inflora", "beit_base_patch16_224", "never calls its linear layer attn.qkv"),
    ],
)
def test_the_property_is_named(method, name, lacks):
    keys = {
        "dualprompt": {"g_prompt_layer_idx": (0,), "e_prompt_layer_idx": (1,)},
        "coda_prompt": {"prompt_layer_idx": (0,)},
    }
    cfg = models.settings_of(method)(
        model_name=method, dataset="digits", init_cls=2, increment=2, **keys.get(method, {})
    )
    with pytest.raises(ValueError, match=lacks):
        models.build(cfg, SlottedViT(small(name)), 10, 0, None)


def test_a_run_over_another_family_learns_and_is_evaluated_as_recorded(tmp_path, monkeypatch):
    method, name = "sema", "vit_small_patch16_dinov3"
    real = timm.create_model
    narrow = {key: SMALL[key] for key in ("embed_dim", "depth", "num_heads")}
    monkeypatch.setattr(timm, "create_model", lambda tag, **given: real(tag, **{**given, **narrow}))
    keys = {"backbone_type": name, "image_size": 32, "prefix_cache": "disk", "backbone_depth": 2}
    layers = {"adapt_start_layer": 1, "adapt_end_layer": 1}
    run = tiny_experiment(method, tmp_path, monkeypatch, **keys, **layers)
    assert main.main([*run, "--out", str(tmp_path / "logs")]) == 0
    (folder,) = (tmp_path / "logs").glob(f"{method}/*/seed_3")
    results = json.loads((folder / "results.json").read_text())
    assert len(results["top1_curve"]) == 2 and any(row["kind"] == "epoch" for row in rows_of(folder))
    assert json.loads((folder / "environment.json").read_text())["backbone"]["tag"] == name
    assert main.main(["--evaluate", str(folder)]) == 0
