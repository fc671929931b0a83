"""The discriminant head: equal to scikit-learn's on all images, in whatever parts and order they come; its random features."""

import math

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from backbone.heads.discriminant import SHRINKAGES, DiscriminantHead
from backbone.heads.heads import StatisticsHead


def data(n=60, width=5, classes=4, seed=0):
    random = np.random.default_rng(seed)
    y = np.sort(random.integers(0, classes, n))
    x = (
        random.normal(size=(n, width)) @ random.normal(size=(width, width))
        + 2 * random.normal(size=(classes, width))[y]
        + 3
    )
    return torch.from_numpy(x), torch.from_numpy(y)


@pytest.mark.parametrize("shrinkage", [0.0, 0.2, 1.0])
def test_weights_and_biases_are_those_of_scikit_learn(shrinkage):
    x, y = data()
    head = DiscriminantHead(5, 4, shrinkage=shrinkage)
    for part in (y == 2, y < 2, y == 3):  # unequal classes, three parts
        head.add(x[part], y[part])
    head.solve()
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(x.numpy(), y.numpy())
    torch.testing.assert_close(head.weight, torch.from_numpy(theirs.coef_), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(head.bias, torch.from_numpy(theirs.intercept_), rtol=1e-9, atol=1e-9)
    posterior = torch.from_numpy(theirs.predict_proba(x.numpy()))
    torch.testing.assert_close(torch.softmax(head(x), dim=1), posterior, rtol=0, atol=1e-9)
    assert head(x.float()).dtype == torch.float32 and not list(head.parameters())


def test_the_shrinkage_has_the_least_loss_on_held_out_images_after_older_tasks():
    x, y = data(n=80, width=12)
    head, new = DiscriminantHead(12, 4), y >= 2
    head.add(x[~new], y[~new])
    held = torch.arange(int(new.sum())) % 4 == 0
    losses = head.choose_shrinkage(x[new], y[new], held)
    assert float(head.shrinkage) == SHRINKAGES[losses.index(min(losses))] and int(head.counts.sum()) == int(
        (~new).sum()
    )
    fitted = torch.cat([x[~new], x[new][~held]]), torch.cat([y[~new], y[new][~held]])
    for s, loss in zip(SHRINKAGES, losses, strict=True):
        theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s).fit(*(part.numpy() for part in fitted))
        truth = y[new][held].numpy()
        expected = -np.log(theirs.predict_proba(x[new][held].numpy())[np.arange(len(truth)), truth]).mean()
        assert loss == pytest.approx(expected, rel=1e-6)


def test_classes_without_spread_have_finite_scores():
    head = DiscriminantHead(3, 2)
    head.add(torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]), torch.tensor([0, 1]))  # one image each: no scatter at all
    head.solve()
    assert torch.isfinite(head.weight).all() and head(torch.eye(3)).argmax(dim=1)[:2].tolist() == [0, 1]
    head.clear()
    head.add(torch.zeros(4, 3), torch.tensor([0, 0, 0, 1]))  # nothing at all: the prior is left
    head.solve()
    torch.testing.assert_close(head(torch.ones(1, 3)), torch.tensor([[0.75, 0.25]]).log())


def test_products_of_fourier_features_approach_the_gaussian_kernel():
    """Hoeffding: a mean of 40,000 numbers 2 cos cos in [-2, 2] is within 0.05 of its expectation but for 1 in 10^5 draws."""
    head = StatisticsHead("ncm", 3, 2, 40_000, lift="fourier", gamma=0.3)
    head.reset_parameters(torch.Generator().manual_seed(0))
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    lifted = head.lift(x)
    kernel = (-0.3 * torch.cdist(x, x).square()).exp()
    torch.testing.assert_close(lifted @ lifted.T, kernel, rtol=0, atol=0.05)
    by_hand = math.sqrt(2 / 40_000) * torch.cos(math.sqrt(2 * 0.3) * x @ head.projection + head.phase)
    torch.testing.assert_close(lifted, by_hand, rtol=0, atol=1e-12)


def test_gamma_is_chosen_once_from_the_median_distance_and_relu_draws_are_as_ever():
    head = DiscriminantHead(1, 2, 4, "fourier")
    head.fit_lift(torch.tensor([[0.0], [1.0], [3.0]]))  # squared distances 1, 9, 4
    head.fit_lift(torch.tensor([[0.0], [100.0]]))
    assert float(head.gamma) == 0.25 and float(head.emptied().gamma) == 0.25
    relu, fourier = (StatisticsHead("ncm", 3, 2, 5, lift=lift) for lift in ("relu", "fourier"))
    for made in (relu, fourier):
        made.reset_parameters(torch.Generator().manual_seed(4))
    assert torch.equal(relu.projection, fourier.projection) and relu.phase is None and relu.gamma is None
    assert "gamma" not in relu.state_dict() and float(fourier.phase.max()) < 2 * math.pi
