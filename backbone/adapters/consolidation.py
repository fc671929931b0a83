"""How a fast adapter is merged into a slow one: seven methods behind one function, and the invariant that judges them.

Shapes: D width, R rank (r_s slow, r_f fast), n inputs. An adapter is scale * (U act(A x + a) + u), see
`backbone.adapters.adapter`.
With activation none it is the affine map W x + c with W = U A [D, D] and c = U a + u [D]. Subscripts s slow, f fast.

| method          | formula (alpha weighs fast)                       | exact for    | rank after        | source              |
|-----------------|---------------------------------------------------|--------------|-------------------|---------------------|
| task_arithmetic | each tensor: s + alpha f                          | nothing      | r_s = r_f         | arXiv 2212.04089 *  |
| pam_lite        | each tensor: s + alpha f where s f >= 0, else s   | nothing      | r_s = r_f         | Nested-LoRA's "pam" |
| concat          | [A_s; A_f], [U_s, alpha U_f], u_s + alpha u_f;    | relu, none   | r_s + r_f         | block matrices      |
|                 | beyond `rank`: as svd                             | as svd       | `rank`            |                     |
| svd, none       | best rank-R of W_s + alpha W_f; its c exactly     | none **      | r_s or `rank`     | Eckart, Young 1936  |
| svd, relu       | concat, drop neurons one by one, refit U each time| relu **      | r_s or `rank`     | Hassibi, Stork 1993 |
| ema             | (1 - alpha) s + alpha f as functions, then as svd | relu, none **| r_s or `rank`     | moving average      |
| ties, none      | W, c: trim, elect sign, mean of those that agree; | nothing      | r_s or `rank`     | arXiv 2306.01708 ***|
|                 | then best rank-R of W                             |              |                   |                     |
| pam             | U_s + alpha U_f, u_s + alpha u_f where A_s = A_f  | relu, none   | r_s = r_f         | arXiv 2506.03189 ***|

*   The paper adds whole weight matrices. Adding LoRA's factors instead gives cross terms, U_s A_f and U_f A_s, and depends on
    its gauge: flip the sign of a hidden unit in both factors of fast, and the same function merges into another one.
    `pam_lite` has both faults too. The other five see only the functions; these two are here to reproduce what others ran.
**  Exact where `rank` suffices. none: the rank of the wanted W; relu: r_s + r_f, without units that add nothing.
*** ties: see `_ties` for what alpha scales. pam: aligned merging aligns during training; here by one frozen A: the learner
    trains fast on slow's A, and the sum of the functions is then linear in U.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.adapters.adapter import ACTIVATIONS, Adapter
from utils.text import nearest

METHODS: tuple[str, ...] = ("task_arithmetic", "pam_lite", "concat", "svd", "ema", "ties", "pam")
TIES_KEPT = 0.2  # share of each task vector that survives trimming (TIES: k = 20)
RIDGE = 1e-8  # of the mean eigenvalue: far below any error of pruning, far above float64's rounding


class Factors(NamedTuple):
    """An adapter's four tensors, mostly in float64: down [R, D], down_bias [R], up [D, R], up_bias [D]."""

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor


@torch.no_grad()
def consolidate(
    slow: Adapter,
    fast: Adapter,
    method: str,
    alpha: float,
    *,
    rank: int | None = None,
    features: Tensor | None = None,
) -> Adapter:
    """A new adapter that takes slow's place, by the table above; slow and fast stay as they are.

    `rank`: the largest rank of the result; without it concat grows, and svd, ema and ties keep slow's. The other methods
    keep slow's rank always. `features` [.., D]: inputs of the adapter, needed where a relu adapter is compressed.
    Linear algebra runs in float64. The result has slow's scale, activation, dropout, device and precision, and no
    gradients yet; no random number is drawn.
    Raises ValueError for an unknown method, and where slow and fast do not meet what the method needs.
    """
    _check(slow, fast, method, alpha)
    if rank is not None and rank < 1:
        raise ValueError(f"a consolidated adapter needs a rank of at least 1, got {rank}")
    if method in ("task_arithmetic", "pam_lite"):
        return _build(slow, _by_parameter(slow, fast, alpha, masked=method == "pam_lite"))
    s, f = _factors(slow), _factors(fast)
    if method == "pam":
        if not (torch.equal(s.down, f.down) and torch.equal(s.down_bias, f.down_bias)):
            raise ValueError(
                "pam merges adapters that share one frozen down projection, and these two differ in it: train fast on slow's, "
                "or take concat or svd, which need nothing shared"
            )
        return _build(slow, s._replace(up=s.up + alpha * f.up, up_bias=s.up_bias + alpha * f.up_bias))
    if method == "ties":
        return _build(slow, _ties(s, f, alpha, rank or slow.rank, _precision(slow)))
    stacked = _stack(s, f, 1 - alpha if method == "ema" else 1.0, alpha)
    limit = rank or (len(stacked.down) if method == "concat" else slow.rank)
    if slow.activation == "none":
        compress = method != "concat" or len(stacked.down) > limit
        return _build(slow, _truncate(stacked, limit, _precision(slow)) if compress else stacked)
    if len(stacked.down) > limit:
        if features is None or not features.numel():
            raise ValueError(
                f"{method} has to compress a relu adapter from rank {len(stacked.down)} to {limit}, and that is fitted on "
                "features, the adapter's inputs of this task: pass features [n, D]"
            )
        stacked = _prune(stacked, limit, features.reshape(-1, features.shape[-1]).double())
    return _build(slow, stacked)


