"""Building backbones: exact tags, strict loading with full lists, hashes, clear errors for files and downloads."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from backbone import catalogue, hub, weights
from utils.config.schema import Experiment

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "num_classes": 10}


def settings(**values) -> Experiment:
    return Experiment(**({"model_name": "sema", "dataset": "digits", "init_cls": 2, "increment": 2} | values))


@pytest.fixture
def tiny(monkeypatch):
    """timm's ViT-Tiny cut down to two narrow blocks; returns a random instance with its classifier."""
    real = timm.create_model

    def create(name, **kwargs):
        return real(name, **{**kwargs, **{k: v for k, v in TINY.items() if k not in ("img_size", "num_classes")}})

    monkeypatch.setattr(timm, "create_model", create)
    torch.manual_seed(0)
    return create("vit_tiny_patch16_224", img_size=32, num_classes=10)


def tiny_settings(path) -> Experiment:
    return settings(backbone_type="vit_tiny_patch16_224", image_size=32, backbone_weights=str(path))


def test_names_need_no_timm_import_and_are_timms_own():
    names = catalogue.names()
    assert names[0] == "embedded" and set(catalogue.SEMA_CL_NAMES) <= set(names)
    ours = {n for n in names if n.startswith(("vit_", "deit")) and "." not in n} - set(catalogue.SEMA_CL_NAMES)
    assert {"vit_base_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2"} <= ours
    assert ours <= set(timm.list_models()) and len(ours) > 100
    tagged = {n for n in names if "." in n}
    assert tagged <= set(timm.list_pretrained()) | {n for n in tagged if timm.get_pretrained_cfg(n)}


@pytest.mark.parametrize("name", list(catalogue.SEMA_CL_NAMES))
def test_sema_cl_names_map_to_tags_timm_knows(name):
    tag = catalogue.timm_tag(name)
    assert timm.get_pretrained_cfg(tag).tag == tag.partition(".")[2]
    assert ("in21k_ft_in1k" in tag) == ("in21k" not in name)
    assert weights.input_size(settings(backbone_type=name)) == 224


def test_a_backbone_without_a_place_for_slots_is_refused_before_weights_are_fetched(monkeypatch):
    monkeypatch.setattr(hub, "fetch", None)  # not reached
    with pytest.raises(
        ValueError, match=r"has blocks of type EvaBlockPostNorm, which .+ \(backbone_type eva02_enormous"
    ):
        weights.build(settings(backbone_type="eva02_enormous_patch14_clip_224.laion2b"))


def test_embedded_weights_load_and_say_what_they_are():
    backbone, facts = weights.build(settings())
    assert facts.tag == "embedded" and len(facts.weight_hash) == 16 and facts.image_size == 32
    assert facts.mean and backbone.normalises
    assert weights.EMBEDDED_FILE.stat().st_size <= 6_000_000
    again, _ = weights.build(settings())
    assert weights.hash_weights(again.vit) == facts.weight_hash
    assert weights.build(settings(input_normalisation="none"))[1].mean is None
    assert backbone(torch.rand(2, 3, 32, 32)).shape == (2, backbone.width)


def test_random_embedded_backbone_is_seeded_and_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = weights.build(settings(backbone_weights="random"))[1].weight_hash
    assert torch.equal(torch.rand(1), expected)
    assert first == weights.build(settings(backbone_weights="random"))[1].weight_hash
    assert first != weights.build(settings())[1].weight_hash


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_local_file_loads_its_classifier_left_out(suffix, tiny, tmp_path):
    path = tmp_path / f"wëights{suffix}"
    state = tiny.state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    backbone, facts = weights.build(tiny_settings(path))
    assert facts.source == str(path)
    assert all(torch.equal(v, state[k]) for k, v in backbone.vit.state_dict().items())
    assert facts.mean == (0.5, 0.5, 0.5)


def test_weights_that_do_not_fit_are_refused_with_full_lists(tiny, tmp_path):
    state = tiny.state_dict()
    del state["norm.weight"], state["blocks.0.attn.qkv.bias"]
    state["blocks.7.strange"] = torch.zeros(1)
    state["cls_token"] = torch.zeros(1, 1, 48)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError) as error:
        weights.build(tiny_settings(tmp_path / "w.safetensors"))
    for part in (
        "missing: blocks.0.attn.qkv.bias, norm.weight",
        "unexpected: blocks.7.strange",
        "(1, 1, 48)",
        "(1, 1, 32)",
    ):
        assert part in str(error.value)


