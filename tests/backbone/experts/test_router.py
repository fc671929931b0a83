"""The router's choice, gates and gradients; its growth, temperature, noise and selection bias; fixed routing."""

import pytest
import torch
from torch.nn import functional as F

from backbone.experts.router import CLOSED, MOST_SURE, Router, one_expert, random_experts, temperature, uniform


def router_of(width=6, experts=4, top_k=None, seed=0, **settings):
    """A float64 router whose columns are drawn, not zero."""
    router = Router(width, experts, top_k, **settings).double()
    torch.manual_seed(seed)
    for column in router.columns:
        torch.nn.init.normal_(column)
    return router


def x_of(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_starts_uniform_and_dense_gates_are_the_softmax():
    x = x_of(3, 5, 6)
    assert torch.equal(Router(6, 4).double()(x).gates, torch.full((3, 5, 4), 0.25, dtype=torch.float64))
    router = router_of()
    routing = router(x)
    torch.testing.assert_close(routing.gates, (x @ torch.stack(list(router.columns)).T).softmax(-1))
    assert routing.chosen.shape == (3, 5, 4) and torch.equal(routing.chosen[..., 0], routing.gates.argmax(-1))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_top_k_against_a_slow_plain_version(k):
    router, x = router_of(top_k=k), x_of(7, 6)
    routing = router(x)
    for token in range(7):
        p = torch.stack([column @ x[token] for column in router.columns]).softmax(0)
        best = sorted(range(4), key=lambda e: -p[e])[:k]
        expected = torch.zeros(4, dtype=torch.float64)
        for e in best:
            expected[e] = p[e] if k == 1 else p[e] / sum(p[i] for i in best)
        torch.testing.assert_close(routing.gates[token], expected, rtol=0, atol=1e-15)
        torch.testing.assert_close(routing.probabilities[token], p, rtol=0, atol=1e-15)
        assert routing.chosen[token].tolist() == best


def test_equal_probabilities_choose_the_first_experts_in_any_batch():
    router = Router(6, 40, 2)
    for size in (1, 3, 200):
        assert torch.equal(router(torch.randn(size, 6)).chosen, torch.tensor([0, 1]).expand(size, 2))


def test_a_gate_renormalised_at_k_1_would_give_the_router_no_gradient():
    router, x = router_of(top_k=1), x_of(7, 6)
    gates = router(x).gates
    (gates / gates.sum(-1, keepdim=True)).square().sum().backward()  # what renormalising would do: gates of 1
    assert all(column.grad.abs().max() < 1e-14 for column in router.columns)
    router.zero_grad()
    router(x).gates.square().sum().backward()
    assert max(column.grad.abs().max() for column in router.columns) > 1e-3


def test_a_sample_is_routed_by_its_mean_token():
    token, sample = router_of(top_k=2), router_of(top_k=2, granularity="sample")
    x = x_of(3, 5, 6)
    routing = sample(x)
    assert routing.gates.shape == (3, 4) and routing.chosen.shape == (3, 2)
    assert torch.equal(routing.gates, token(x.mean(1)).gates)


@pytest.mark.parametrize("k", [None, 1, 2])
def test_gradcheck(k):
    router = router_of(width=3, top_k=k)
    x = x_of(4, 3, seed=2).requires_grad_()
    top = router(x).probabilities.sort(-1, descending=True).values
    assert (top[:, :-1] - top[:, 1:]).min() > 1e-3  # a margin: no choice flips within gradcheck's steps
    assert torch.autograd.gradcheck(lambda x, *_: router(x).gates, (x, *router.columns))


def test_logits_are_float32_under_bf16_autocast():
    router = Router(64, 3)
    for column in router.columns:
        torch.nn.init.normal_(column)
    x = torch.randn(5, 64)
    plain = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x)
        assert router(x.bfloat16()).logits.dtype == torch.float32
    assert routing.logits.dtype == routing.gates.dtype == torch.float32
    assert torch.equal(routing.logits, plain.logits)


def test_the_center_is_subtracted_before_routing():
    router, x = router_of(top_k=2), x_of(5, 6)
    mean = x.mean(0)
    expected = router(x - mean).gates
    router.set_center(mean)
    assert torch.equal(router(x).gates, expected)


# Temperature --------------------------------------------------------------------------------------------------------


