"""Merging fast into slow: every method against its formula, the invariant it keeps, and LoRA's gauge, in float64."""

import pytest
import torch

from backbone.adapters.adapter import Adapter
from backbone.adapters.consolidation import METHODS, consolidate, error, wanted

D, X = 10, torch.randn(400, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
PARAMETER_SPACE = ("task_arithmetic", "pam_lite")
CASES = [(m, a) for m in METHODS for a in ("relu", "none") if (m, a) != ("ties", "relu")]


def adapter_of(rank=3, seed=0, activation="relu", scale=1.0, dtype=torch.float64):
    made = Adapter(D, rank, scale, activation=activation).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return made


def pair(activation="relu", ranks=(3, 3), shared_down=False, **other):
    slow, fast = (adapter_of(rank, seed, activation, **other) for seed, rank in enumerate(ranks))
    if shared_down:
        fast.down_proj.load_state_dict(slow.down_proj.state_dict())
    return slow, fast


def product(adapter):
    """The map [W | c] of an adapter without activation, [D, D + 1]."""
    up, down = adapter.up_proj, adapter.down_proj
    return torch.cat([up.weight @ down.weight, (up.weight @ down.bias + up.bias).unsqueeze(1)], dim=1).detach()


def largest(values):
    return values.detach().abs().max().item()


def gap(a, b, x=X):
    return largest(a(x) - b(x))


# The invariant ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_concat_is_exact_also_when_repeated(activation, alpha):
    slow, expected = adapter_of(3, 0, activation, scale=0.7), 0
    for seed, rank in enumerate((2, 4, 3), start=1):
        fast = adapter_of(rank, seed, activation, scale=0.7)
        after = consolidate(slow, fast, "concat", alpha)
        assert after.rank == slow.rank + rank
        assert error(slow, fast, after, "concat", alpha, X) < 1e-12
        expected = expected + alpha * fast(X)
        slow = after
    first = adapter_of(3, 0, activation, scale=0.7)
    assert (slow(X) - (first(X) + expected)).abs().max() < 1e-12


@pytest.mark.parametrize("method", ["concat", "svd", "pam"])
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_alpha_1_keeps_the_function(method, activation):
    slow, fast = pair(activation, shared_down=method == "pam", scale=0.5)
    after = consolidate(slow, fast, method, 1.0, rank=6, features=X)
    assert (after(X) - (slow(X) + fast(X))).abs().max() < 1e-12


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_pam_is_linear_in_up_on_a_shared_down_projection(activation):
    slow, fast = pair(activation, shared_down=True)
    after = consolidate(slow, fast, "pam", 0.4)
    assert after.rank == 3 and torch.equal(after.down_proj.weight, slow.down_proj.weight)
    assert error(slow, fast, after, "pam", 0.4, X) < 1e-12
    assert error(slow, fast, consolidate(slow, fast, "task_arithmetic", 0.4), "pam", 0.4, X) > 0.1


@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("method", PARAMETER_SPACE)
def test_a_sum_of_parameters_is_no_sum_of_functions(method, activation):
    """The cross terms are as large as what was wanted; concat has none."""
    slow, fast = pair(activation)
    after = consolidate(slow, fast, method, 1.0)
    assert error(slow, fast, after, method, 1.0, X) > 0.3 * largest(fast(X))
    assert error(slow, fast, consolidate(slow, fast, "concat", 1.0), method, 1.0, X) < 1e-12


def test_the_error_is_the_largest_gap_whatever_the_precision_and_dropout():
    slow, fast = pair("none", dtype=torch.float32, scale=0.5)
    slow.dropout = fast.dropout = 0.5
    after = consolidate(slow, fast, "concat", 0.5)
    assert after.dropout == 0.5 and error(slow, fast, after, "concat", 0.5, X.float()) < 1e-5
    with torch.no_grad():
        after.up_proj.bias[3] -= 4.0
    x = X.float().reshape(4, 100, D)
    assert error(slow, fast, after, "concat", 0.5, x) == pytest.approx(2.0, abs=1e-5)
    assert error(slow, fast, after, "concat", 0.5, x) == error(slow, fast, after, "concat", 0.5, x.double())
    seen = wanted(slow, fast, "ema", 0.25, x)
    assert seen.dtype == torch.float32 and seen.shape == x.shape
    assert torch.allclose(seen, 0.75 * slow.eval()(x) + 0.25 * fast.eval()(x), atol=1e-5)


# Parameter space --------------------------------------------------------------------------------------------------------


def test_task_arithmetic_and_pam_lite_against_numbers():
    slow, fast = Adapter(2, 1).double(), Adapter(2, 1).double()
    values = {  # signs agree, oppose, slow is zero, fast is zero
        slow: ([[1.0, 1.0]], [0.0], [[-1.0], [-2.0]], [3.0, 0.0]),
        fast: ([[0.5, -0.5]], [-4.0], [[-0.5], [0.25]], [0.0, 6.0]),
    }
    for adapter, tensors in values.items():
        for parameter, value in zip(adapter.parameters(), tensors, strict=True):
            parameter.data = torch.tensor(value, dtype=torch.float64)

    def listed(method):
        return [p.tolist() for p in consolidate(slow, fast, method, 0.5).parameters()]

    assert listed("task_arithmetic") == [[[1.25, 0.75]], [-2.0], [[-1.25], [-1.875]], [3.0, 3.0]]
    assert listed("pam_lite") == [[[1.25, 1.0]], [-2.0], [[-1.25], [-2.0]], [3.0, 3.0]]


@pytest.mark.parametrize("method", PARAMETER_SPACE)
def test_parameter_space_equals_the_original_in_float32_to_the_bit(method):
    slow, fast = pair(dtype=torch.float32)
    after = consolidate(slow, fast, method, 0.1)
    for a, s, f in zip(after.parameters(), slow.parameters(), fast.parameters(), strict=True):
        mask = (s * f >= 0).float() if method == "pam_lite" else torch.ones_like(s)
        assert torch.equal(a, s.detach().clone().add_(0.1 * (f * mask)))


# Truncation and pruning -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["svd", "concat", "ema"])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_truncation_is_the_eckart_young_optimum(method, rank):
    slow, fast = pair("none", (3, 4))
    share = 0.4 if method == "ema" else 1.0
    goal = share * product(slow) + 0.6 * product(fast)
    after = consolidate(slow, fast, method, 0.6, rank=rank)
    left, sigma, right = torch.linalg.svd(goal[:, :D])
    assert after.rank == rank
    assert abs(float((product(after) - goal)[:, :D].norm() - sigma[rank:].norm())) < 1e-10
    best = left[:, :rank] @ sigma[:rank].diag() @ right[:rank]
    assert (product(after) - torch.cat([best, goal[:, D:]], dim=1)).abs().max() < 1e-10  # the bias is kept exactly
    halves = after.up_proj.weight.norm(dim=0), after.down_proj.weight.norm(dim=1)
    assert torch.allclose(halves[0], sigma[:rank].sqrt()) and torch.allclose(halves[1], sigma[:rank].sqrt())


def test_svd_keeps_slows_rank_by_default_and_is_exact_where_the_rank_suffices():
    slow, fast = pair("none", (3, 4))
    assert consolidate(slow, fast, "svd", 1.0).rank == 3
    for rank in (7, 20):
        after = consolidate(slow, fast, "svd", 0.5, rank=rank)
        assert after.rank == 7 and error(slow, fast, after, "svd", 0.5, X) < 1e-12
    wide = adapter_of(12, 1, "none")  # more rank than width
    after = consolidate(slow, wide, "svd", 1.0, rank=30)
    assert after.rank == D and error(slow, wide, after, "svd", 1.0, X) < 1e-11


@pytest.mark.parametrize("fast_is_empty", [True, False])
def test_directions_without_content_stay_trainable(fast_is_empty):
    """Zero in both factors would block each other's gradient for good."""
    slow, fast = pair("none", (4, 2))
    for adapter in (slow, fast) if fast_is_empty else (slow,):
        adapter.reset_parameters(torch.Generator().manual_seed(2))
    after = consolidate(slow, fast, "svd", 1.0).requires_grad_()
    assert error(slow, fast, after, "svd", 1.0, X) < 1e-12
    (after(X) ** 2 + after(X)).sum().backward()
    assert (after.up_proj.weight.grad.abs().amax(dim=0) > 1e-3).all()
    assert after.down_proj.weight.norm(dim=1).min() > 0.1


def test_rounding_is_not_taken_for_content():
    """Shared down projections: rank 3 in a stack of 6, where singular values that should be 0 come out as any rounding."""
    for seed in range(300):
        slow, other = adapter_of(3, seed, "none"), adapter_of(3, seed + 1000, "none")
        fast = adapter_of(3, seed, "none")
        fast.up_proj.load_state_dict(other.up_proj.state_dict())
        after = consolidate(slow, fast, "svd", 0.7, rank=6)
        assert (after.up_proj.weight.norm(dim=0) > 0).sum() == 3 and after.down_proj.weight.norm(dim=1).min() > 0.1
        assert error(slow, fast, after, "svd", 0.7, X) < 1e-12


def relu_error(after, slow, fast, x=X):
    return (after(x) - (slow(x) + 0.8 * fast(x))).norm().item()


@pytest.mark.parametrize("method", ["svd", "concat"])
def test_relu_compression_refits_what_it_prunes(method):
    """Against plain least squares on the neurons kept, a plain pruning to them, and the greedy choice by full refits."""
    slow, fast = pair("relu", (4, 5))
    whole = consolidate(slow, fast, "concat", 0.8)
    hidden = torch.relu(whole.down_proj(X)).detach()

    def refit(kept):
        known = torch.cat([hidden[:, kept], torch.ones(400, 1, dtype=torch.float64)], dim=1)
        best = torch.linalg.lstsq(known, whole(X)).solution
        return best, (known @ best - whole(X)).square().sum().item()

    greedy = {9: list(range(9))}  # by rank: one neuron fewer each time, the one whose loss costs least after a refit
    for rank in range(8, 0, -1):
        smaller = [[k for k in greedy[rank + 1] if k != gone] for gone in greedy[rank + 1]]
        greedy[rank] = min(smaller, key=lambda kept: refit(kept)[1])
    errors = []
    for rank in range(1, 9):
        after = consolidate(slow, fast, method, 0.8, rank=rank, features=X.reshape(4, 100, D))
        kept = greedy[rank]
        assert torch.equal(after.down_proj.weight, whole.down_proj.weight[kept])
        pruned = consolidate(slow, fast, "concat", 0.8)
        with torch.no_grad():
            pruned.up_proj.weight[:, [k for k in range(9) if k not in kept]] = 0
        assert (torch.cat([after.up_proj.weight.T, after.up_proj.bias[None]]) - refit(kept)[0]).abs().max() < 1e-5
        errors.append(relu_error(after, slow, fast))
        assert errors[-1] < 0.9 * relu_error(pruned, slow, fast)
    assert errors == sorted(errors, reverse=True) and errors[-1] > 0.1
    fresh = torch.randn(400, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    assert relu_error(after, slow, fast, fresh) < 0.9 * relu_error(pruned, slow, fast, fresh)


def test_relu_compression_is_exact_when_nothing_need_be_pruned():
    slow, fast = pair("relu", (4, 5))
    for rank in (9, 20):
        after = consolidate(slow, fast, "svd", 0.8, rank=rank)  # needs no features
        assert after.rank == 9 and relu_error(after, slow, fast) < 1e-12
    with torch.no_grad():
        fast.up_proj.weight[:, 2:] = 0  # three units add nothing
        slow.down_proj.bias[1] = -100  # and one never fires
    after = consolidate(slow, fast, "svd", 0.8, rank=5, features=X)
    assert after.rank == 5 and relu_error(after, slow, fast) < 1e-12
    few = consolidate(slow, fast, "svd", 0.8, rank=4, features=X[:2])  # fewer inputs than neurons
    assert relu_error(few, slow, fast, X[:2]) < 1e-5 and bool(few(X).isfinite().all())


# The other methods --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_ema_and_its_limits(activation):
    slow, fast = pair(activation, scale=2.0)
    assert gap(consolidate(slow, fast, "ema", 0.0, features=X), slow) < 1e-12
    assert gap(consolidate(slow, fast, "ema", 1.0, features=X), fast) < 1e-12
    after = consolidate(slow, fast, "ema", 0.25, rank=6)
    assert (after(X) - (0.75 * slow(X) + 0.25 * fast(X))).abs().max() < 1e-12
    assert error(slow, fast, after, "ema", 0.25, X) < 1e-12
    assert consolidate(slow, fast, "ema", 0.25, features=X).rank == 3


def plain_ties(first, second, share=0.2):
    """Algorithm 1 of the paper entry by entry on two matrices, lambda 1."""
    trimmed = []
    for vector in (first, second):
        sizes = sorted((abs(v) for row in vector.tolist() for v in row), reverse=True)
        least = sizes[round(share * len(sizes)) - 1]
        trimmed.append([[v if abs(v) >= least else 0.0 for v in row] for row in vector.tolist()])
    merged = []
    for row_a, row_b in zip(*trimmed, strict=True):
        merged.append([])
        for a, b in zip(row_a, row_b, strict=True):
            total = a + b
            voters = [v for v in (a, b) if v * total > 0]
            merged[-1].append(sum(voters) / len(voters) if voters else 0.0)
    return torch.tensor(merged, dtype=torch.float64)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
def test_ties_equals_the_plain_algorithm(alpha):
    slow, fast = pair("none")
    goal = plain_ties(product(slow), alpha * product(fast))
    kept = consolidate(slow, fast, "ties", alpha, rank=D)
    assert kept.rank == D and (product(kept) - goal).abs().max() < 1e-12
    after = consolidate(slow, fast, "ties", alpha)
    sigma = torch.linalg.svdvals(goal[:, :D])
    assert after.rank == 3 and abs(float((product(after) - goal).norm() - sigma[3:].norm())) < 1e-10
    voted = (product(slow) * product(fast) < 0) & (goal != 0)
    assert voted.any() and (goal == 0).any()  # signs did oppose each other, and entries were trimmed


# Gauge --------------------------------------------------------------------------------------------------------------------


def regauged(fast):
    """The same function from other parameters: hidden units permuted and rescaled, and without activation flipped too."""
    order = torch.randperm(fast.rank, generator=torch.Generator().manual_seed(1))
    size = torch.linspace(0.5, 3, fast.rank, dtype=torch.float64)
    if fast.activation == "none":
        size[::2] *= -1
    made = Adapter(D, fast.rank, fast.scale, activation=fast.activation).double()
    made.down_proj.weight.data = size[:, None] * fast.down_proj.weight[order].detach()
    made.down_proj.bias.data = size * fast.down_proj.bias[order].detach()
    made.up_proj.weight.data = fast.up_proj.weight[:, order].detach() / size
    made.up_proj.bias.data = fast.up_proj.bias.detach().clone()
    assert gap(made, fast) < 1e-12
    return made


@pytest.mark.parametrize(("method", "activation"), [c for c in CASES if c[0] != "pam"])  # pam: the gauge is slow's own
def test_gauge(method, activation):
    slow, fast = pair(activation, (4, 4))
    one, other = (consolidate(slow, f, method, 0.7, rank=4, features=X) for f in (fast, regauged(fast)))
    if method in PARAMETER_SPACE:
        assert gap(one, other) > 0.1 * largest(fast(X))
    else:
        assert gap(one, other) < 1e-9


# The result as a part -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_untouched_and_the_result_is_like_slow(method, dtype):
    slow, fast = pair("none", shared_down=method == "pam", scale=0.3, dtype=dtype)
    slow.eval()
    before = [p.detach().clone() for a in (slow, fast) for p in a.parameters()]
    random = torch.get_rng_state()
    after = consolidate(slow, fast, method, 0.5)
    assert torch.equal(random, torch.get_rng_state())
    assert (after.activation, after.scale, after.dropout, after.training) == ("none", 0.3, 0.0, False)
    assert after.rank == after.up_proj.in_features == (6 if method == "concat" else 3)
    for parameter in after.parameters():
        assert (parameter.dtype, parameter.device) == (dtype, slow.down_proj.weight.device)
        assert isinstance(parameter, torch.nn.Parameter) and parameter.is_contiguous()
        parameter.data.fill_(7)
    assert all(torch.equal(a, b) for a, b in zip(before, [*slow.parameters(), *fast.parameters()], strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("method", "activation"), CASES)
def test_on_a_gpu_as_on_the_cpu(method, activation):
    slow, fast = pair(activation, shared_down=method == "pam")
    expected = consolidate(slow, fast, method, 0.5, features=X)
    after = consolidate(slow.cuda(), fast.cuda(), method, 0.5, features=X.cuda())
    assert after.down_proj.weight.is_cuda and gap(after.cpu(), expected) < 1e-9


def test_errors_say_what_helps():
    slow, fast = pair()
    with pytest.raises(
        ValueError, match=r"unknown consolidation method 'task_arith'; did you mean 'task_arithmetic'.*pam_lite"
    ):
        consolidate(slow, fast, "task_arith", 1.0)
    with pytest.raises(ValueError, match="unknown consolidation method"):
        wanted(slow, fast, "sum", 1.0, X)
    with pytest.raises(ValueError, match="activation none only; with relu take concat, svd or ema"):
        consolidate(slow, fast, "ties", 1.0)
    for part in ("weight", "bias"):
        shared_slow, other = pair(shared_down=True)
        getattr(other.down_proj, part).data[0] += 1e-9
        with pytest.raises(ValueError, match="pam merges adapters that share one frozen down projection"):
            consolidate(shared_slow, other, "pam", 1.0)
    for method in ("svd", "ema", "concat"):
        with pytest.raises(ValueError, match=f"{method} has to compress a relu adapter from rank 6 to 3.*features"):
            consolidate(slow, fast, method, 0.5, rank=3)
        with pytest.raises(ValueError, match="features"):
            consolidate(slow, fast, method, 0.5, rank=3, features=X[:0])
    with pytest.raises(ValueError, match=r"between 0 and 1; got 1\.5"):
        consolidate(slow, fast, "ema", 1.5)
    with pytest.raises(ValueError, match="rank of at least 1, got 0"):
        consolidate(slow, fast, "concat", 1.0, rank=0)
    for method in (*PARAMETER_SPACE, "pam"):
        with pytest.raises(ValueError, match=f"{method} adds tensors of equal shape, but slow has rank 3 and fast 2"):
            consolidate(*pair(ranks=(3, 2)), method, 1.0)
