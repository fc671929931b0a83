"""The sparse layer: equal to the plain loop however it is computed, and the tests that catch what sinks such layers."""

import pytest
import torch
from torch.nn import functional as F

from backbone.adapters.adapter import Adapter
from backbone.experts.balance import assignments, balance_loss
from backbone.experts.moe import SparseMoE, SwiGLU, grouped_works, hidden_for, rank_for, within_capacity
from backbone.experts.router import one_expert

WAYS = [
    "dense",
    "loop",
    pytest.param(
        "grouped",
        marks=pytest.mark.skipif(
            not grouped_works("cpu", torch.float32, 16, 8), reason="this torch has no grouped_mm for float32 on the CPU"
        ),
    ),
]


def moe_of(experts=4, top_k=1, width=16, hidden=8, seed=0, double=False, **settings):
    """A layer whose up projections and router are drawn, not zero."""
    torch.manual_seed(seed)
    moe = SparseMoE(width, hidden, experts, top_k, **settings)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return moe.double() if double else moe


def x_of(*shape, seed=1, double=False):
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x if double else x.float()


def plain(moe, x):
    """Token by token, expert by expert, from the formulas alone."""
    y = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for n in range(x.shape[1]):
            routing = moe.route(x[b : b + 1, n : n + 1])
            for e, expert in enumerate(moe.experts):
                h = F.silu(expert.gate_proj.weight @ x[b, n]) * (expert.down_proj.weight @ x[b, n])
                y[b, n] += routing.gates[0, 0, e] * (expert.up_proj.weight @ h)
    return y


def close(ours, wanted):
    """In float32 sums in another order differ by some rounding steps of the largest value."""
    torch.testing.assert_close(ours, wanted, rtol=0, atol=4e-6 * wanted.abs().max().item())


def gradients(moe, x, weight):
    moe.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    (moe(x) * weight).sum().backward()
    return [x.grad, *(p.grad for p in moe.parameters())]