def test_temperature_schedule():
    assert [temperature(step, 4, 4.0, 0.25) for step in range(5)] == [4.0, 2.0, 1.0, 0.5, 0.25]
    assert temperature(3, 10, 1.5, 1.5) == 1.5
    for bad in ((0, 0, 1.0, 1.0), (0, 4, 0.0, 1.0), (0, 4, 1.0, -1.0)):
        with pytest.raises(ValueError, match="schedule"):
            temperature(*bad)


def test_temperature_divides_the_logits_and_is_saved():
    router, x = router_of(), x_of(5, 6)
    logits = router(x).logits
    router.set_temperature(0.5)
    torch.testing.assert_close(router(x).gates, (logits / 0.5).softmax(-1))
    again = Router(6, 4).double()
    again.load_state_dict(router.state_dict())
    assert torch.equal(again(x).gates, router(x).gates)
    with pytest.raises(ValueError, match="above 0"):
        router.set_temperature(0)


# Noise --------------------------------------------------------------------------------------------------------------


def test_noise_is_of_the_trained_scale_and_in_training_alone():
    router, x = router_of(top_k=2, noisy=True), x_of(9, 6)
    torch.nn.init.normal_(router.noise[1])
    clean = x @ torch.stack(list(router.columns)).T
    assert torch.equal(router.eval()(x).logits, clean)
    noisy = router.train()(x, torch.Generator().manual_seed(3)).logits
    drawn = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(noisy, clean + drawn * F.softplus(x @ torch.stack(list(router.noise)).T))
    torch.manual_seed(3)
    assert torch.equal(router(x).logits, noisy)  # without a generator: torch's own
    router(x).gates.square().sum().backward()
    assert any(scale.grad.abs().max() > 0 for scale in router.noise)


# Growth -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [None, 1, 2, 6])
@pytest.mark.parametrize("heat", [0.1, 1.0, 50.0])
def test_growing_keeps_the_old_output(k, heat):
    router, x = router_of(top_k=k, noisy=True), x_of(50, 6)
    router.set_temperature(heat)
    router.update_bias(torch.tensor([5, 0, 9, 1]), rate=0.05)
    router.eval()
    before = router(x)
    router.grow()
    after = router(x)
    assert len(router) == 5 and after.gates.shape == (50, 5)
    torch.testing.assert_close(after.gates[:, :4], before.gates, rtol=0, atol=1e-15)
    assert torch.equal(after.gates[:, 4], torch.zeros_like(after.gates[:, 4]))
    assert torch.equal(after.chosen[:, : before.chosen.shape[1]], before.chosen)
    assert len(router.parameters_of(4)) == 2


def test_a_grown_expert_opens_by_its_offset_and_old_columns_stay_frozen():
    router, x = router_of(), x_of(8, 6)
    for column in router.parameters():
        column.requires_grad_(False)
    router.grow()
    assert router.offset.tolist() == [0, 0, 0, 0, CLOSED]
    router(x).gates[:, 0].sum().backward()
    assert torch.equal(router.columns[4].grad, torch.zeros_like(router.columns[4]))
    router.set_offset(4, 0.0)
    logits = F.pad(x @ torch.stack(list(router.columns)[:4]).T, (0, 1))  # a fresh column: logit 0
    torch.testing.assert_close(router(x).gates, logits.softmax(-1))
    router(x).gates[:, 0].sum().backward()
    assert router.columns[4].grad.abs().max() > 0 and all(c.grad is None for c in list(router.columns)[:4])


# Bias balancing -----------------------------------------------------------------------------------------------------


def test_bias_moves_the_selection_but_not_the_weights():
    router, x = router_of(top_k=1), x_of(20, 6)
    before = router(x)
    router.selection_bias.copy_(torch.tensor([0.0, 0.0, 2.0, 0.0]))
    after = router(x)
    assert torch.equal(after.chosen, torch.full((20, 1), 2)) and not torch.equal(before.chosen, after.chosen)
    assert torch.equal(after.probabilities, before.probabilities)
    assert torch.equal(after.gates[:, 2], before.probabilities[:, 2])


def test_update_bias_by_hand_and_only_there():
    router = Router(6, 4, 1)
    router.train()(torch.randn(9, 6)).gates.sum().backward()
    assert torch.equal(router.selection_bias, torch.zeros(4))  # forward never moves it
    router.update_bias(torch.tensor([10, 2, 4, 0]), rate=0.25)  # mean 4
    assert router.selection_bias.tolist() == [-0.25, 0.25, 0.0, 0.25]
    router.update_bias(torch.tensor([10, 2, 4, 0]), rate=0.25, among=torch.tensor([True, False, True, False]))  # mean 7
    assert router.selection_bias.tolist() == [-0.5, 0.25, 0.25, 0.25]


