"""Passes that start above the frozen prefix, and the last block for the pooled token alone: both equal to the plain pass."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from backbone import last_block
from backbone.adapters.adapter import Adapter
from backbone.adapters.nested import NestedLoRAAdapter
from backbone.blocks import BlockSlot, Slot
from backbone.experts.expandable import ExpandableLayer
from backbone.experts.moe import SparseMoE
from backbone.experts.routed import RoutedLayer, attach_router
from backbone.experts.router import RouterColumn
from backbone.vit import Activations, SlottedViT
from tests.helpers.toy import toy_backbone
from tests.helpers.vits import KINDS, small

D = 16


def images(dtype=torch.float64, count=3):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def expandable(count: int) -> ExpandableLayer:
    slot = ExpandableLayer()
    slot.adapters.extend(Adapter(D, 2 + i) for i in range(count))
    if count > 1:
        slot.router.columns.extend(RouterColumn(D) for _ in range(count))
    return slot


def routed() -> RoutedLayer:
    slot = RoutedLayer()
    for rank in (2, 3):
        slot.add(Adapter(D, rank))
    return slot


class Scaled(BlockSlot):
    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.ones(()))

    def forward(self, x, gates, block):
        return block(x) * self.by


class Mean(Slot):
    """Reads all tokens, as a slot does that says nothing about it."""

    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.ones(()))

    def forward(self, x, gates):
        return self.by * x.mean(dim=1, keepdim=True).expand_as(x)


SLOTS = {
    "adapter": lambda: Adapter(D, 4),
    "one adapter that may not expand": lambda: expandable(1),
    "three mixed adapters": lambda: expandable(3),
    "slow and fast": lambda: NestedLoRAAdapter(D, 3, 2),
    "routed": routed,
    "sparse experts": lambda: SparseMoE(D, 4, 3, 2),
    "block": Scaled,
    "undeclared reader": Mean,
    "none": lambda: None,
}


def backbone_with(make, dtype=torch.float64, **other) -> SlottedViT:
    """Slots in the last two layers, every parameter away from its start."""
    backbone = toy_backbone(**other)
    for layer in (1, 2):
        if (slot := make()) is not None:
            backbone.fill(layer, slot)
    if not len(backbone.slots):
        backbone.fill(0, Adapter(D, 2))
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return backbone.to(dtype)


def close(ours, wanted, atol=1e-12):
    torch.testing.assert_close(ours, wanted, rtol=0, atol=atol)


def both(backbone, monkeypatch, run):
    """run() as it is and with every token of the last block, each with the gradients it leaves."""
    found = []
    for plain in (False, True):
        with monkeypatch.context() as patch:
            if plain:
                patch.setattr(last_block, "pools_one", lambda *_: False)
            backbone.requires_grad_(True).vit.requires_grad_(False)
            backbone.zero_grad(set_to_none=True)
            features = run()
            features.square().sum().backward()
            trained = {n: p.grad for n, p in backbone.named_parameters() if p.requires_grad}
            found.append((features.detach(), trained))
    return found


def check(backbone, monkeypatch, run, dtype):
    atol = {torch.float64: 1e-12, torch.float32: 2e-5}[dtype]
    (ours, gradients), (plain, wanted) = both(backbone, monkeypatch, run)
    torch.testing.assert_close(ours, plain, rtol=0, atol=atol)
    for name, gradient in wanted.items():
        assert (gradient is None) == (gradients[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(gradients[name], gradient, rtol=atol, atol=atol)
    assert plain.abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("make", SLOTS.values(), ids=list(SLOTS))
def test_features_and_gradients_equal_those_of_all_tokens(make, dtype, monkeypatch):
    backbone = backbone_with(make, dtype)
    check(backbone, monkeypatch, lambda: backbone(images(dtype)), dtype)


@pytest.mark.parametrize("make", SLOTS.values(), ids=list(SLOTS))
def test_so_do_tapped_passes(make, monkeypatch):
    backbone = backbone_with(make)
    with torch.no_grad():
        ours, means = backbone.encode(images(), tap=(0, 1, 2))
        monkeypatch.setattr(last_block, "pools_one", lambda *_: False)
        plain, wanted = backbone.encode(images(), tap=(0, 1, 2))
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    assert all(torch.equal(means[n], wanted[n]) for n in wanted)  # the attention was that of all tokens


@pytest.mark.parametrize("granularity", ["token", "sample"])
@pytest.mark.parametrize("scope", ["shared", "layer"])
@pytest.mark.parametrize("layers", [(1, 2), (2,)], ids=str)
def test_so_do_routed_passes(layers, scope, granularity, monkeypatch):
    backbone = toy_backbone()
    for layer in layers:
        backbone.fill(layer, routed())
    attach_router(backbone, scope, granularity)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    backbone.double()
    check(backbone, monkeypatch, lambda: backbone(images()), torch.float64)
    shape = (3, 5, 2) if granularity == "token" else (3, 2)
    given = torch.rand(shape, dtype=torch.float64)
    check(backbone, monkeypatch, lambda: backbone(images(), route=lambda x: [given] * 2), torch.float64)


@pytest.mark.parametrize("layers", [(1, 2), (2,)], ids=str)
def test_so_do_branches(layers, monkeypatch):
    backbone = toy_backbone()
    for layer in layers:
        backbone.fill(layer, NestedLoRAAdapter(D, 3, 4))
        backbone.slots[str(layer)].use(branches=True)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    backbone.double()
    check(backbone, monkeypatch, lambda: backbone(images(), branches=4), torch.float64)
    for inside in (False, True):
        stream = backbone.prefix(images(), layers[0], inside=inside)
        close(backbone(stream, branches=4), backbone(images(), branches=4))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("parts", [{}, {"qk_norm": True}, {"init_values": 0.5, "qkv_bias": False}], ids=str)
def test_the_attention_of_one_query_is_timms(parts, fused, monkeypatch):
    backbone = backbone_with(SLOTS["adapter"], **parts)
    for block in backbone.vit.blocks:
        block.attn.fused_attn = fused
    check(backbone, monkeypatch, lambda: backbone(images()), torch.float64)


def test_newer_parts_of_timms_attention_act_too():
    from timm.layers import LayerNorm
    from timm.models.vision_transformer import Attention

    try:
        attention = Attention(D, 2, gated=True, scale_norm=True, norm_layer=LayerNorm)
    except TypeError:
        pytest.skip("this timm has no gate")
    attention = attention.double().eval()
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 5, D, dtype=torch.float64)
    torch.testing.assert_close(last_block.one_query(attention, x), attention(x)[:, :1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", KINDS.values(), ids=list(KINDS))
def test_every_kind_of_model_gives_the_same_features(name, monkeypatch):
    backbone, adapter = SlottedViT(small(name)), Adapter(32, 4)
    nn.init.normal_(adapter.up_proj.weight)
    backbone.fill(2, adapter)
    backbone.double()
    shown = torch.rand(2, 3, *backbone.vit.patch_embed.img_size)
    with torch.no_grad():
        ours = backbone(shown)
        monkeypatch.setattr(last_block, "pools_one", lambda *_: False)
        torch.testing.assert_close(ours, backbone(shown), rtol=0, atol=1e-12)


def asked(backbone, monkeypatch) -> int:
    """How often a pass takes the attention of one query."""
    calls, real = [], last_block.one_query
    monkeypatch.setattr(last_block, "one_query", lambda *given: calls.append(1) or real(*given))
    with torch.no_grad():
        backbone(images())
    return len(calls)


def test_it_is_used_where_one_token_is_pooled_and_nothing_reads_the_others(monkeypatch):
    with monkeypatch.context() as patch:
        assert asked(backbone_with(SLOTS["adapter"]), patch) == 1
    for name in ("block", "undeclared reader", "three mixed adapters"):
        with monkeypatch.context() as patch:
            assert asked(backbone_with(SLOTS[name]), patch) == 0, name
    averaged = backbone_with(SLOTS["adapter"], class_token=False, global_pool="avg")
    with monkeypatch.context() as patch:
        assert asked(averaged, patch) == 0
    with monkeypatch.context() as patch:
        assert asked(toy_backbone().double(), patch) == 0  # empty slots: timm's own pass, bit for bit


@pytest.mark.parametrize("where", ["slot", "inside the slot"])
def test_a_hook_on_a_slot_sees_what_is_computed_and_changes_nothing(where):
    backbone, seen = backbone_with(SLOTS["adapter"], torch.float32), []
    slot = backbone.slots["2"]
    parts = {"slot": slot, "inside the slot": slot.down_proj}
    with torch.no_grad():
        before = backbone(images(torch.float32))
        parts[where].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
        assert torch.equal(backbone(images(torch.float32)), before)
    assert seen == [(3, 1, D)]


@pytest.mark.parametrize("where", ["block", "inside the block"])
def test_a_hook_in_a_frozen_block_sees_all_tokens(where):
    backbone, seen = backbone_with(SLOTS["adapter"]), []
    block = backbone.vit.blocks[2]
    parts = {"block": block.mlp, "inside the block": block.attn.qkv}
    with torch.no_grad():
        before = backbone(images())
        hook = parts[where].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
        torch.testing.assert_close(backbone(images()), before, rtol=0, atol=1e-12)
        hook.remove()
    assert seen == [(3, 5, D)]


def test_a_subclassed_pooling_gets_all_tokens():
    class Sum(VisionTransformer):
        def pool(self, x, pool_type=None):
            return x.sum(dim=1)

    torch.manual_seed(0)
    vit = Sum(img_size=8, patch_size=4, embed_dim=D, depth=3, num_heads=2, num_classes=0)
    backbone, adapter = SlottedViT(vit), Adapter(D, 2)
    adapter.reset_parameters()  # adds 0
    backbone.fill(2, adapter)
    x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images(torch.float32)))))
    with torch.no_grad():
        torch.testing.assert_close(backbone(images(torch.float32)), vit.norm(vit.blocks(x)).sum(dim=1))


# The prefix ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS.values(), ids=list(KINDS))
def test_a_pass_from_the_prefix_is_the_pass_from_the_images(name):
    backbone = SlottedViT(small(name))
    for layer in (0, 1, 2):
        backbone.fill(layer, adapter := Adapter(32, 4))
        nn.init.normal_(adapter.up_proj.weight)
    shown = torch.rand(2, 3, *backbone.vit.patch_embed.img_size)
    with torch.no_grad():
        features, means = backbone.encode(shown, tap=(0, 1, 2))
        for layer, inside in [(layer, inside) for layer in (0, 1, 2) for inside in (False, True)]:
            stream = backbone.prefix(shown, layer, inside=inside)
            assert (len(stream), stream.layer, stream.after is not None) == (2, layer, inside)
            tap = range(layer, 3)
            again, found = backbone.encode(stream, tap=tap)
            # inside the last block the MLP ran for all tokens, so only there products have another size
            close(again, features, atol=2e-5 if layer == 2 and inside else 0)
            assert all(torch.equal(found[n], means[n]) for n in tap)
            assert torch.equal(backbone.mean_tokens(stream, [2])[2], means[2])
        torch.testing.assert_close(backbone(backbone.prefix(shown, 1)), backbone(shown), rtol=0, atol=2e-5)
        done = backbone.prefix(shown, 3)
        assert done.x.shape == (2, 1, backbone.width) and torch.equal(backbone(done), backbone(shown))


def test_a_stream_moves_whole():
    stream = toy_backbone().prefix(images(), 1, inside=True).to("meta")
    assert stream.layer == 1 and stream.x.device.type == "meta" and stream.after.device.type == "meta"


def test_what_a_prefix_cannot_give_is_refused():
    backbone = backbone_with(SLOTS["adapter"])
    with pytest.raises(ValueError, match=r"a layer 0\.\.3, got 4"):
        backbone.prefix(images(), 4)
    with pytest.raises(ValueError, match="cannot go inside"):
        backbone.prefix(images(), 3, inside=True)
    stream = backbone.prefix(images(), 2)
    with pytest.raises(ValueError, match=r"layers \[1\] are to be tapped"):
        backbone.encode(stream, tap=(1, 2))
    with pytest.raises(ValueError, match="branches would begin at slot 1"):
        backbone(stream, branches=2)
    with pytest.raises(ValueError, match="a router would begin at slot 1"):
        backbone(stream, route=lambda x: [])


def test_a_slot_that_runs_its_block_needs_the_blocks_input():
    backbone = backbone_with(SLOTS["block"])
    assert torch.equal(backbone(backbone.prefix(images(), 1)), backbone(images()))
    with pytest.raises(ValueError, match="cannot go inside"):
        backbone.prefix(images(), 1, inside=True)
    within = toy_backbone().double().prefix(images(), 1, inside=True)
    with pytest.raises(ValueError, match="runs the block itself"):
        backbone(within)
    assert isinstance(within, Activations)
