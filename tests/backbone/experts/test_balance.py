"""Auxiliary losses at their two ends and by hand, their gradients, and the use of experts."""

import math

import pytest
import torch

from backbone.experts.balance import assignments, balance_loss, entropy_loss, over_layers, utilisation, z_loss
from backbone.experts.router import Router, Routing, one_expert, uniform


def routing_of(logits, k=1):
    logits = torch.as_tensor(logits, dtype=torch.float64)
    p = logits.softmax(-1)
    chosen = p.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return Routing(torch.zeros_like(p).scatter(-1, chosen, p.gather(-1, chosen)), p, logits, chosen)


def test_balance_and_entropy_at_uniform_and_collapse():
    x = torch.randn(2, 6, 3)
    assert balance_loss(uniform(x, 4)).item() == pytest.approx(1)
    assert balance_loss(one_expert(x, 4, 1)).item() == pytest.approx(4)
    assert entropy_loss(uniform(x, 4)).item() == pytest.approx(0, abs=1e-6)
    assert entropy_loss(one_expert(x, 4, 1)).item() == pytest.approx(math.log(4))
    by_turns = one_expert(x, 4, torch.arange(12).view(2, 6) % 4)  # each token sure of itself, all experts used alike
    assert balance_loss(by_turns).item() == pytest.approx(1)
    assert entropy_loss(by_turns).item() == pytest.approx(0, abs=1e-6)


def test_balance_by_hand():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.1, 0.8, 0.1], [0.6, 0.1, 0.3]], dtype=torch.float64)
    routing = routing_of(p.log())
    # f = (3, 1, 0) / 4, P = (1.9, 1.5, 0.6) / 4
    assert balance_loss(routing).item() == pytest.approx(3 * (0.75 * 1.9 + 0.25 * 1.5) / 4)
    # among experts 1 and 2: f = (1, 0), P = (1.5, 0.6) / 2.1
    assert balance_loss(routing, torch.tensor([False, True, True])).item() == pytest.approx(2 * 1.5 / 2.1)
    mean = [1.9 / 4, 1.5 / 4, 0.6 / 4]
    assert entropy_loss(routing).item() == pytest.approx(math.log(3) + sum(m * math.log(m) for m in mean))
    pair = [1.5 / 2.1, 0.6 / 2.1]
    among = entropy_loss(routing, torch.tensor([False, True, True])).item()
    assert among == pytest.approx(math.log(2) + sum(m * math.log(m) for m in pair))
    # two choices each: f = (4, 3, 1) / 8
    assert balance_loss(routing_of(p.log(), k=2)).item() == pytest.approx(
        3 * (4 / 8 * 1.9 + 3 / 8 * 1.5 + 1 / 8 * 0.6) / 4
    )


def test_nothing_assigned_to_those_that_train_is_no_loss_and_no_nan():
    routing = one_expert(torch.randn(5, 3), 3, 0)
    assert balance_loss(routing, torch.tensor([False, True, True])).item() == 0


@pytest.mark.parametrize("loss", [balance_loss, entropy_loss])
def test_minimising_balances(loss):
    torch.manual_seed(0)
    router, x = Router(5, 4, 1 if loss is balance_loss else None), torch.randn(64, 5) + 1
    torch.nn.init.normal_(router.columns[2], mean=1)
    start = loss(router(x)).item()
    optimizer = torch.optim.SGD(router.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        loss(router(x)).backward()
        optimizer.step()
    floor = 1 if loss is balance_loss else 0
    assert loss(router(x)).item() - floor < 0.2 * (start - floor)


def test_the_share_of_assignments_has_no_gradient_and_the_rest_is_right():
    logits = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for loss in (balance_loss, entropy_loss, z_loss):
        assert torch.autograd.gradcheck(lambda z, loss=loss: loss(routing_of(z)), (logits,))
    f = torch.bincount(logits.argmax(-1), minlength=3) / 6
    (expected,) = torch.autograd.grad(3 * (f * logits.softmax(-1).mean(0)).sum(), logits)
    (ours,) = torch.autograd.grad(balance_loss(routing_of(logits)), logits)
    torch.testing.assert_close(ours, expected)


def test_z_loss_by_hand():
    routing = routing_of([[0.0, 0.0], [3.0, 3.0]])
    assert z_loss(routing).item() == pytest.approx((math.log(2) ** 2 + (3 + math.log(2)) ** 2) / 2)
    assert z_loss(one_expert(torch.randn(4, 3), 2, 0)).item() == 0


def test_layers_are_averaged_after_their_loss():
    x = torch.randn(4, 3)
    layers = [one_expert(x, 2, 0), one_expert(x, 2, 1)]  # each collapsed, balanced when thrown together
    assert over_layers(balance_loss, layers).item() == pytest.approx(2)
    every, last = torch.tensor([True, True]), torch.tensor([False, True])
    assert over_layers(balance_loss, layers, [every, last]).item() == pytest.approx((2 + 1) / 2)
    with pytest.raises(ValueError, match="needs routings"):
        over_layers(balance_loss, [])
    with pytest.raises(ValueError, match="as many masks"):
        over_layers(balance_loss, layers, [every])


def test_utilisation_by_hand_over_two_batches():
    first = routing_of([[math.log(3), 0.0, -1e4], [0.0, -1e4, -1e4]])  # p (.75, .25, 0) and (1, 0, 0): both to expert 0
    second = routing_of([[-1e4, 0.0, -1e4], [0.0, 0.0, -1e4]])  # expert 1, then a tie that goes to expert 0
    use = utilisation([first, second])
    assert assignments(first).tolist() == [2, 0, 0]
    assert use.share.tolist() == [0.75, 0.25, 0]
    assert use.gate.tolist() == pytest.approx([(0.75 + 1 + 0.5) / 4, 1 / 4, 0])
    unsure = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert use.entropy.tolist() == pytest.approx([(unsure + 0 + math.log(2)) / 3, 0, 0])
    two = utilisation([routing_of([[math.log(3), 0.0, -1e4], [-1e4, 0.0, math.log(2)]], k=2)])  # choose 0, 1 and 2, 1
    other = -(math.log(1 / 3) + 2 * math.log(2 / 3)) / 3
    assert two.share.tolist() == [0.5, 1, 0.5]
    assert two.entropy.tolist() == pytest.approx([unsure, (unsure + other) / 2, other])
    both = utilisation([routing_of(torch.zeros(2, 5, 3), k=2)])  # [B, N, ..]: tokens of all samples
    assert both.share.tolist() == [1, 1, 0] and not both.gate.requires_grad


def test_what_capacity_dropped_counts_as_unused():
    routing = routing_of(torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 0.0]]), k=1)
    cut = routing._replace(gates=routing.gates * torch.tensor([[1.0], [0.0], [1.0], [0.0]]))
    assert utilisation([routing]).share.tolist() == [0.75, 0.25]
    assert utilisation([cut]).share.tolist() == [0.25, 0.25]
