"""The aligned head: its loss by hand, its limit in closed form, its choices, and that it depends on its state alone."""

import pytest
import torch
from torch.nn import functional as F

from backbone.heads.aligned import AlignedHead, AlignmentRecipe
from backbone.heads.alignment import alignment_losses, local, nearest_is_own, shrinking
from backbone.heads.gaussians import RIDGE, ClassGaussians, log_density, new_gaussians

PLAIN = {"covariance": "full", "rank": 2, "epochs": 3, "samples": 20, "lr": 0.1, "temperature": 0.0, "local": 0.0}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head_of(features, labels, sizes, width, **keys):
    """A head that has seen all tasks, in float64, its trained rows zero."""
    head = AlignedHead(width, sum(sizes), AlignmentRecipe(**(PLAIN | {"shrink_means": False} | keys))).double()
    head.choose(features, labels, None)
    head.add(features, labels)
    first = 0
    for task, size in enumerate(sizes):
        rows = torch.zeros(sum(sizes), width), torch.zeros(sum(sizes))
        head.start(*rows, range(first, first + size), task, 7)
        first += size
    return head


def test_the_limit_is_linear_discriminant_analysis():
    """Gaussians of one covariance: the expected cross-entropy is least at Sigma^-1 mu_c, -mu_c Sigma^-1 mu_c / 2 (equal
    priors), up to a constant for all classes. With N draws in all the minimum is normal around that with covariance F^-1 / N
    (F the Fisher information); no entry lies 5 deviations off but for 1 in 10^5 draws, here fixed. Descent is converged."""
    means = torch.tensor([[1.0, 0.0], [-0.5, 1.0], [0.0, -1.0]], dtype=torch.float64)
    covariance = torch.tensor([[1.0, 0.4], [0.4, 0.8]], dtype=torch.float64)
    samples, head = 20_000, head_of(torch.zeros(6, 2).double(), torch.arange(6) % 3, [2, 1], 2, epochs=1)
    head.gaussians.means.copy_(means)
    head.gaussians.factors.copy_(torch.linalg.cholesky(covariance))
    head.recipe = AlignmentRecipe(**(PLAIN | {"samples": samples, "epochs": 1, "lr": 0.5, "shrink_means": False}))
    # one draw for all steps: the minimum over these N features, found by full-batch descent on the head's loss
    generator = torch.Generator().manual_seed(3)
    features = head.gaussians.sample(torch.randn(3, samples, 2, generator=generator).double(), torch.ones(3).double())
    x, y = features.flatten(0, 1), torch.arange(3).repeat_interleave(samples)
    weight, bias = torch.zeros(3, 2).double().requires_grad_(), torch.zeros(3).double().requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = alignment_losses(F.linear(x, weight, bias), y, [2, 1], 0.0).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    exact = torch.linalg.solve(covariance, means.T).T
    exact_bias = -(means * exact).sum(dim=1) / 2
    found = torch.cat([weight - weight.mean(0), (bias - bias.mean())[:, None]], dim=1).detach()
    expected = torch.cat([exact - exact.mean(0), (exact_bias - exact_bias.mean())[:, None]], dim=1)
    rows = torch.cat([x, torch.ones(len(x), 1).double()], dim=1)
    p = torch.softmax(F.linear(rows, expected), dim=1)
    information = torch.einsum("nc,ncd->ncd", p, torch.eye(3).double() - p[:, None])
    fisher = torch.einsum("ncd,ni,nj->cidj", information, rows, rows).reshape(9, 9)
    deviation = torch.linalg.pinv(fisher, rtol=1e-8, hermitian=True).diagonal().sqrt().view(3, 3)
    assert ((found - expected).abs() < 5 * deviation).all() and float(deviation.max()) < 0.02
    # and the head's own descent, in batches on new draws in each epoch, ends there as well, to the noise of its last steps
    head.recipe = AlignmentRecipe(**(PLAIN | {"samples": 2000, "epochs": 120, "lr": 0.2, "shrink_means": False}))
    losses = head.solve()
    ours = torch.cat([head.weight - head.weight.mean(0), (head.bias - head.bias.mean())[:, None]], dim=1)
    assert (ours - expected).abs().max() < 0.15 and losses[-1] < losses[0]


def test_the_local_term_by_hand():
    losses, labels = torch.tensor([1.0, 2.0, 4.0, 5.0, 7.0]), torch.tensor([0, 0, 0, 1, 2])
    near = torch.tensor([True, True, False, True, False])
    # class 0: mean 1.5, pair |1 - 2|; class 1: 5, no pair; class 2: nobody is near, its mean 7 alone
    assert float(local(losses, labels, near, 0.5)) == pytest.approx((1.5 + 0.5 * 1 + 5 + 7) / 3)
    every = torch.ones(5, dtype=torch.bool)
    pairs = (1 + 3 + 2) / 3
    assert float(local(losses, labels, every, 2.0)) == pytest.approx((7 / 3 + 2 * pairs + 5 + 7) / 3)
    scores = normal(6, 3).requires_grad_()
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    close = torch.tensor([True, True, True, True, False, True])
    assert torch.autograd.gradcheck(lambda s: local(alignment_losses(s, y, [2, 1], 0.1), y, close, 0.7), scores)


