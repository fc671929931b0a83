"""Routed layers: mixtures by gates from one pass, the plain path untouched, and what attaching and dropping keep."""

import copy

import pytest
import torch
from torch import nn

from backbone.adapters import lora
from backbone.adapters.adapter import Adapter
from backbone.blocks import Slot
from backbone.experts import routed
from backbone.experts.router import one_expert, uniform
from tests.helpers.toy import toy_backbone


def adapter(rank, width=16):
    made = Adapter(width, rank).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def backbone_with(ranks, layers=(1, 2)):
    torch.manual_seed(0)
    backbone = toy_backbone().double()
    for layer in layers:
        slot = routed.RoutedLayer()
        for rank in ranks:
            slot.add(adapter(rank))
        backbone.fill(layer, slot)
    return backbone


IMAGES = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()


def shaken(backbone, scope="shared", granularity="token"):
    """Routers away from their start, so that gates differ."""
    for router in routed.attach_router(backbone, scope, granularity):
        for column in router.columns:
            nn.init.normal_(column)
    return backbone


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_mixture_is_the_loop_over_its_experts_of_any_rank():
    slot = routed.RoutedLayer()
    for rank in (1, 3, 2):
        slot.add(adapter(rank))
    x = torch.randn(2, 5, 16).double()
    outputs = torch.stack([e(x) for e in slot.experts()], dim=-1)  # [B, N, D, E]
    tokens, samples = torch.rand(2, 5, 3).double(), torch.rand(2, 3).double()
    close(slot(x, tokens), (outputs * tokens.unsqueeze(2)).sum(-1))
    close(slot(x, samples), (outputs * samples[:, None, None]).sum(-1))
    close(slot(x, None), outputs.sum(-1))


@pytest.mark.parametrize("expert", [0, 1])
def test_one_hot_gates_are_that_expert_alone(expert):
    backbone, alone = backbone_with([2, 3]), toy_backbone().double()
    for layer in (1, 2):
        alone.fill(layer, backbone.slots[str(layer)].adapters[expert])
    with torch.no_grad():
        features = backbone(IMAGES, route=lambda x: [one_expert(x, 2, expert).gates] * 2)
        close(features, alone(IMAGES))
        assert (features - backbone(IMAGES)).abs().max() > 1e-3


def test_without_a_route_a_slot_is_called_with_its_own_gates():
    class Scaled(Slot):
        def gates(self, x):
            return x.mean(dim=(1, 2)).unsqueeze(1)

        def forward(self, x, gates):
            return gates.unsqueeze(2) * x

    backbone = toy_backbone().double()
    backbone.fill(1, Scaled())
    vit = backbone.vit
    with torch.no_grad():
        x = backbone.stem(IMAGES)
        for i, block in enumerate(vit.blocks):
            if i != 1:
                x = block(x)
                continue
            x = x + block.attn(block.norm1(x))
            x = x + block.mlp(block.norm2(x)) + x.mean(dim=(1, 2))[:, None, None] * x
        close(backbone(IMAGES), vit.forward_head(vit.norm(x), pre_logits=True))


def test_the_route_is_asked_once_with_the_first_slots_input():
    backbone, seen, read = backbone_with([2, 2]), [], []
    backbone.slots["1"].register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))

    def route(x):
        seen.append(x)
        return [uniform(x, 2).gates] * 2

    with torch.no_grad():
        backbone(IMAGES, route=route)
    assert len(seen) == 1 and torch.equal(seen[0], read[0]) and seen[0].shape == (5, 5, 16)


@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_a_shared_router_gives_each_layer_its_own_gates_from_the_same_input(granularity):
    backbone = shaken(backbone_with([2, 3]), granularity=granularity)
    x = torch.randn(4, 5, 16).double()
    shared, weights = backbone.router, torch.stack(backbone.router(x), dim=-2)
    assert weights.shape == ((4, 5, 2, 2) if granularity == "token" else (4, 2, 2))
    for layer, router in enumerate(routed.routers_of(backbone)):
        assert torch.equal(weights[..., layer, :], router(x).gates)
    close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    inputs = {}
    for name, slot in backbone.slots.items():
        slot.register_forward_pre_hook(lambda module, given, name=name: inputs.update({name: given}))
    with torch.no_grad():
        backbone(IMAGES)
        for gates, name in zip(shared(inputs["1"][0]), ("1", "2"), strict=True):
            tokens = inputs[name][0].shape[1]  # above the last block's attention token 0 alone
            assert torch.equal(inputs[name][1], gates[:, :tokens] if granularity == "token" else gates)


