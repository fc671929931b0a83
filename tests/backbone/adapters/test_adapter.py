"""The mixture kernel against the plain loop over experts, values and gradients, in float64."""

import pytest
import torch
from torch.nn import functional as F

from backbone.adapters.adapter import Adapter, mixture


def experts_of(ranks, width=12, scales=None, seed=0, activation="relu"):
    torch.manual_seed(seed)
    scales = scales or [1.0] * len(ranks)
    made = [Adapter(width, rank, scale, activation=activation) for rank, scale in zip(ranks, scales, strict=True)]
    for expert in made:
        expert.double()
        for parameter in expert.parameters():
            torch.nn.init.normal_(parameter)
    return made


def loop(x, experts, gates, activation=F.relu):
    gates = gates.unsqueeze(1) if gates.dim() == 2 else gates
    total = torch.zeros_like(x)
    for index, e in enumerate(experts):
        out = F.linear(activation(F.linear(x, e.down_proj.weight, e.down_proj.bias)), e.up_proj.weight, e.up_proj.bias)
        total = total + gates[..., index : index + 1] * e.scale * out
    return total


@pytest.mark.parametrize("ranks", [(4,), (3, 3), (1, 5, 2, 7)])
@pytest.mark.parametrize("per", ["sample", "token"])
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_equals_the_loop_with_its_gradients(ranks, per, activation):
    experts = experts_of(ranks, scales=[0.1 + i for i in range(len(ranks))], activation=activation)
    x = torch.randn(3, 5, 12, dtype=torch.float64, requires_grad=True)
    shape = (3, len(ranks)) if per == "sample" else (3, 5, len(ranks))
    gates = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 5, 12, dtype=torch.float64)
    inputs = [x, gates, *(p for e in experts for p in e.parameters())]
    ours, plain = mixture(x, experts, gates), loop(x, experts, gates, F.relu if activation == "relu" else lambda h: h)
    assert (ours - plain).abs().max() < 1e-12
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), inputs),
        torch.autograd.grad((plain * weight).sum(), inputs),
        strict=True,
    ):
        assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("per", ["sample", "token"])
def test_gradcheck(per):
    experts = experts_of((2, 3), width=4)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    gates = torch.rand((2, 2) if per == "sample" else (2, 3, 2), dtype=torch.float64, requires_grad=True)
    parameters = tuple(p for e in experts for p in e.parameters())
    assert torch.autograd.gradcheck(lambda x, g, *_: mixture(x, experts, g), (x, gates, *parameters))


def test_a_gate_of_zero_gives_exactly_zero_gradient():
    experts = experts_of((2, 3))
    gates = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(3, 2)
    mixture(torch.randn(3, 5, 12, dtype=torch.float64), experts, gates).square().sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in experts[1].parameters())
    assert all(p.grad.abs().sum() > 0 for p in experts[0].parameters())


def test_one_expert_is_the_adapter_itself():
    (expert,) = experts_of((3,), scales=[0.5])
    x = torch.randn(2, 4, 12, dtype=torch.float64)
    torch.testing.assert_close(
        mixture(x, [expert], torch.ones(2, 1, dtype=torch.float64)), expert(x), rtol=0, atol=1e-12
    )


def test_adapter_starts_at_zero_and_still_learns():
    adapter = Adapter(8, 2)
    adapter.reset_parameters(torch.Generator().manual_seed(1))
    x = torch.randn(4, 3, 8)
    assert torch.equal(adapter(x), torch.zeros_like(x))
    adapter(x).sum().backward()
    assert adapter.up_proj.weight.grad.abs().sum() > 0
    again = Adapter(8, 2)
    again.reset_parameters(torch.Generator().manual_seed(1))
    assert torch.equal(again.down_proj.weight, adapter.down_proj.weight)


def test_dropout_acts_in_training_alone():
    (expert,) = experts_of((64,))
    expert.dropout = 0.5
    x, gate = torch.randn(2, 4, 12, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    expert.train()
    assert not torch.equal(mixture(x, [expert], gate), mixture(x, [expert], gate))
    expert.eval()
    assert torch.equal(mixture(x, [expert], gate), mixture(x, [expert], gate))
