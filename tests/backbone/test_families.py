"""EVA, DINOv3, rotary ViTs and BEiT: slots, cached prefixes and LoRA in blocks whose attention reads positions."""

import pytest
import timm
import torch
from torch import nn

from backbone import families, weight_fit
from backbone.adapters.adapter import Adapter
from backbone.adapters.lora import bundle, linear_of
from backbone.experts.routed import RoutedLayer, RoutedLinears, attach_router
from backbone.prompts import prefixes
from backbone.vit import SlottedViT
from tests.helpers.vits import KINDS, OTHER_KINDS, SMALL, plain_pass, small

each_kind = pytest.mark.parametrize("name", OTHER_KINDS.values(), ids=list(OTHER_KINDS))


def shown(vit, count=2):
    return torch.rand(
        count, 3, *vit.patch_embed.img_size, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


def filled(slot: nn.Module) -> nn.Module:
    for parameter in slot.parameters():
        nn.init.normal_(parameter, std=0.3)
    return slot.double()


@each_kind
def test_gradients_reach_every_parameter_of_the_slots_and_are_those_of_the_plain_pass(name):
    ours = SlottedViT(small(name)).double()
    adapters = {layer: filled(Adapter(32, 4)) for layer in (0, 2)}
    for layer, adapter in adapters.items():
        ours.fill(layer, adapter)
    ours.slots.requires_grad_(True)
    images, parameters = shown(ours.vit), list(ours.slots.parameters())
    gradients = torch.autograd.grad(ours(images).square().sum(), parameters)
    plain = plain_pass(ours.vit, images, lambda layer, x: adapters[layer](x) if layer in adapters else 0)
    expected = torch.autograd.grad(plain.square().sum(), parameters)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-9)


@each_kind
def test_a_pass_from_the_cached_prefix_equals_the_pass_from_the_images(name):
    ours = SlottedViT(small(name)).double()
    ours.fill(1, filled(Adapter(32, 4)))
    images = shown(ours.vit)
    with torch.no_grad():
        expected = ours(images)
        for layer, inside in ((0, False), (1, False), (1, True), (2, False), (3, False)):
            start = ours.prefix(images, layer, inside=inside)
            torch.testing.assert_close(ours(start), expected, rtol=0, atol=1e-12)
        tokens, (features, means) = ours.slot_inputs(images, (0, 1, 2)), ours.encode(images, tap=(0, 1, 2))
        assert tokens[2].shape == (2, ours.tokens, 32)
        assert all(torch.equal(tokens[n].mean(dim=1), means[n]) for n in range(3))
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "beit_base_patch16_224"])
def test_a_slot_around_the_block_and_a_shared_router_see_the_positions(name):
    ours, targets = SlottedViT(small(name)).double(), ("proj", "fc2")
    vit = ours.vit
    for layer in (1, 2):
        slot = RoutedLinears()
        for _ in range(2):
            slot.add(filled(bundle(ours, layer, targets, 3)))
        ours.fill(layer, slot)
    images, gates = shown(vit), torch.tensor([[0.25, 0.5]], dtype=torch.float64).expand(2, -1)
    with torch.no_grad():
        routed = ours(images, route=lambda x: [gates, gates])
        for layer in (1, 2):  # the same experts, merged into the weights
            for target in targets:
                linear = linear_of(ours, layer, target)
                for share, expert in zip((0.25, 0.5), ours.slots[str(layer)].experts(), strict=True):
                    linear.weight += share * expert[target].scale * expert[target].up @ expert[target].down
        ours.slots.clear()
        torch.testing.assert_close(routed, plain_pass(vit, images), rtol=1e-9, atol=1e-9)
    layers = [RoutedLayer(), RoutedLayer()]
    for layer, slot in enumerate(layers):
        slot.add(filled(Adapter(32, 2)))
        slot.add(filled(Adapter(32, 3)))
        ours.fill(layer, slot)
    attach_router(ours, "shared")
    with torch.no_grad():
        half = plain_pass(
            vit, images, lambda layer, x: sum(a(x) / 2 for a in layers[layer].adapters) if layer < 2 else 0
        )
        torch.testing.assert_close(ours(images), half, rtol=1e-9, atol=1e-9)


