"""Routing looked at from outside: what is routed, what is collected, and forced choices that leave nothing behind."""

import pytest
import torch
from torch import nn

from backbone.adapters.adapter import Adapter
from backbone.blocks import Slot
from backbone.experts import probe, routed
from backbone.experts.moe import SparseMoE
from tests.helpers.toy import toy_backbone

IMAGES = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()


def shaken(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double()


def sparse(top_k=2, experts=3, granularity="token", seed=0):
    backbone = toy_backbone().double()
    torch.manual_seed(seed)
    for layer in (1, 2):
        backbone.fill(layer, shaken(SparseMoE(16, 2, experts, top_k, granularity=granularity)))
    return backbone


def mixed(scope="shared", granularity="token", experts=3, top_k=None):
    backbone = toy_backbone().double()
    torch.manual_seed(0)
    for layer in (1, 2):
        slot = routed.RoutedLayer()
        for rank in range(1, experts + 1):
            slot.add(shaken(Adapter(16, rank)))
        backbone.fill(layer, slot)
    for router in routed.attach_router(backbone, scope, granularity):
        shaken(router)
        router.top_k = top_k
    return backbone


KINDS = {
    "sparse": sparse,
    "sparse samples": lambda: sparse(granularity="sample"),
    "shared": mixed,
    "own": lambda: mixed("layer", top_k=2),
    "shared samples": lambda: mixed(granularity="sample"),
    "own samples": lambda: mixed("layer", "sample"),
}
every_kind = pytest.mark.parametrize("build", KINDS.values(), ids=KINDS)


def features(backbone, images=IMAGES):
    with torch.no_grad():
        return backbone(images)


def alone(backbone, expert):
    """The backbone with this expert as a plain slot of each layer."""
    made = toy_backbone().double()
    for layer in (1, 2):
        slot = backbone.slots[str(layer)]
        made.fill(layer, slot.experts[expert] if isinstance(slot, SparseMoE) else slot.adapters[expert])
    return made


@every_kind
def test_the_routed_layers(build):
    assert probe.routed_blocks(build()) == [1, 2]


def test_layers_without_a_learned_router_are_not_routed():
    assert probe.routed_blocks(toy_backbone()) == []
    fixed = sparse()
    for slot in fixed.slots.values():
        slot.fix("uniform")
    assert probe.routed_blocks(fixed) == []
    summed = mixed()
    summed.router = None
    assert probe.routed_blocks(summed) == []


@every_kind
def test_what_is_collected_is_what_acted_layer_by_layer_and_changes_nothing(build):
    backbone = build()
    plain, hooked = features(backbone), []
    hooks = [s.register_forward_pre_hook(lambda m, x: hooked.append(x[0])) for s in backbone.slots.values()]
    assert torch.equal(features(backbone), plain) and len(hooked) == 2  # a hook that looks on takes the same path
    for hook in hooks:
        hook.remove()
    with probe.collecting(backbone) as routings:
        assert torch.equal(features(backbone), plain)
        assert len(routings) == 2
        features(backbone)
        assert len(routings) == 4
    with torch.no_grad():
        inputs = backbone.slot_inputs(IMAGES, (1, 2))
        read = [inputs[1], inputs[1] if backbone.router is not None else inputs[2]]
        for routing, x, router in zip(routings[:2], read, probe._routers(backbone), strict=True):
            assert x.shape == (5, 5, 16)
            torch.testing.assert_close(routing.gates, router(x).gates, rtol=1e-12, atol=1e-12)
    features(backbone)
    assert len(routings) == 4


@every_kind
def test_collecting_ends_after_an_error_too(build):
    backbone = build()
    with pytest.raises(RuntimeError, match="stop"), probe.collecting(backbone) as found:
        raise RuntimeError("stop")
    features(backbone)
    assert found == []


@every_kind
@pytest.mark.parametrize("expert", [0, 2])
def test_forced_to_one_expert_is_that_expert_alone(build, expert):
    backbone = build()
    with probe.forced(backbone, expert):
        torch.testing.assert_close(features(backbone), features(alone(backbone, expert)), rtol=0, atol=1e-12)


@every_kind
def test_forced_uniform_is_the_mean_of_the_experts(build):
    backbone = build()

    class Mean(Slot):
        def __init__(self, experts):
            super().__init__()
            self.experts = nn.ModuleList(experts)

        def forward(self, x, gates):
            return torch.stack([expert(x) for expert in self.experts]).mean(dim=0)

    mean = toy_backbone().double()
    for layer in (1, 2):
        slot = backbone.slots[str(layer)]
        mean.fill(layer, Mean(slot.experts if isinstance(slot, SparseMoE) else slot.adapters))
    with probe.forced(backbone, "uniform"):
        torch.testing.assert_close(features(backbone), features(mean), rtol=0, atol=1e-12)


@every_kind
def test_random_choices_come_from_the_seed_alone_whatever_the_batch(build):
    backbone = build()

    def drawn(seed, *batches):
        with probe.forced(backbone, "random", seed):
            return torch.cat([features(backbone, batch) for batch in batches])

    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(drawn(3, IMAGES), drawn(3, IMAGES))
    torch.testing.assert_close(drawn(3, IMAGES), drawn(3, IMAGES[:2], IMAGES[2:]), rtol=0, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), state)
    every = probe._routers(backbone)[0].top_k is None  # then random is uniform
    assert torch.allclose(drawn(4, IMAGES), drawn(3, IMAGES)) == every


