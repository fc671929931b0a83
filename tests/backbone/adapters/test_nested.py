"""Nested adapters against the plain loop over their parts, and late branching against separate full passes, in float64."""

import pytest
import torch
from torch import nn

from backbone.adapters.adapter import Adapter
from backbone.adapters.nested import NestedLoRAAdapter
from tests.helpers.toy import toy_backbone

D = 16


def nested_of(experts=2, levels=2, seed=0, width=D, rank=3, **other):
    """In float64, every parameter away from its start value."""
    made = NestedLoRAAdapter(width, rank, experts, levels=levels, **other).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return made


def tokens(batch=4):
    x = torch.randn(batch, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    return x.requires_grad_()


def alike(ours, plain, inputs):
    """Equal values, and equal gradients of a weighted sum; a parameter that does not act has none in either."""
    assert (ours - plain).abs().max() < 1e-12
    weight = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    a, b = (torch.autograd.grad((y * weight).sum(), inputs, allow_unused=True) for y in (ours, plain))
    assert any(g is not None for g in a)
    for one, other in zip(a, b, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one - other).abs().max() < 1e-12


# The adapter ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["combined", "slow", "fast"])
@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_equals_the_plain_sum_with_its_gradients(activation, experts, levels, part):
    nested, x = nested_of(experts, levels, activation=activation), tokens()
    counts = len(nested.middle), len(nested.fast)
    assert counts == ((0, 0) if levels == 1 else (levels - 2, experts))
    nested.use(part)
    chosen = {"combined": nested.adapters(), "slow": [nested.slow], "fast": list(nested.fast)}[part]
    plain = sum((adapter(x) for adapter in chosen), torch.zeros_like(x))
    if not chosen:
        assert torch.equal(nested(x), plain)
        return
    alike(nested(x), plain, [x, *nested.parameters()])


@pytest.mark.parametrize("levels", [2, 4])
@pytest.mark.parametrize("active", [None, (2, 0)])
def test_in_branches_copy_k_sees_what_is_shared_and_fast_expert_k_alone(active, levels):
    nested, x = nested_of(3, levels), tokens(6)
    nested.use("combined", active, branches=True)
    order = (0, 1, 2) if active is None else active
    shared = [nested.slow, *nested.middle]
    parts = [
        sum(a(copy) for a in [*shared, nested.fast[k]]) for k, copy in zip(order, x.chunk(len(order)), strict=True)
    ]
    alike(nested(x), torch.cat(parts), [x, *nested.parameters()])
    nested.use("fast", active, branches=True)
    alone = [nested.fast[k](copy) for k, copy in zip(order, x.chunk(len(order)), strict=True)]
    assert (nested(x) - torch.cat(alone)).abs().max() < 1e-12
    nested.use("slow", active, branches=True)
    assert (nested(x) - nested.slow(x)).abs().max() < 1e-12


def test_other_branches_give_an_expert_exactly_no_gradient():
    nested, x = nested_of(3), tokens(6)
    nested.use("combined", branches=True)
    nested(x)[:4].square().sum().backward()  # the copies of experts 0 and 1
    gradients = [[p.grad.abs().max().item() for p in expert.parameters()] for expert in nested.fast]
    assert gradients[2] == [0.0] * 4 and min(gradients[0] + gradients[1]) > 0


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="at least 1 fast expert and 1 level are needed, got 0 and 2"):
        NestedLoRAAdapter(D, 2, 0)
    with pytest.raises(ValueError, match="got 1 and 0"):
        NestedLoRAAdapter(D, 2, levels=0)
    nested = nested_of(3)
    nested.use("combined", branches=True)
    with pytest.raises(ValueError, match="a batch of 4 cannot be divided into 3 branches of equal size"):
        nested(tokens(4))


def test_starts_as_lora_does_and_every_part_differently():
    nested = NestedLoRAAdapter(D, 3, 2, levels=3).double()
    nested.reset_parameters(torch.Generator().manual_seed(0))
    assert torch.equal(nested(tokens()), torch.zeros(4, 5, D).double())
    downs = [adapter.down_proj.weight for adapter in nested.adapters()]
    assert not any(torch.equal(a, b) for i, a in enumerate(downs) for b in downs[:i])
    shared = NestedLoRAAdapter(D, 3, 2, levels=3, shared_down=True)
    shared.reset_parameters(torch.Generator().manual_seed(0))
    assert all(torch.equal(a.down_proj.weight, shared.slow.down_proj.weight) for a in shared.adapters())


