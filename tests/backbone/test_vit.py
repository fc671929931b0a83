"""The slotted ViT: equal to timm bit for bit where slots are empty, adapters at the right place, unsupported models refused."""

import pytest
import timm
import torch
from torch import nn

from backbone.adapters.adapter import Adapter
from backbone.experts.routed import RoutedLayer, attach_router
from backbone.vit import SlottedViT
from tests.helpers.vits import KINDS, OTHER_KINDS, SMALL, plain_pass, small

ALL = KINDS | OTHER_KINDS


@pytest.mark.parametrize("name", ALL.values(), ids=list(ALL))
def test_empty_slots_equal_timm_bit_for_bit(name):
    vit = small(name)
    images = torch.rand(3, 3, *vit.patch_embed.img_size)
    with torch.no_grad():
        expected = vit.forward_head(vit.forward_features(images), pre_logits=True)
        ours = SlottedViT(vit)
        assert torch.equal(ours(images), expected)
        tapped, means = ours.encode(images, tap=range(ours.depth))  # taps take the block apart: still the same bits
        assert torch.equal(tapped, expected)
        assert set(means) == {0, 1, 2}


@pytest.mark.parametrize("name", ALL.values(), ids=list(ALL))
def test_adapter_reads_after_attention_and_adds_beside_the_mlp(name):
    vit = small(name)
    ours = SlottedViT(vit)
    adapter = Adapter(32, 4)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours.fill(1, adapter)
    images = torch.rand(2, 3, *vit.patch_embed.img_size)
    with torch.no_grad():
        expected = plain_pass(vit, images, lambda layer, x: adapter(x) if layer == 1 else 0)
        torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-5)
        assert (ours(images) - plain_pass(vit, images)).abs().max() > 1e-3


def test_mean_tokens_are_those_of_the_full_pass():
    ours = SlottedViT(small("vit_tiny_patch16_224"))
    ours.fill(0, Adapter(32, 4))
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        _, full = ours.encode(images, tap=(0, 2))
        early = ours.mean_tokens(images, tap=(0, 2))
    assert all(torch.equal(full[n], early[n]) for n in (0, 2))
    assert ours.mean_tokens(images, tap=()) == {}
    with torch.no_grad():
        tokens = ours.slot_inputs(images, (0, 2))  # of the last layer too, where a pass computes one token
    assert all(torch.equal(tokens[n].mean(dim=1), full[n]) for n in (0, 2)) and tokens[2].shape == (2, 5, 32)


def test_normalisation_is_part_of_the_backbone():
    vit = small("vit_tiny_patch16_224")
    images = torch.rand(2, 3, 32, 32)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.5, 0.25)
    by_hand = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        assert torch.equal(SlottedViT(vit, mean, std)(images), SlottedViT(vit)(by_hand))


def test_frozen_model_stays_frozen_and_in_evaluation_mode():
    vit = timm.create_model("vit_tiny_patch16_224", **SMALL, drop_path_rate=0.5, proj_drop_rate=0.5)
    ours = SlottedViT(vit)
    ours.fill(0, Adapter(32, 4, dropout=0.5).requires_grad_(False))
    ours.train()
    assert ours.slots["0"].training and not any(m.training for m in ours.vit.modules())
    assert not any(p.requires_grad for p in ours.parameters())


@pytest.mark.parametrize("name", ["vit_small_patch16_18x2_224", "vit_base_patch16_rpn_224", "vit_base_patch16_xp_224"])
def test_other_blocks_are_refused_by_name(name):
    try:
        vit = timm.create_model(name, pretrained=False, num_classes=0, depth=2)
    except RuntimeError:
        pytest.skip(f"this timm has no {name}")
    kind = type(vit.blocks[0]).__name__
    if kind == "Block":
        pytest.skip(f"{name} has plain blocks in this timm")
    with pytest.raises(ValueError, match=kind):
        SlottedViT(vit)


def test_other_families_are_refused_by_name():
    with pytest.raises(ValueError, match="ResNet is not a timm VisionTransformer"):
        SlottedViT(timm.create_model("resnet10t", pretrained=False))


def test_a_frozen_copy_shares_the_vit_and_does_not_learn_with_the_original():
    ours = SlottedViT(small("vit_tiny_patch16_224"))
    for layer in (0, 2):
        ours.fill(layer, adapter := RoutedLayer())
        for rank in (2, 3):
            adapter.add(Adapter(32, rank))
    attach_router(ours, "shared")
    ours.train()
    trained = [p.requires_grad_(True) for p in (*ours.slots.parameters(), *ours.router.parameters())]
    images = torch.rand(2, 3, 32, 32)
    teacher = ours.frozen_copy()
    with torch.no_grad():
        before = ours(images)
        assert torch.equal(teacher(images), before)
        for parameter in trained:
            parameter.add_(1.0)
        assert not torch.allclose(ours(images), before) and torch.equal(teacher(images), before)
    assert teacher.vit is ours.vit and all(p.requires_grad for p in trained)
    copied = [*teacher.slots.parameters(), *teacher.router.parameters()]
    assert len(copied) == len(trained) and not {id(p) for p in copied} & {id(p) for p in trained}
    assert not any(p.requires_grad for p in copied) and not any(m.training for m in teacher.modules())
    assert ours.slots["0"].training  # the original trains on


def test_a_slot_outside_the_model_and_what_is_no_slot_are_refused():
    with pytest.raises(ValueError, match=r"layers 0\.\.2"):
        SlottedViT(small("vit_tiny_patch16_224")).fill(3, Adapter(32, 4))
    with pytest.raises(ValueError, match=r"layer 2 takes a backbone\.blocks\.Slot, got Identity"):
        SlottedViT(small("vit_tiny_patch16_224")).fill(2, nn.Identity())
