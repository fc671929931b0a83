"""Descriptors: losses by hand, the record's rules, scores and their edge cases."""

import pytest
import torch

from backbone.experts.descriptor import Descriptor, losses_of


def made(size=4, width=3, code=2):
    descriptor = Descriptor(width, code, size)
    descriptor.reset_parameters(torch.Generator().manual_seed(0))
    return descriptor


def test_loss_is_the_mean_squared_error_of_each_sample():
    descriptor = made()
    mean_token = torch.randn(5, 3)
    losses = descriptor(mean_token)
    for i in range(5):
        rebuilt = descriptor.decoder.weight @ (descriptor.encoder.weight @ mean_token[i]) + 0
        assert torch.allclose(losses[i], ((rebuilt - mean_token[i]) ** 2).mean())


def test_a_batch_that_overfills_the_record_only_tops_it_up():
    descriptor = made(size=4)
    descriptor.observe([torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0])])
    assert descriptor.record.tolist() == [1, 2, 3, 4] and int(descriptor.count) == 4


def test_a_full_record_forgets_the_oldest():
    descriptor = made(size=4)
    descriptor.observe([torch.arange(4.0)])
    descriptor.observe([torch.tensor([9.0, 8.0])])
    assert descriptor.record.tolist() == [2, 3, 9, 8]
    descriptor.observe([torch.arange(10.0)])
    assert descriptor.record.tolist() == [6, 7, 8, 9]


def test_scores_need_three_records_and_are_signed():
    descriptor = made(size=10)
    losses = torch.tensor([0.0, 5.0])
    descriptor.observe([torch.tensor([1.0, 2.0])])
    assert descriptor.z_scores(losses).tolist() == [0, 0]
    descriptor.observe([torch.tensor([3.0])])  # mean 2, unbiased deviation 1
    assert descriptor.z_scores(losses).tolist() == pytest.approx([-2, 3])


def test_a_constant_record_divides_by_zero_only_without_a_floor():
    descriptor = made(size=3)
    descriptor.observe([torch.full((3,), 2.0)])
    plain = descriptor.z_scores(torch.tensor([2.0, 3.0]))
    assert torch.isnan(plain[0]) and torch.isinf(plain[1])
    assert descriptor.z_scores(torch.tensor([2.0, 3.0]), std_floor=0.25).tolist() == pytest.approx([0, 2])


def test_forward_and_scores_change_nothing_and_the_record_is_saved():
    descriptor = made()
    descriptor.observe([torch.tensor([1.0, 2.0, 3.0])])
    before = {k: v.clone() for k, v in descriptor.state_dict().items()}
    descriptor.train()
    descriptor.z_scores(descriptor(torch.randn(5, 3)))
    assert all(torch.equal(v, descriptor.state_dict()[k]) for k, v in before.items())
    assert {"record", "count"} <= set(before)
    other = made()
    other.load_state_dict(before)
    assert other.z_scores(torch.tensor([4.0])).tolist() == pytest.approx([2])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_losses_of_many_in_one_product_are_those_of_each(count):
    descriptors, x = [Descriptor(6, 3, 4).double() for _ in range(count)], torch.randn(7, 6, dtype=torch.float64)
    apart = torch.stack([d(x) for d in descriptors])
    together = losses_of(descriptors, x)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-14)
    weights = torch.rand_like(apart)  # each loss by its own weight, so that none hides another's gradient
    wanted = torch.autograd.grad((apart * weights).sum(), [p for d in descriptors for p in d.parameters()])
    found = torch.autograd.grad((together * weights).sum(), [p for d in descriptors for p in d.parameters()])
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