def test_learnt_positions_get_their_gradients_in_a_backbone_that_trains():
    for name, part in (("vit_small_patch16_rope_mixed_224", "rope.freqs"), ("beit_base_patch16_224", "blocks.1.attn")):
        ours = SlottedViT(small(name)).double()
        ours.vit.requires_grad_(True)
        parameters = [p for n, p in ours.vit.named_parameters() if n.startswith(part) and "proj" not in n]
        images = shown(ours.vit)
        gradients = torch.autograd.grad(ours(images).square().sum(), parameters)
        expected = torch.autograd.grad(plain_pass(ours.vit, images).square().sum(), parameters)
        assert parameters and all(
            torch.equal(a, b) or torch.allclose(a, b) for a, b in zip(gradients, expected, strict=True)
        )
        assert all(g.abs().max() > 0 for g in gradients)


def test_which_models_take_more_tokens():
    taking = {name for name in (*KINDS.values(), *OTHER_KINDS.values()) if families.takes_more_tokens(small(name))}
    assert taking == {*KINDS.values(), "eva_giant_patch14_224"}


@pytest.mark.parametrize(
    ("name", "lacks"),
    [
        ("vit_small_patch16_18x2_224", "ParallelThingsBlock, which computes attention and MLP from the same input"),
        ("vit_base_patch16_xp_224", "ParallelScalingBlock, which computes attention and MLP from the same input"),
        ("vit_base_patch16_rpn_224", "ResPostBlock, which normalises after its attention and its MLP"),
        ("eva02_enormous_patch14_clip_224", "EvaBlockPostNorm, which normalises after its attention and its MLP"),
        ("resnet10t", "ResNet is not a timm VisionTransformer, Eva or Beit: it has no sequence of tokens"),
    ],
)
def test_a_refusal_names_the_property_that_is_missing(name, lacks):
    with torch.device("meta"):
        vit = timm.create_model(name, **({} if "resnet" in name else {**SMALL, "img_size": 28 if "14" in name else 32}))
    with pytest.raises(ValueError, match=lacks):
        SlottedViT(vit)


def test_a_lora_is_refused_where_the_block_would_never_call_its_layer():
    beit, dinov3 = SlottedViT(small("beit_base_patch16_224")), SlottedViT(small("vit_small_patch16_dinov3"))
    with pytest.raises(ValueError, match=r"never calls its linear layer attn\.qkv: Attention multiplies by its weight"):
        linear_of(beit, 0, "qkv")
    assert linear_of(dinov3, 0, "qkv") is dinov3.vit.blocks[0].attn.qkv
    with pytest.raises(ValueError, match=r"no linear layer mlp\.fc1, but none of that name"):
        linear_of(SlottedViT(small("eva02_base_patch14_224")), 0, "fc1")
    with pytest.raises(ValueError, match=r"g: the attention of layer 0, EvaAttention, takes no prefix: it is no plain"):
        prefixes.fill(dinov3, [0], "g")


@pytest.mark.parametrize("name", ["eva02_base_patch14_224", "vit_small_patch16_dinov3", "beit_base_patch16_224"])
def test_a_file_of_another_image_size_is_resampled_as_timm_does_it(name, tmp_path):
    saved = small(name)
    with torch.no_grad():
        sizes = {"img_size": tuple(2 * side for side in saved.patch_embed.img_size)}
        vit = timm.create_model(name, **{**SMALL, **sizes})
    expected = families.conversion(vit)(saved.state_dict(), vit)
    assert weight_fit.shapes_fit(saved.state_dict(), vit)
    weight_fit.load_strictly(vit, saved.state_dict(), "file", name)
    state = vit.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    if name.startswith("beit"):
        table = {**saved.state_dict(), "blocks.1.attn.relative_position_bias_table": torch.ones(13, 2)}
        with pytest.raises(ValueError, match=r"shape of blocks\.1\.attn\.relative_position_bias_table: file \(13, 2\)"):
            weight_fit.load_strictly(vit, table, "file", name)