def test_what_a_shared_router_reads_never_drifts_and_what_a_layers_own_reads_does():
    def gates(scope):
        backbone = shaken(backbone_with([2, 3]), scope)
        found = []
        for _ in range(2):
            routings = []
            routed.collect(backbone, routings)
            with torch.no_grad():
                backbone(IMAGES)
                for parameter in backbone.slots["1"].adapters.parameters():
                    parameter.add_(0.3)
            routed.collect(backbone, None)
            found.append([r.gates for r in routings])
        return found

    before, after = gates("shared")
    assert len(before) == 2 and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    before, after = gates("layer")
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


@pytest.mark.parametrize("scope", ["shared", "layer"])
def test_attaching_and_the_state_after_it(scope):
    backbone = backbone_with([2, 3])
    plain_names = set(backbone.state_dict())
    with torch.no_grad():
        plain = backbone(IMAGES)
        routers = routed.attach_router(backbone, scope)
        half = backbone_with([2, 3])
        for slot in routed.routed_layers(half):
            for expert in slot.experts():
                expert.scale = 0.5
        close(backbone(IMAGES), half(IMAGES))  # at its start a router mixes evenly
        assert len(routers) == 2 and len(set(backbone.state_dict()) - plain_names) > 2
        for router in routers:
            nn.init.normal_(router.columns[1])
        other = backbone_with([2, 3])
        routed.attach_router(other, scope)
        other.load_state_dict(backbone.state_dict())
        assert torch.equal(other(IMAGES), backbone(IMAGES)) and not torch.equal(backbone(IMAGES), plain)


def test_a_given_route_goes_before_the_attached_router():
    backbone = shaken(backbone_with([2, 3]))
    with torch.no_grad():
        given = backbone(IMAGES, route=lambda x: [uniform(x, 2).gates] * 2)
        without = backbone_with([2, 3])
        assert torch.equal(given, without(IMAGES, route=lambda x: [uniform(x, 2).gates] * 2))


@pytest.mark.parametrize("scope", ["shared", "layer"])
def test_a_grown_expert_changes_nothing_and_a_dropped_one_leaves_the_rest(scope):
    backbone = shaken(backbone_with([2, 3]), scope)
    with torch.no_grad():
        before = backbone(IMAGES)
        for slot in routed.routed_layers(backbone):
            slot.add(adapter(2))
        for router in routed.routers_of(backbone):
            router.grow()
        close(backbone(IMAGES), before)
        for router in routed.routers_of(backbone):
            router.set_offset(2, 0.0)
        assert (backbone(IMAGES) - before).abs().max() > 1e-3
        for slot, router in zip(routed.routed_layers(backbone), routed.routers_of(backbone), strict=True):
            del slot.adapters[2]
            router.drop(2)
        assert torch.equal(backbone(IMAGES), before)


def test_dropping_a_column_shares_its_gate_out_in_proportion():
    router = routed.attach_router(backbone_with([1, 1, 1]), "shared")[0]
    for value, column in zip((1.0, 2.0, 3.0), router.columns, strict=True):
        nn.init.constant_(column, value)
    router.set_offset(2, -1.0)
    x = torch.full((1, 1, 16), 0.1).double()
    before = router(x).gates.squeeze()
    router.drop(1)
    close(router(x).gates.squeeze(), before[[0, 2]] / before[[0, 2]].sum())
    for expert in (2, -1):
        with pytest.raises(ValueError, match=f"expert {expert} of 2 cannot be dropped"):
            router.drop(expert)
    router.drop(0)
    with pytest.raises(ValueError, match="expert 0 of 1"):
        router.drop(0)


def test_a_sample_alone_is_routed_as_in_a_batch():
    backbone = shaken(backbone_with([2, 3]))
    with torch.no_grad():
        together = backbone(IMAGES)
        close(torch.cat([backbone(image[None]) for image in IMAGES]), together)


def test_gradients_of_experts_and_columns():
    backbone = shaken(backbone_with([1, 2], layers=(2,)))
    slot, router = backbone.slots["2"], routed.routers_of(backbone)[0]
    x = torch.randn(1, 3, 16, requires_grad=True, dtype=torch.float64)
    given = [x, *router.columns, slot.adapters[0].up_proj.weight]
    assert torch.autograd.gradcheck(lambda x, *_: slot(x, backbone.router(x)[0]), given)