@torch.no_grad()
def wanted(slow: Adapter, fast: Adapter, method: str, alpha: float, x: Tensor) -> Tensor:
    """What the method aims at, [.., D] -> [.., D] in x's precision and without dropout: slow(x) + alpha fast(x); for ema
    (1 - alpha) slow(x) + alpha fast(x)."""
    _check(slow, fast, method, alpha)
    return (1 - alpha if method == "ema" else 1.0) * _output(slow, x) + alpha * _output(fast, x)


@torch.no_grad()
def error(slow: Adapter, fast: Adapter, after: Adapter, method: str, alpha: float, x: Tensor) -> float:
    """The invariant: max |after(x) - wanted(x)| over x [.., D], computed in float64 and without dropout."""
    x = x.double()
    return float((_output(after, x) - wanted(slow, fast, method, alpha, x)).abs().max())


def _check(slow: Adapter, fast: Adapter, method: str, alpha: float) -> None:
    assert slow.activation == fast.activation and slow.scale == fast.scale, "adapters of one layer share these"
    if method not in METHODS:
        raise ValueError(
            f"unknown consolidation method '{method}'{nearest(method, METHODS)} (known: {', '.join(METHODS)})"
        )
    if method == "ema" and not 0 <= alpha <= 1:
        raise ValueError(f"ema averages slow and fast, so alpha must lie between 0 and 1; got {alpha}")
    if method == "ties" and slow.activation != "none":
        raise ValueError(
            f"ties elects signs in the product of both projections, which is the function for activation none only; with "
            f"{slow.activation} take concat, svd or ema"
        )
    if method in ("task_arithmetic", "pam_lite", "pam") and slow.rank != fast.rank:
        raise ValueError(
            f"{method} adds tensors of equal shape, but slow has rank {slow.rank} and fast {fast.rank}; concat, svd and ema "
            "take different ranks"
        )


# Between adapters and factors -----------------------------------------------------------------------------------------


def _factors(adapter: Adapter, dtype: torch.dtype = torch.float64) -> Factors:
    return Factors(*(p.to(dtype) for p in adapter.parameters()))


def _build(like: Adapter, f: Factors) -> Adapter:
    with torch.device("meta"):  # start values that are replaced at once must not draw random numbers
        merged = Adapter(f.down.shape[1], len(f.down), like.scale, like.dropout, like.activation)
    weight = like.down_proj.weight
    for linear, values in ((merged.down_proj, f[:2]), (merged.up_proj, f[2:])):
        copies = (v.to(weight).clone(memory_format=torch.contiguous_format) for v in values)
        linear.weight, linear.bias = (nn.Parameter(copy, requires_grad=False) for copy in copies)
    return merged.train(like.training)


def _precision(adapter: Adapter) -> float:
    """What counts as zero beside 1: below it is rounding, of the result's storage or of float64 algebra in width D."""
    weight = adapter.down_proj.weight
    return max(torch.finfo(weight.dtype).eps, weight.shape[1] * torch.finfo(torch.float64).eps)


def _output(adapter: Adapter, x: Tensor) -> Tensor:
    """The adapter without dropout and in x's precision."""
    f = _factors(adapter, x.dtype)
    return F.linear(ACTIVATIONS[adapter.activation](F.linear(x, f.down, f.down_bias)), f.up, f.up_bias) * adapter.scale


# The methods ----------------------------------------------------------------------------------------------------------


def _by_parameter(slow: Adapter, fast: Adapter, alpha: float, *, masked: bool) -> Factors:
    """slow + alpha fast tensor by tensor; `masked` where no sign opposes (zero opposes none). In the adapters' precision, so
    that the sums equal Nested-LoRA's to the bit."""
    sums = [
        s + alpha * (f * (s * f >= 0) if masked else f)
        for s, f in zip(slow.parameters(), fast.parameters(), strict=True)
    ]
    return Factors(*sums)