def test_what_is_trained_with_a_shared_down_projection():
    for shared in (False, True):
        nested = nested_of(2, 3, shared_down=shared)
        trained = {id(p) for a in nested.adapters() for p in nested.trainable(a)}
        expected = [p for name, p in nested.named_parameters() if "up_proj" in name or not shared]
        assert trained == {id(p) for p in expected}


def test_replacing_and_resizing():
    """`replace` counts as `adapters()` does; `resize` rebuilds what `ranks` says, and the state then fits."""
    nested, x = nested_of(2, 3), tokens()
    for position, rank in enumerate((5, 4, 3, 2)):
        fresh = Adapter(D, rank).double()
        nested.replace(position, fresh)
        assert nested.adapters()[position] is fresh
    assert nested.ranks() == [5, 4, 3, 2]
    again = nested_of(2, 3, seed=1)
    again.resize(nested.ranks())
    again.load_state_dict(nested.state_dict())
    assert torch.equal(again(x), nested(x)) and again.ranks() == [5, 4, 3, 2]
    shared = nested_of(1, 2, shared_down=True)
    shared.replace(1, Adapter(D, 3).double())
    assert torch.equal(shared.fast[0].down_proj.weight, shared.slow.down_proj.weight)


# Late branching ---------------------------------------------------------------------------------------------------------


def adapted(layers, experts, seed=0, **sizes):
    backbone = toy_backbone(**sizes).double()
    for layer in layers:
        backbone.fill(layer, nested_of(experts, seed=seed + layer))
    return backbone


def use(backbone, *args, **other):
    for slot in backbone.slots.values():
        slot.use(*args, **other)


@pytest.mark.parametrize("layers", [(2,), (1, 2), (0, 1, 2), (0, 2)])
def test_branches_equal_separate_full_passes(layers):
    experts = 3
    backbone = adapted(layers, experts)
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    use(backbone, "combined", branches=True)
    ours = backbone(images, branches=experts)
    assert ours.shape == (6, D)
    full = []
    for k in range(experts):
        use(backbone, "combined", [k])
        full.append(backbone(images))
    alike(ours, torch.cat(full), [images, *backbone.slots.parameters()])
    assert (full[0] - full[1]).abs().max() > 1e-3


def test_without_slots_the_copies_are_equal_and_one_branch_is_the_plain_pass():
    backbone = toy_backbone().double()
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(backbone(images, branches=3), backbone(images).repeat(3, 1), rtol=1e-12, atol=1e-12)
    backbone = adapted((1,), 1)
    assert torch.equal(backbone(images, branches=1), backbone(images))


def evaluations(backbone, run, batch):
    """(forward, backward) block evaluations of run(), in units of one block on the un-repeated batch."""
    counts = [0.0, 0.0]

    def forward(module, inputs, output):
        counts[0] += output.shape[0] / batch / 2

    def backward(module, grad_input, grad_output):
        counts[1] += grad_output[0].shape[0] / batch / 2

    halves = [half for block in backbone.vit.blocks for half in (block.attn, block.mlp)]
    hooks = [h.register_forward_hook(forward) for h in halves]
    hooks += [h.register_full_backward_hook(backward) for h in halves]
    run().square().sum().backward()
    for hook in hooks:
        hook.remove()
    return tuple(counts)


@pytest.mark.parametrize("k", [2, 4])
def test_block_evaluations_of_twelve_blocks_with_adapters_in_the_last_three(k):
    backbone = adapted((9, 10, 11), k, depth=12)
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    use(backbone, "combined", branches=True)
    late = evaluations(backbone, lambda: backbone(images, branches=k), batch=2)
    plain = evaluations(backbone, lambda: backbone(images.repeat(k, 1, 1, 1)), batch=2)
    assert (late[0], sum(late)) == (10 + 2 * k, 10 + 4 * k)
    assert (plain[0], sum(plain)) == (12 * k, 14 * k)


def test_block_evaluations_with_adapters_everywhere():
    """Only the first block is shared; nothing below its adapter needs a gradient."""
    backbone = adapted(range(12), 4, depth=12)
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    use(backbone, "combined", branches=True)
    assert evaluations(backbone, lambda: backbone(images, branches=4), batch=2) == (1 + 11 * 4, 11 * 4)