def test_a_copy_over_the_same_frozen_vit_has_slots_of_its_own():
    backbone = shaken(backbone_with([2, 3]))
    twin = copy.deepcopy(backbone, {id(backbone.vit): backbone.vit})
    assert twin.vit is backbone.vit and twin.slots["1"] is not backbone.slots["1"]
    with torch.no_grad():
        before = twin(IMAGES)
        assert torch.equal(before, backbone(IMAGES))
        for parameter in backbone.slots.parameters():
            parameter.add_(1)
        assert torch.equal(twin(IMAGES), before)


def test_what_cannot_carry_a_router_is_refused():
    backbone = backbone_with([2])
    backbone.fill(0, Adapter(16, 2).double())
    with pytest.raises(ValueError, match=r"got 2 in 3 slots with \[1\] experts"):
        routed.attach_router(backbone, "shared")
    backbone = backbone_with([2])
    backbone.slots["1"].add(adapter(2))
    with pytest.raises(ValueError, match=r"\[1, 2\] experts"):
        routed.attach_router(backbone, "shared")
    with pytest.raises(ValueError, match=r"\[0\] experts"):
        routed.attach_router(backbone_with([]), "layer")
    with pytest.raises(ValueError, match="router scope 'all' is unknown"):
        routed.attach_router(backbone_with([2]), "all")
    backbone = shaken(backbone_with([2]))
    with pytest.raises(ValueError, match="attached already"):
        routed.attach_router(backbone, "layer")


# Experts on the block's linear layers ---------------------------------------------------------------------------------


def linears_with(ranks, layers=(1, 2), targets=tuple(lora.TARGETS), dtype=torch.float64):
    torch.manual_seed(0)
    backbone = toy_backbone().to(dtype)
    for layer in layers:
        slot = routed.RoutedLinears()
        for rank in ranks:
            made = lora.bundle(backbone, layer, targets, rank).to(dtype)
            for parameter in made.parameters():
                nn.init.normal_(parameter, std=0.2)
            slot.add(made)
        backbone.fill(layer, slot)
    return backbone


def by_weights(backbone, gates):
    """A plain copy of the ViT with sum_e g_e U_e A_e added to each layer's own weight; gates [E] are the same everywhere."""
    plain = toy_backbone().to(next(backbone.vit.parameters()).dtype)
    with torch.no_grad():
        for name, slot in backbone.slots.items():
            for gate, expert in zip(gates, slot.experts(), strict=True):
                for target in expert.targets:
                    weight = plain.vit.blocks[int(name)].get_submodule(lora.TARGETS[target]).weight
                    weight += gate * (expert[target].up @ expert[target].down)
    return plain


@pytest.mark.parametrize("targets", [*((t,) for t in lora.TARGETS), tuple(lora.TARGETS)], ids=str)
def test_linear_experts_with_fixed_gates_are_the_weighted_sum_in_each_linear_layer(targets):
    backbone = linears_with([2, 3], targets=targets)
    with torch.no_grad():
        for gates in ([1.0, 0.0], [0.0, 1.0], [0.3, 0.7]):
            given = torch.tensor(gates, dtype=torch.float64).expand(5, 5, 2)
            close(backbone(IMAGES, route=lambda x, given=given: [given] * 2), by_weights(backbone, gates)(IMAGES))
        close(backbone(IMAGES), by_weights(backbone, [1.0, 1.0])(IMAGES))  # no route and no router: the plain sum