@pytest.mark.parametrize("dispatch", WAYS)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_equals_the_plain_loop_with_its_gradients(dispatch, k):
    moe, x, weight = moe_of(top_k=k, dispatch=dispatch), x_of(2, 7, 16) * 0.5, x_of(2, 7, 16, seed=2)
    close(moe(x), plain(moe, x))
    ours = gradients(moe, x, weight)
    moe.forward = lambda x: plain(moe, x)
    for a, b in zip(ours, gradients(moe, x, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # sums over 14 tokens in another order


@pytest.mark.parametrize("dispatch", ["dense", "loop"])
@pytest.mark.parametrize("k", [1, 2])
def test_equals_the_plain_loop_in_float64(dispatch, k):
    moe, x = moe_of(top_k=k, dispatch=dispatch, double=True), x_of(2, 7, 16, double=True)
    torch.testing.assert_close(moe(x), plain(moe, x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dispatch", WAYS)
@pytest.mark.parametrize("expert", [0, 3])
def test_forced_one_hot_is_that_expert_alone(dispatch, expert):
    moe, x = moe_of(dispatch=dispatch), x_of(2, 5, 16)
    moe.fix(expert)
    close(moe(x), moe.experts[expert](x))
    moe.fix(lambda x: one_expert(x, 4, torch.tensor([0, 2])))  # an oracle's expert for each sample
    expected = torch.stack([moe.experts[0](x[0]), moe.experts[2](x[1])])
    close(moe(x), expected)


@pytest.mark.parametrize("dispatch", WAYS)
def test_identical_experts_are_the_dense_layer(dispatch):
    moe, x = moe_of(top_k=2, dispatch=dispatch), x_of(2, 5, 16)
    for expert in moe.experts[1:]:
        expert.load_state_dict(moe.experts[0].state_dict())
    alone = moe.experts[0](x)
    close(moe(x), alone)  # gates of k = 2 sum to 1
    moe.fix("uniform")
    close(moe(x), alone)
    moe.fix(None)
    moe.router.top_k = 1
    p = moe.route(x).probabilities.amax(-1, keepdim=True)
    close(moe(x), p * alone)  # of k = 1 it is p


@pytest.mark.parametrize("dispatch", ["dense", "loop"])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_gradcheck(dispatch, k, granularity):
    moe = moe_of(3, k, width=3, hidden=2, dispatch=dispatch, double=True, granularity=granularity)
    x = x_of(2, 2, 3, double=True, seed=3).requires_grad_()
    p = moe.route(x).probabilities.sort(-1, descending=True).values
    assert (p[..., :-1] - p[..., 1:]).min() > 1e-3  # a margin: no choice flips within gradcheck's steps
    assert torch.autograd.gradcheck(lambda x, *_: moe(x), (x, *moe.parameters()))


@pytest.mark.parametrize("dispatch", WAYS)
@pytest.mark.parametrize("k", [1, 2])
def test_the_task_loss_alone_moves_the_router(dispatch, k):
    moe, x = moe_of(top_k=k, dispatch=dispatch), x_of(4, 5, 16)
    moe(x).square().mean().backward()
    assert max(column.grad.abs().max() for column in moe.router.columns) > 1e-4


def test_balance_loss_of_the_layer_at_uniform_and_collapse():
    moe, x = moe_of(), x_of(2, 6, 16)
    moe.fix("uniform")
    assert balance_loss(moe.forward_with_routing(x)[1]).item() == pytest.approx(1)
    moe.fix(2)
    assert balance_loss(moe.forward_with_routing(x)[1]).item() == pytest.approx(4)


@pytest.mark.parametrize("dispatch", WAYS)
@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_a_sample_alone_is_as_in_a_batch(dispatch, granularity):
    moe = moe_of(top_k=2, dispatch=dispatch, granularity=granularity, capacity=0.1).eval()  # capacity never acts here
    x = x_of(6, 5, 16)
    together = moe(x)
    for index in range(6):
        close(moe(x[index : index + 1])[0], together[index])


@pytest.mark.parametrize("k", [1, 2])
def test_overfits_one_batch_as_a_dense_adapter_of_equal_active_size_does(k):
    x, target = x_of(16, 4, 16), x_of(16, 4, 16, seed=2)
    torch.manual_seed(0)
    adapter, moe = Adapter(16, 48), SparseMoE(16, hidden_for(16, 48, experts=4, top_k=k), experts=4, top_k=k)
    adapter.reset_parameters()
    losses = {}
    for name, layer in (("dense", adapter), ("moe", moe)):
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
        for _ in range(200):
            optimizer.zero_grad()
            loss = (layer(x) - target).square().mean()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
    assert losses["dense"] < 0.02 and losses["moe"] < 0.02  # both start at about 1


@pytest.mark.parametrize("dispatch", WAYS)
def test_unused_experts_get_exactly_zero_gradient(dispatch):
    moe, x = moe_of(dispatch=dispatch), x_of(4, 5, 16)
    moe.router.offset.copy_(torch.tensor([0.0, -1e4, 0.0, -1e4]))
    moe(x).square().sum().backward()
    for e, expert in enumerate(moe.experts):
        for parameter in expert.parameters():
            assert (parameter.grad.count_nonzero() == 0) == (e in (1, 3))


@pytest.mark.parametrize("dispatch", WAYS)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_adding_an_expert_at_gate_zero_changes_nothing(dispatch, k):
    moe, x = moe_of(top_k=k, dispatch=dispatch), x_of(4, 5, 16)
    before = moe(x)
    moe.grow(torch.Generator().manual_seed(7))
    torch.nn.init.normal_(moe.experts[4].up_proj.weight)  # not for its zero output: for its gate
    close(moe(x), before)
    moe.router.set_offset(4, 0.0)
    assert (moe(x) - before).abs().max() > 1e-2


@pytest.mark.parametrize("dispatch", WAYS)
def test_no_residual_inside_and_the_start_is_exactly_zero(dispatch):
    moe, x = SparseMoE(16, 8, 4, 2, dispatch=dispatch), x_of(2, 5, 16)
    assert torch.equal(moe(x), torch.zeros_like(x))
    moe(x).sum().backward()
    assert sum(expert.up_proj.weight.grad.abs().sum() for expert in moe.experts) > 0  # and still learns
    for parameter in moe.experts.parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.equal(moe(x), torch.zeros_like(x))


# Capacity -----------------------------------------------------------------------------------------------------------


def test_capacity_serves_first_choices_first_then_the_order_of_the_batch():
    chosen = torch.tensor([[0, 1], [0, 1], [1, 0], [0, 2]])  # 8 assignments, 4 experts
    # room for two: expert 0 takes tokens 0 and 1; expert 1 takes token 2's first choice, then token 0's second
    expected = [[1, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
    assert within_capacity(chosen, 4, 1.0).tolist() == expected
    assert within_capacity(chosen, 4, 0.5).tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]


@pytest.mark.parametrize("dispatch", WAYS)
def test_capacity_drops_in_training_alone(dispatch):
    moe, x = moe_of(2, dispatch=dispatch, capacity=0.5), x_of(1, 8, 16)
    moe.fix(1)
    y, routing = moe.train().forward_with_routing(x)  # room for ceil(0.5 * 8 / 2) = 2 of 8
    close(y[:, :2], moe.experts[1](x)[:, :2])
    assert torch.equal(y[:, 2:], torch.zeros_like(y[:, 2:]))
    assert routing.gates[0, :, 1].tolist() == [1, 1, 0, 0, 0, 0, 0, 0] and assignments(routing).tolist() == [0, 8]
    close(moe.eval()(x), moe.experts[1](x))


# As a slot ----------------------------------------------------------------------------------------------------------


def test_routings_are_collected_in_the_callers_list_and_forward_keeps_the_state():
    moe, x = moe_of(noisy=True, capacity=1.0), x_of(2, 5, 16)
    before = {name: value.clone() for name, value in moe.state_dict().items()}
    moe.collect = collected = []
    moe.train()(x)
    moe(x)
    moe.collect = None
    moe(x)
    assert [routing.gates.shape for routing in collected] == [(2, 5, 4)] * 2
    assert all(torch.equal(value, before[name]) for name, value in moe.state_dict().items())


def test_reset_is_seeded_and_growth_keeps_type():
    first, again = SparseMoE(16, 8, 2), SparseMoE(16, 8, 2)
    for moe in (first, again):
        moe.reset_parameters(torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    moe = moe_of(double=True)
    moe.grow()
    assert {p.dtype for p in moe.parameters()} == {torch.float64} and len(moe.router) == len(moe.experts) == 5


@pytest.mark.parametrize("dispatch", WAYS)
def test_bf16_autocast_is_close_to_float32_with_the_same_choice(dispatch):
    if dispatch == "grouped" and not grouped_works("cpu", torch.bfloat16, 16, 8):
        pytest.skip("this torch has no grouped_mm for bfloat16 on the CPU")
    moe, x = moe_of(top_k=2, dispatch=dispatch), x_of(2, 5, 16) * 0.5
    y, routing = moe.forward_with_routing(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, same = moe.forward_with_routing(x)
    assert low.dtype == torch.bfloat16 and torch.equal(same.chosen, routing.chosen)
    assert (low.float() - y).abs().max() < 0.03 * y.abs().max()


def test_auto_takes_a_way_that_works_and_a_forced_one_that_does_not_is_named():
    moe, x = moe_of(hidden=64, double=True), x_of(2, 5, 16, double=True)  # 4 * 64 > 64: sorted
    assert moe._resolve(x, 1) == "loop" and moe._resolve(x, 4) == "dense"
    assert moe_of(hidden=16)._resolve(x, 1) == "dense"
    moe.dispatch = "grouped"
    if not grouped_works("cpu", torch.float64, 16, 64):
        with pytest.raises(ValueError, match="set dispatch to auto"):
            moe(x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dispatch", ["loop", "grouped"])
def test_on_a_gpu_all_ways_are_equal(dispatch):
    if dispatch == "grouped" and not grouped_works("cuda", torch.bfloat16, 64, 64):
        pytest.skip("this torch has no grouped_mm on this device")
    moe, x = moe_of(top_k=2, width=64, hidden=64).cuda().bfloat16(), x_of(4, 9, 64).cuda().bfloat16()
    moe.dispatch = "dense"
    expected = moe(x)
    moe.dispatch = dispatch
    torch.testing.assert_close(moe(x), expected, rtol=0.02, atol=0.02 * expected.abs().max().item())
    moe.router.offset.copy_(torch.tensor([0.0, 0.0, 0.0, -1e4]))
    moe(x).sum().backward()
    assert all(p.grad.count_nonzero() == 0 for p in moe.experts[3].parameters())


# Sizes --------------------------------------------------------------------------------------------------------------


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("rank", "experts"), [(300, 4), (301, 4), (75, 1), (600, 8)])
def test_hidden_for_matches_an_adapter_within_one_percent(rank, experts):
    moe = SparseMoE(192, hidden_for(192, rank, experts), experts)
    assert abs(count(moe) / count(Adapter(192, rank)) - 1) < 0.01
    active = SparseMoE(192, hidden_for(192, rank, experts, top_k=1), experts)
    passed = count(active.experts[0]) + count(active.router)
    assert abs(passed / count(Adapter(192, rank)) - 1) < 0.01


@pytest.mark.parametrize("hidden", [9, 16, 57])
@pytest.mark.parametrize("noisy", [False, True])
def test_rank_for_matches_a_layer_within_one_percent(hidden, noisy):
    adapter = Adapter(192, rank_for(192, hidden, 4, noisy=noisy))
    assert abs(count(adapter) / count(SparseMoE(192, hidden, 4, noisy=noisy)) - 1) < 0.01


def test_hidden_for_is_the_nearest_and_says_when_there_is_none():
    for rank in (16, 33):
        best = min(range(1, 60), key=lambda h: abs(count(SparseMoE(24, h, 4)) - count(Adapter(24, rank))))
        assert hidden_for(24, rank, 4) == best
    with pytest.raises(ValueError, match="too small"):
        hidden_for(24, 4, 8)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="capacity above 0"):
        SparseMoE(16, 8, 2, capacity=0)
    with pytest.raises(ValueError, match="dense, loop, grouped"):
        SparseMoE(16, 8, 2, dispatch="fast")
    moe = SparseMoE(16, 8, 2)
    with pytest.raises(ValueError, match="expected uniform"):
        moe.fix("even")
    with pytest.raises(ValueError, match=r"0\.\.1"):
        moe.fix(2)


def test_swiglu_by_hand():
    expert = SwiGLU(2, 1)
    with torch.no_grad():
        expert.gate_proj.weight.copy_(torch.tensor([[1.0, 0.0]]))
        expert.down_proj.weight.copy_(torch.tensor([[0.0, 2.0]]))
        expert.up_proj.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    value = 3 / (1 + torch.exp(torch.tensor(-3.0))) * 10  # silu(3) * 2 * 5
    torch.testing.assert_close(expert(torch.tensor([3.0, 5.0])), torch.stack([value, -value]))