def test_damaged_and_foreign_files_are_refused_with_their_path(tiny, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(tiny.state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000])
    listed = tmp_path / "list.pth"
    torch.save([1, 2], listed)
    numbered = tmp_path / "numbered.pth"
    torch.save({0: torch.zeros(1)}, numbered)
    junk = tmp_path / "junk.pth"
    junk.write_bytes(b"hello, world")
    for file, cause in (
        (path, "damaged"),
        (junk, "is no plain tensor file; pickled code is never run"),
        (numbered, "no mapping of names"),
        (listed, "no mapping"),
        (tmp_path / "none.pth", "no file"),
    ):
        with pytest.raises(ValueError, match=cause) as error:
            weights.build(tiny_settings(file))
        assert str(file) in str(error.value) and "weights_only" not in str(error.value)


@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize(
    ("name", "size", "patch", "near"),
    [
        ("embedded", 30, 8, 32),
        ("embedded", 11, 8, 8),
        ("vit_tiny_patch16_224", 8, 16, 16),
        ("vit_tiny_patch16_224", 30, 16, 32),
        ("vit_small_patch14_dinov2", 224 + 8, 14, 238),
    ],
)
def test_a_size_the_patches_do_not_fill_is_refused_before_weights_are_fetched(name, size, patch, near, with_weights):
    with pytest.raises(ValueError) as error:
        weights.build(settings(backbone_type=name, image_size=size), with_weights=with_weights)
    assert str(error.value) == (
        f"image_size: {size} is no multiple of the patch size {patch} of {name}; nearest: {near}"
    )


def test_patches_that_are_not_square_count_with_both_sides(monkeypatch):
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: real(*args, **kwargs, patch_size=(16, 12)))
    tiny = {"backbone_type": "vit_tiny_patch16_224", "backbone_weights": "random"}
    with pytest.raises(ValueError, match=r"image_size: 64 is no multiple of the patch size 16x12 of .+; nearest: 48"):
        weights.build(settings(**tiny, image_size=64))
    assert weights.build(settings(**tiny, image_size=96), with_weights=False)[1].image_size == 96


def test_a_models_own_size_passes_even_if_timm_cuts_pixels_off():
    name = {"backbone_type": "vit_so400m_patch14_siglip_384"}
    assert weights.build(settings(**name), with_weights=False)[1].image_size == 384
    assert weights.build(settings(**name, image_size=384), with_weights=False)[1].image_size == 384
    with pytest.raises(ValueError, match=r"image_size: 385 is no multiple of the patch size 14 .+ nearest: 392"):
        weights.build(settings(**name, image_size=385), with_weights=False)


def test_what_timm_cannot_build_is_one_line(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("zero patches\nlong trace")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(ValueError, match=r"backbone vit_tiny_patch16_224 cannot be built at 64 px: zero patches$"):
        weights.build(settings(backbone_type="vit_tiny_patch16_224", image_size=64), with_weights=False)


@pytest.mark.parametrize("size", [8, 64])
def test_embedded_weights_load_at_another_size(size):
    backbone, facts = weights.build(settings(image_size=size))
    own = weights.build(settings())[0].vit.state_dict()
    for key, value in backbone.vit.state_dict().items():
        if key == "pos_embed":
            assert value.shape[1] - own[key].shape[1] == (size // 8) ** 2 - 16
        else:
            assert torch.equal(value, own[key]), key
    features = backbone(torch.rand(2, 3, size, size))
    assert facts.image_size == size and features.shape == (2, backbone.width) and features.isfinite().all()


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "beitv2_base_patch16_224", "vit_small_patch16_rope_mixed_224"]
)
def test_the_first_blocks_are_timms_intermediate_tokens_behind_the_final_norm(name, monkeypatch):
    real = timm.create_model
    narrow = {"embed_dim": 32, "num_heads": 2, "depth": 4}
    monkeypatch.setattr(timm, "create_model", lambda name, **given: real(name, **{**given, **narrow}))
    cfg = {"backbone_type": name, "backbone_weights": "random", "image_size": 32, "input_normalisation": "none"}
    whole, facts = weights.build(settings(**cfg))
    images = torch.rand(2, 3, 32, 32)
    for depth in (1, 3, 4):
        cut, facts_of_cut = weights.build(settings(**cfg, backbone_depth=depth))
        assert cut.depth == depth and (facts_of_cut.weight_hash == facts.weight_hash) == (depth == 4)
        with torch.no_grad():
            (tokens,) = whole.vit.forward_intermediates(
                images, [depth - 1], norm=True, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
            )
            joined = torch.cat([tokens[1], tokens[0]], dim=1)
            assert torch.equal(cut(images), whole.vit.forward_head(joined, pre_logits=True))
    with pytest.raises(ValueError, match=rf"^backbone_depth: {name} has 4 blocks, got 5; null takes all of them$"):
        weights.build(settings(**cfg, backbone_depth=5), with_weights=False)