def test_bias_balancing_spreads_a_collapsed_choice():
    torch.manual_seed(0)
    router, x = Router(6, 4, 1), torch.randn(400, 6)
    torch.nn.init.normal_(router.columns[0], std=0.1)
    for column in list(router.columns)[1:]:
        torch.nn.init.normal_(column, std=0.01)
    router.set_offset(0, 1.0)
    assert torch.bincount(router(x).chosen.flatten(), minlength=4).tolist() == [400, 0, 0, 0]
    for _ in range(800):
        router.update_bias(torch.bincount(router(x).chosen.flatten(), minlength=4), rate=0.001)
    assert torch.bincount(router(x).chosen.flatten(), minlength=4).min() > 60


# Fixed routing ------------------------------------------------------------------------------------------------------


def test_fixed_routing():
    x = torch.randn(2, 3, 6)
    even = uniform(x, 4)
    assert torch.equal(even.gates, torch.full((2, 3, 4), 0.25)) and even.chosen.shape == (2, 3, 4)
    one = one_expert(x, 4, 2)
    assert torch.equal(one.gates, F.one_hot(torch.full((2, 3), 2), 4).float()) and one.chosen.shape == (2, 3, 1)
    oracle = one_expert(x, 4, torch.tensor([3, 0]))  # an expert for each sample
    assert oracle.chosen.squeeze(-1).tolist() == [[3, 3, 3], [0, 0, 0]]
    for routing in (even, one, oracle):
        torch.testing.assert_close(routing.logits.softmax(-1), routing.probabilities)
    with pytest.raises(ValueError, match=r"0\.\.3"):
        one_expert(x, 4, 4)


def test_random_routing_is_seeded_and_even():
    x = torch.randn(500, 6)
    first = random_experts(x, 4, 2, torch.Generator().manual_seed(5))
    assert torch.equal(first.gates, random_experts(x, 4, 2, torch.Generator().manual_seed(5)).gates)
    assert not torch.equal(first.gates, random_experts(x, 4, 2, torch.Generator().manual_seed(6)).gates)
    assert torch.equal(first.gates.count_nonzero(dim=1), torch.full((500,), 2))
    assert torch.equal(first.gates.sum(1), torch.ones(500))
    assert torch.bincount(first.chosen.flatten()).min() > 200
    with pytest.raises(ValueError, match="cannot be drawn"):
        random_experts(x, 4, 5)


def test_bad_settings_are_named():
    for settings in ({"experts": 0}, {"experts": 2, "top_k": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            Router(6, **settings)
    with pytest.raises(ValueError, match="token, sample"):
        Router(6, 2, granularity="image")


def test_an_aimed_expert_starts_as_a_linear_discriminant():
    router = Router(2, 1).double()
    router.grow()
    inputs = torch.tensor(
        [[3.0, 4.0], [9.0, 12.0], [6.0, 8.0]]
    ).double()  # mean (6, 8) of length 10, deviations along it
    router.aim(1, inputs)
    variance = (25 + 25 + 0) / 3
    expected = {(0.0, 0.0): -50 / variance, (3.0, 4.0): 0.0, (6.0, 8.0): 50 / variance}
    for x, odds in expected.items():
        logits = router(torch.tensor([[x]]).double()).logits[0, 0]
        assert (logits[1] - logits[0]).item() == pytest.approx(odds, abs=1e-12)
    sideways = router(torch.tensor([[[3.0 + 8.0, 4.0 - 6.0]]]).double())  # across the line between the means
    assert sideways.gates[0, 0].tolist() == pytest.approx([0.5, 0.5])


def test_aiming_is_never_surer_than_its_limit_and_holds_at_the_present_temperature():
    router = Router(2, 1).double()
    router.set_temperature(0.5)
    router.grow()
    inputs = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).double()  # no variance at all
    router.aim(1, inputs)
    logits = router(inputs[None]).logits[0, 0]
    assert (logits[1] - logits[0]).item() == pytest.approx(MOST_SURE)
    with pytest.raises(ValueError, match="no direction"):
        router.aim(1, torch.zeros(3, 2).double())