def test_after_a_pass_the_block_is_timms_alone_also_after_a_failure():
    backbone, plain = linears_with([2, 2]), toy_backbone().double()
    with torch.no_grad():
        assert (backbone(IMAGES) - plain(IMAGES)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="do not fit"):
        backbone(IMAGES, route=lambda x: [torch.ones(1, 2).double()] * 2)
    hooks = [m for m in backbone.vit.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == [] and list(backbone.vit.state_dict()) == list(plain.vit.state_dict())
    with torch.no_grad():
        backbone.slots.clear()
        assert torch.equal(backbone(IMAGES), plain(IMAGES))


def test_fresh_linear_experts_add_exactly_nothing():
    backbone = toy_backbone()
    for layer in (0, 2):
        slot = routed.RoutedLinears()
        slot.add(lora.bundle(backbone, layer, ["fc2", "qkv"], 3))
        backbone.fill(layer, slot)
    with torch.no_grad():
        assert torch.equal(backbone(IMAGES.float()), toy_backbone()(IMAGES.float()))


@pytest.mark.parametrize("scope", ["shared", "layer"])
def test_the_router_of_linear_experts_reads_the_blocks_input(scope):
    backbone, read, inputs = shaken(linears_with([2, 3]), scope), [], {}
    for layer in (1, 2):
        backbone.vit.blocks[layer].register_forward_pre_hook(lambda m, i, layer=layer: inputs.update({layer: i[0]}))
    for router in [backbone.router] if scope == "shared" else routed.routers_of(backbone):
        router.register_forward_pre_hook(lambda m, i: read.append(i[0]))
    routings = []
    routed.collect(backbone, routings)
    with torch.no_grad():
        backbone(IMAGES)
        assert all(torch.equal(a, b) for a, b in zip(read, inputs.values(), strict=scope == "layer"))
        assert len(read) == (1 if scope == "shared" else 2) and len(routings) == 2
        means = backbone.mean_tokens(IMAGES, [1])[1]
        assert torch.equal(means, inputs[1].mean(dim=1))  # as the novelty of a task: from the frozen prefix
        assert torch.equal(backbone.encode(IMAGES, tap=[1])[1][1], means)


def test_copies_of_the_batch_part_at_the_first_block_with_linear_experts():
    backbone = linears_with([2, 2])
    one_hot = torch.eye(2).double().repeat_interleave(5, dim=0)  # branch k sees expert k
    with torch.no_grad():
        both = backbone(IMAGES, branches=2, route=lambda x: [one_hot] * 2)
        close(both, torch.cat([by_weights(backbone, gates)(IMAGES) for gates in ([1, 0], [0, 1])]))


def test_gradients_of_gates_and_factors_of_linear_experts():
    backbone = shaken(linears_with([1, 2], layers=(2,)))
    router, slot, block = routed.routers_of(backbone)[0], backbone.slots["2"], backbone.vit.blocks[2]
    x = torch.randn(1, 3, 16, requires_grad=True, dtype=torch.float64)
    factors = [p for e in slot.experts() for t in ("qkv", "fc2") for p in (e[t].up, e[t].down)]
    given = [x, router.columns[0], router.columns[1], *factors]
    assert torch.autograd.gradcheck(lambda x, *_: slot(x, backbone.router(x)[0], block), given)
    gates = torch.rand(1, 3, 2, requires_grad=True, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda g: slot(x.detach(), g, block), [gates])


def test_a_teacher_over_the_same_frozen_vit_keeps_its_own_linear_experts():
    backbone = shaken(linears_with([2, 3]))
    twin = copy.deepcopy(backbone, {id(backbone.vit): backbone.vit})
    with torch.no_grad():
        before = twin(IMAGES)
        assert torch.equal(before, backbone(IMAGES))  # each pass adds its own experts once
        for parameter in backbone.slots.parameters():
            parameter.add_(0.1)
        assert torch.equal(twin(IMAGES), before) and not torch.equal(backbone(IMAGES), before)


@pytest.mark.parametrize("made", [backbone_with, linears_with])
def test_merged_experts_are_exact_for_the_gates_they_were_merged_by(made):
    backbone = made([2, 3, 1])
    rows = torch.tensor([[0.1, 0.4, 0.5], [0.25, 0.5, 0.25]], dtype=torch.float64)
    given = [row.expand(5, 3) for row in rows]
    with torch.no_grad():
        before = backbone(IMAGES, route=lambda x: given)
        routed.attach_router(backbone, "shared")
        routed.merge_experts(backbone, 0, 2, rows)
        close(backbone(IMAGES, route=lambda x: [g[:, 1:] for g in given]), before)
    assert [slot.ranks() for slot in routed.routed_layers(backbone)] == [[3, 3], [3, 3]]
    assert [len(router) for router in routed.routers_of(backbone)] == [2, 2]


@pytest.mark.parametrize("made", [backbone_with, linears_with])
def test_an_expert_whose_partner_never_acted_is_dropped(made):
    backbone = made([2, 3])
    kept = backbone.slots["1"].adapters[1]
    routed.merge_experts(backbone, 0, 1, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert len(backbone.slots["1"]) == 1 and backbone.slots["1"].adapters[0] is kept