def test_a_draw_is_near_if_no_other_mean_is_closer():
    means = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    features = torch.tensor([[0.9, 0.0], [1.1, 0.0], [1.0, 0.0]])
    assert nearest_is_own(features, torch.tensor([0, 0, 0]), means).tolist() == [True, False, True]
    torch.testing.assert_close(shrinking(torch.tensor([0.0, 1.0, 3.0]), 3), torch.tensor([0.925, 0.95, 1.0]))


@pytest.mark.parametrize(
    ("kind", "numbers"), [("full", 36), ("shrunk", 36 + 2 * 36 // 2 + 2), ("low_rank", 14), ("diagonal", 6)]
)
def test_draws_have_the_covariance_that_is_stored(kind, numbers):
    """With 100,000 draws an entry of the sample covariance is off by less than 5 sqrt(2 / 100,000) of the largest variance."""
    x, y = normal(30, 6) @ normal(6, 6, seed=1), torch.arange(30) % 2
    made = new_gaussians(kind, 2, 6, 2).double()
    made.add(x, y)
    normals = normal(2, 100_000, made.noise, seed=2)
    drawn = made.sample(normals, torch.ones(2).double())
    for label in range(2):
        stored = made.covariance(label)
        bound = 5 * (2 / 100_000) ** 0.5 * float(stored.diagonal().max())
        torch.testing.assert_close(torch.cov(drawn[label].T), stored, rtol=0, atol=bound)
        torch.testing.assert_close(drawn[label].mean(0), x[y == label].mean(0), rtol=0, atol=bound)
    exact = torch.cov(x[y == 0].T) + RIDGE * torch.eye(6)
    if kind == "diagonal":
        torch.testing.assert_close(made.covariance(0), exact.diagonal().diag())
    if kind == "low_rank":  # the two largest directions are exact, the others share their mean
        values = torch.linalg.eigvalsh(exact)
        expected = torch.cat([values[:4].mean().expand(4), values[4:]])
        torch.testing.assert_close(torch.linalg.eigvalsh(made.covariance(0)), expected)
    if kind == "shrunk":
        pooled = sum((x[y == c] - x[y == c].mean(0)).T @ (x[y == c] - x[y == c].mean(0)) for c in range(2)) / 28
        torch.testing.assert_close(made.covariance(0), (exact + pooled + RIDGE * torch.eye(6)) / 2)


def test_the_log_density_is_that_of_torch():
    x, y = normal(12, 3), torch.arange(12) % 2
    made = ClassGaussians(2, 3).double()
    made.add(x, y)
    by_class = [
        torch.distributions.MultivariateNormal(made.means[c], made.covariance(c)).log_prob(x[y == c]) for c in (0, 1)
    ]
    constant = 1.5 * torch.log(torch.tensor(2 * torch.pi)).double()
    assert log_density(made, x, y) == pytest.approx(float(torch.cat(by_class).mean() + constant), rel=1e-6)


@pytest.mark.parametrize("few", [True, False], ids=["few images of one shape", "many of many shapes"])
def test_auto_takes_the_likeliest_kind_and_keeps_it(few):
    count = 24 if few else 800
    y = torch.arange(count) % 2
    mix = normal(8, 8, seed=1)
    x = (
        normal(count, 8)
        if few
        else torch.where((y == 0)[:, None], normal(count, 8) @ mix, normal(count, 8) @ mix.flip(1))
    )
    head = AlignedHead(8, 4, AlignmentRecipe(**(PLAIN | {"covariance": "auto", "shrink_means": False}))).double()
    facts = head.choose(x, y, torch.arange(count) % 5 < 1)
    best = max(facts["densities"], key=lambda kind: facts["densities"][kind])
    assert head.gaussians.kind == best and (best == "diagonal" if few else best in ("full", "shrunk"))
    chosen = head.gaussians
    assert "densities" not in head.choose(x, y, torch.arange(count) % 5 < 1) and head.gaussians is chosen


def test_the_alignment_depends_on_its_state_alone_and_starts_from_the_trained_rows():
    x, y = normal(40, 3) + 3 * F.one_hot(torch.arange(40) % 4, 4)[:, :3], torch.arange(40) % 4
    head = head_of(x, y, [2, 2], 3, temperature=0.1, local=0.3, shrink_means=True)
    torch.manual_seed(0)
    losses = head.solve()
    first = head.weight.clone()
    torch.manual_seed(1)  # no global draw is used
    assert head.solve() == losses and torch.equal(head.weight, first) and len(losses) == 3
    again = head.emptied()
    again.add(x, y)
    assert again.solve() == losses and torch.equal(again.weight, first)
    head.draw.fill_(8)
    assert head.solve() != losses
    assert not head.start_weight.any() and head(x).shape == (40, 4) and (head(x).argmax(1) == y).double().mean() > 0.6


def test_one_task_and_no_epochs_leave_the_rows_as_they_were_trained():
    x, y = normal(20, 3), torch.arange(20) % 2
    for sizes, keys in (([2], {}), ([1, 1], {"epochs": 0})):
        head = head_of(x, y, sizes, 3, **keys)
        head.start(torch.ones(2, 3), torch.ones(2), range(sizes[-1] - 1, 2), len(sizes) - 1, 7)
        assert head.solve() == [] and torch.equal(head.weight, torch.ones(2, 3).double())


def test_an_alignment_that_diverges_says_what_to_lower():
    x, y = 1e30 * normal(20, 3), torch.arange(20) % 2
    with pytest.raises(ValueError, match="the alignment of the head diverged; lower head_align_lr"):
        head_of(x, y, [1, 1], 3, lr=100.0).solve()