@pytest.mark.parametrize("name", ["vit_base_patch16_plus_240", "vit_base_patch16_224.nonsense"])
def test_a_timm_model_without_weights_is_refused(name):
    line = f"timm has no pretrained weights called {name}; set backbone_weights to a file or 'random'"
    assert weights.missing(settings(backbone_type=name)) == line
    for with_weights in (False, True):
        with pytest.raises(ValueError) as error:
            weights.build(settings(backbone_type=name), with_weights=with_weights)
        assert str(error.value) == line


def test_a_timm_model_without_weights_can_start_from_random_ones():
    cfg = settings(backbone_type="vit_base_patch16_plus_240", backbone_weights="random")
    assert weights.missing(cfg) is None
    assert weights.build(cfg, with_weights=False)[1].image_size == 240
    with pytest.raises(ValueError, match=r"knows no weights called 'vit_base_patch16_224.nonsense'"):
        weights.build(settings(backbone_type="vit_base_patch16_224.nonsense", backbone_weights="random"))


def test_weights_that_are_not_on_the_hub_are_looked_for_where_torch_puts_them(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cfg = settings(backbone_type="vit_huge_patch14_gap_224")
    file = timm.get_pretrained_cfg(cfg.backbone_type).url
    line = str(weights.missing(cfg))
    assert str(tmp_path / "checkpoints") in line and file in line
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / file.split("/")[-1]).write_bytes(b"")
    assert weights.missing(cfg) is None


def test_a_file_below_the_home_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_file(tiny.state_dict(), tmp_path / "w.safetensors")
    cfg = tiny_settings("~/w.safetensors")
    assert weights.missing(cfg) is None
    assert torch.equal(weights.build(cfg)[0].vit.state_dict()["norm.weight"], tiny.state_dict()["norm.weight"])


def test_a_misspelt_word_is_told_from_a_file_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    advice = "give a .safetensors or .pth file, 'pretrained' or 'random'"
    for text, meant in (
        ("pretraind", "; did you mean 'pretrained'?"),
        ("Random", "; did you mean 'random'?"),
        ("random.pth", ""),
        ("nets/random", ""),
    ):
        cfg = settings(backbone_type="vit_tiny_patch16_224", backbone_weights=text)
        line = f"backbone_weights: there is no file {tmp_path / text}; {advice}{meant}"
        assert weights.missing(cfg) == line
        with pytest.raises(ValueError) as error:
            weights.build(cfg)
        assert str(error.value) == line
    cfg = settings(backbone_weights="pretraind")
    assert "embedded takes 'pretrained' or 'random', got 'pretraind'; did you mean" in str(weights.missing(cfg))


def test_a_file_of_the_cache_that_cannot_be_read_says_what_to_do(monkeypatch, tmp_path):
    real = timm.create_model

    def refuse(*args, pretrained, **kwargs):
        if not pretrained:
            return real(*args, pretrained=False, **kwargs)
        raise OSError("We couldn't read the file\nlong trace")

    monkeypatch.setattr(timm, "create_model", refuse)
    monkeypatch.setattr(hub, "fetch", lambda pretrained, tag, say: tmp_path / "damaged.safetensors")
    with pytest.raises(
        ValueError, match=r"damaged\.safetensors are damaged or do not fit .+; delete that file"
    ) as error:
        weights.build(settings(backbone_type="vit_tiny_patch16_224"))
    assert "couldn't read" in str(error.value) and "long trace" not in str(error.value)


def test_missing_weights_are_named_with_the_folder_looked_in(monkeypatch, tmp_path):
    assert weights.missing(settings()) is None
    line = weights.missing(settings(backbone_type="pretrained_vit_b16_224_adapter"))
    if line is not None:  # on a machine that has them there is nothing to say
        assert "timm/vit_base_patch16_224.augreg_in21k_ft_in1k" in line and "huggingface" in line
    absent = tmp_path / "none.pth"
    assert str(absent) in str(
        weights.missing(settings(backbone_type="vit_tiny_patch16_224", backbone_weights=str(absent)))
    )


def test_shapes_alone_need_no_memory():
    backbone, facts = weights.build(settings(backbone_type="vit_large_patch16_224"), with_weights=False)
    assert facts.weight_hash == "" and all(p.device.type == "meta" for p in backbone.parameters())
    assert sum(p.numel() for p in backbone.parameters()) > 300_000_000


def test_the_embedded_file_records_its_recipe():
    with weights.safe_open(weights.EMBEDDED_FILE, framework="pt") as file:
        facts = file.metadata()
    assert {"architecture", "mean", "std", "about"} <= set(facts)
    assert json.loads(facts["architecture"])["embed_dim"] == weights.build(settings())[0].width
    assert all(v.dtype in (torch.float16, torch.float32) for v in load_file(weights.EMBEDDED_FILE).values())