def _stack(s: Factors, f: Factors, share_s: float, share_f: float) -> Factors:
    """share_s slow + share_f fast as one adapter of rank r_s + r_f: the shares go to the up side, so the activation never
    sees them."""
    return Factors(
        torch.cat([s.down, f.down]),
        torch.cat([s.down_bias, f.down_bias]),
        torch.cat([share_s * s.up, share_f * f.up], dim=1),
        share_s * s.up_bias + share_f * f.up_bias,
    )


def _truncate(f: Factors, rank: int, precision: float) -> Factors:
    """The best approximation of rank `rank` of U A, with U a + u exactly as the up bias (activation none).

    QR of both factors leaves a core [R, R] with U A = Q_u core Q_a^T; its SVD is that of U A, in O(D R^2). Each singular
    value is split evenly, so that both factors train at one pace. A direction of singular value zero would be zero in both
    and never learn again: its down row stays a unit vector, as in LoRA's start, and only its up column is zero.
    """
    q_up, r_up = torch.linalg.qr(f.up)
    q_down, r_down = torch.linalg.qr(f.down.T)
    left, sigma, right = torch.linalg.svd(r_up @ r_down.T)
    left, sigma, right = left[:, :rank], sigma[:rank], right[:rank]
    root = sigma.sqrt()
    alive = sigma > precision * sigma[0]
    down = (q_down @ right.T).T * torch.where(alive, root, 1.0).unsqueeze(1)
    return Factors(down, torch.zeros_like(sigma), q_up @ left * (root * alive), f.up @ f.down_bias + f.up_bias)


def _prune(f: Factors, rank: int, x: Tensor) -> Factors:
    """`rank` neurons, chosen and refitted by optimal brain surgeon over x [n, D] (activation relu).

    One neuron at a time goes: the one whose loss costs least after the best refit of all others and of the bias, which is
    |U_j|^2 / (G^-1)_jj for the Gram matrix G [R + 1, R + 1] of the neurons and 1 (Hassibi and Stork 1993, exact here since
    the output is linear in U). The small ridge pulls towards the up side they have, so nothing moves that need not. Hidden
    units are brought to mean square 1 for it, so that rescaling them (LoRA's gauge) changes nothing.
    """
    hidden = F.relu(F.linear(x, f.down, f.down_bias))  # [n, R]
    size = hidden.square().mean(dim=0).sqrt()
    size = torch.where(size > 0, size, 1.0)
    known = torch.cat([hidden / size, torch.ones_like(hidden[:, :1])], dim=1)  # [n, R + 1]
    gram = known.T @ known / len(x)
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    up = torch.cat([f.up * size, f.up_bias.unsqueeze(1)], dim=1)  # [D, R + 1]
    left = torch.arange(len(gram), device=gram.device)  # neurons not pruned yet, the bias last
    while len(left) - 1 > rank:
        inverse = torch.linalg.inv(gram[left][:, left])
        gone = (up.square().sum(dim=0) / inverse.diagonal())[:-1].argmin()
        up = up - torch.outer(up[:, gone], inverse[:, gone] / inverse[gone, gone])
        stay = torch.arange(len(left), device=left.device) != gone
        left, up = left[stay], up[:, stay]
    left = left[:-1]
    return Factors(f.down[left], f.down_bias[left], up[:, :-1] / size[left], up[:, -1])


def _ties(s: Factors, f: Factors, alpha: float, rank: int, precision: float) -> Factors:
    """TIES (arXiv 2306.01708, algorithm 1) on two task vectors, then the best rank-`rank` weight; forms [D, D + 1].

    The base model has no adapter, so a task vector is an adapter's whole map [W | c]: slow's, and alpha times fast's. Trim:
    each keeps its TIES_KEPT largest entries. Elect: the sign of the larger total, that of the sum. Merge: the mean of the
    entries of that sign. The paper's lambda on the merged vector is 1, its value without validation data: alpha in
    its place would shrink slow again at every merge, down to alpha^n after n tasks. Here alpha is fast's vote and weight.
    Mind what stays: where both agree the mean is half the sum, and slow is trimmed at every merge.
    """
    vectors = [torch.cat([g.up @ g.down, (g.up @ g.down_bias + g.up_bias).unsqueeze(1)], dim=1) for g in (s, f)]
    trimmed = torch.stack([vectors[0], alpha * vectors[1]])
    count = max(1, round(TIES_KEPT * trimmed[0].numel()))
    sizes = trimmed.abs().flatten(1)
    least = sizes.kthvalue(sizes.shape[1] - count + 1, dim=1).values
    trimmed = trimmed * (trimmed.abs() >= least[:, None, None])
    agree = trimmed.sign() == trimmed.sum(dim=0).sign()
    merged = (trimmed * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)
    weight, bias = merged[:, :-1], merged[:, -1]
    none = torch.zeros_like(bias)
    return _truncate(Factors(torch.eye(len(bias)).to(weight), none, weight, bias), rank, precision)
