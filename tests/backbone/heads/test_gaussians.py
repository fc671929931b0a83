"""Class Gaussians: exact statistics, and samples that have them."""

import pytest
import torch

from backbone.heads.gaussians import RIDGE, ClassGaussians


def test_statistics_are_those_of_numpy_and_factors_are_lower():
    torch.manual_seed(0)
    x, y = torch.randn(20, 3).double(), torch.arange(20) % 2 + 1
    made = ClassGaussians(4, 3).double()
    made.add(x, y)
    for label in (1, 2):
        torch.testing.assert_close(made.means[label], x[y == label].mean(dim=0))
        expected = torch.cov(x[y == label].T) + RIDGE * torch.eye(3)
        torch.testing.assert_close(made.factors[label] @ made.factors[label].T, expected)
        assert torch.equal(made.factors[label], made.factors[label].tril())
    assert not made.means[[0, 3]].any() and not made.factors[[0, 3]].any()


def test_one_image_and_equal_images_get_the_ridge_alone():
    made = ClassGaussians(2, 3)
    made.add(torch.tensor([[1.0, 2.0, 3.0], [4.0, 4.0, 4.0], [4.0, 4.0, 4.0]]), torch.tensor([0, 1, 1]))
    for label in (0, 1):
        torch.testing.assert_close(made.factors[label], RIDGE**0.5 * torch.eye(3))


def test_samples_have_the_scaled_mean_and_the_covariance():
    torch.manual_seed(0)
    made = ClassGaussians(2, 2).double()
    made.add(torch.tensor([[0.0, 0.0], [2.0, 2.0], [0.0, 2.0], [5.0, 1.0]]).double(), torch.tensor([0, 0, 0, 1]))
    drawn = made.sample(torch.randn(1, 200_000, 2).double(), torch.tensor([0.5]).double())[0]
    torch.testing.assert_close(drawn.mean(dim=0), 0.5 * made.means[0], atol=0.02, rtol=0)
    torch.testing.assert_close(torch.cov(drawn.T), made.factors[0] @ made.factors[0].T, atol=0.02, rtol=0)
    zeros = torch.zeros(2, 1, 2).double()
    assert torch.equal(made.sample(zeros, torch.ones(2).double())[:, 0], made.means)


def test_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        ClassGaussians(1, 2).add(torch.tensor([[float("nan"), 0.0]]), torch.tensor([0]))