@pytest.mark.parametrize("top_k", [1, 2, None])
@pytest.mark.parametrize("scope", ["shared", "layer"])
def test_random_gates_are_on_as_many_experts_as_the_router_chooses(scope, top_k):
    backbone, seen = mixed(scope, top_k=top_k), []
    for slot in backbone.slots.values():
        slot.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    with probe.forced(backbone, "random"):
        features(backbone)
    assert len(seen) == 2
    for gates in seen:
        assert ((gates > 0).sum(dim=-1) == (top_k or 3)).all()
    if top_k is not None:  # the layers draw on their own
        assert not torch.equal(seen[0] > 0, seen[1] > 0)


@pytest.mark.parametrize("how", ["uniform", "random", 1])
def test_a_top_1_router_gives_its_gate_to_whoever_is_forced(how):
    backbone = sparse(top_k=1)
    with probe.collecting(backbone) as learned:
        features(backbone)
    given = []
    slot = backbone.slots["1"]
    slot.register_forward_pre_hook(lambda m, x: given.append(m.route(x[0]).gates.sum(dim=-1)))
    with probe.forced(backbone, how):
        features(backbone)
    torch.testing.assert_close(given[0], learned[0].gates.sum(dim=-1), rtol=0, atol=1e-12)
    assert (given[0] < 0.999).any()


@every_kind
@pytest.mark.parametrize("how", ["uniform", "random", 0])
def test_nothing_stays_behind(build, how):
    backbone = build()
    plain, state = features(backbone), {k: v.clone() for k, v in backbone.state_dict().items()}
    with probe.forced(backbone, how):
        features(backbone)
    assert torch.equal(features(backbone), plain)
    with pytest.raises(RuntimeError, match="stop"), probe.forced(backbone, how):
        raise RuntimeError("stop")
    assert torch.equal(features(backbone), plain)
    assert all(torch.equal(v, backbone.state_dict()[k]) for k, v in state.items())
    assert not any(module._forward_hooks for module in backbone.modules())


def test_what_cannot_be_forced_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="no learned router"), probe.forced(toy_backbone(), "uniform"):
        pass
    with pytest.raises(ValueError, match=r"expert 3 does not exist, there are experts 0\.\.2"):
        probe.forced(sparse(), 3).__enter__()
