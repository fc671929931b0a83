"""Routers: which expert acts how much. One that grows with a layer's adapters (SEMA), one for tokens or samples with top-k.

Shapes: B batch, N tokens, D width, E experts, k chosen experts.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RouterColumn(nn.Linear):
    """One expert's routing logit from the mean token, [B, D] -> [B, 1]; starts as torch's Linear does."""

    def __init__(self, width: int):
        super().__init__(width, 1)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound, generator=generator)
        nn.init.uniform_(self.bias, -bound, bound, generator=generator)


class ExpandableRouter(nn.Module):
    """Softmax over one logit an expert (SEMA, Wang et al. 2025, eq. 6). A new expert brings a new column, so that old
    columns can stay frozen while it trains. Logits and softmax are float32 or better, also under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = nn.ModuleList()

    def __len__(self) -> int:
        return len(self.columns)

    def forward(self, mean_token: Tensor) -> Tensor:
        """Gates [B, E] that sum to 1, from mean tokens [B, D]."""
        with torch.autocast(mean_token.device.type, enabled=False):
            return torch.cat([column(mean_token) for column in self.columns], dim=1).softmax(dim=1)


# One-pass routing of tokens or samples ------------------------------------------------------------------------------

Granularity = Literal["token", "sample"]
MOST_SURE = 6.0  # logit at which a discriminant may start: a gate of 0.998 beside one other, and still a gradient
ROUNDING = 1e-5  # part of a vector's length: what float32 features of one image differ by from batch to batch, and more
CLOSED = -1e4  # logit offset of a grown expert: its share is exactly 0, also in float64, and nothing is infinite


class Routing(NamedTuple):
    """Which expert acts how much, with k choices for each token ([B, N, ..]) or sample ([B, ..])."""

    gates: Tensor  # [.., E] the weights: 0 outside the choice
    probabilities: Tensor  # [.., E] the full softmax, which the auxiliary losses read
    logits: Tensor  # [.., E] what the softmax saw: noise, temperature and offset included
    chosen: Tensor  # [.., k] experts, the preferred first


class Router(nn.Module):
    """p = softmax(W (x - center) / temperature + offset), of which the `top_k` largest act (None: all, a dense mixture).

    x [B, N, D] -> Routing with a choice for each token, or for each sample from its mean token (`granularity`). Always in
    float32 or better, also under autocast: bf16 logits cannot tell close experts apart. Gates of the chosen experts:
    k > 1: softmax over the chosen alone (p renormalised; the same as Shazeer et al. 2017, eq. 3 and 5);
    k = 1: p itself (Switch, Fedus et al. 2021, eq. 2): renormalised it would be 1 whatever W, and W would get no gradient.
    Equal probabilities are chosen from the first expert on, so that the batch around a sample never matters.

    Each expert has one column [D], zero at first (all gates 1 / E), so that old columns can be frozen. `noisy`: in
    training z + N(0, 1) * softplus(V (x - center)), V trained, zero at first (Shazeer, eq. 4).
    Buffers, saved with the model and changed by the explicit calls only: center [D], temperature, offset [E],
    selection_bias [E]. The center matters: features share a large mean, along which one step moves all tokens from one
    expert to another together; in a trial with it top-1 collapsed to one expert, without it all four were used.
    """

    center: Tensor
    temperature: Tensor
    offset: Tensor
    selection_bias: Tensor

    def __init__(
        self,
        width: int,
        experts: int,
        top_k: int | None = None,
        *,
        noisy: bool = False,
        granularity: Granularity = "token",
    ):
        super().__init__()
        if experts < 1 or (top_k is not None and top_k < 1):
            raise ValueError(
                f"a router needs at least 1 expert and top_k at least 1 or None, got {experts} and {top_k}"
            )
        if granularity not in get_args(Granularity):
            raise ValueError(
                f"granularity {granularity!r} is unknown, expected one of {', '.join(get_args(Granularity))}"
            )
        self.width, self.top_k, self.noisy, self.granularity = width, top_k, noisy, granularity
        self.columns = nn.ParameterList(torch.zeros(width) for _ in range(experts))
        self.noise = nn.ParameterList(torch.zeros(width) for _ in range(experts if noisy else 0))
        self.register_buffer("center", torch.zeros(width))
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("offset", torch.zeros(experts))
        self.register_buffer("selection_bias", torch.zeros(experts))

    def __len__(self) -> int:
        return len(self.columns)

    def reset_parameters(self) -> None:
        for column in (*self.columns, *self.noise):
            nn.init.zeros_(column)

    def parameters_of(self, expert: int) -> list[nn.Parameter]:
        """One expert's columns, to freeze or to give to an optimizer."""
        return [self.columns[expert], *([self.noise[expert]] if self.noisy else [])]

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Routing:
        """Routing of x [B, N, D] ([.., D] per token). `generator` draws the noise; None: torch's global one."""
        return self.route(self.read(x), generator)

    def read(self, x: Tensor) -> Tensor:
        """What is routed, for x [B, N, D]: the tokens, or [B, D] the mean token, centred, in float32 or better."""
        if self.granularity == "sample":
            x = x.mean(dim=1)
        with torch.autocast(x.device.type, enabled=False):
            return x.to(torch.promote_types(x.dtype, torch.float32)) - self.center

    def route(self, x: Tensor, generator: torch.Generator | None = None) -> Routing:
        """Routing of x [.., D] from `read`; routers that share center and granularity may share what was read."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x, torch.stack(list(self.columns)).to(x.dtype))
            if self.noisy and self.training:
                spread = F.softplus(F.linear(x, torch.stack(list(self.noise)).to(x.dtype)))
                drawn = torch.randn(logits.shape, generator=generator, dtype=x.dtype, device=x.device)
                logits = logits + drawn * spread
            return self._choose(logits / self.temperature + self.offset)

    def _choose(self, logits: Tensor) -> Routing:
        probabilities = logits.softmax(dim=-1)
        k = min(self.top_k or len(self), len(self))
        # Select on s + b, weight with s (Wang et al. 2024, arXiv 2408.15664). A stable sort, not topk: see above.
        order = (probabilities.detach() + self.selection_bias).argsort(dim=-1, descending=True, stable=True)
        chosen = order[..., :k]
        if k == len(self):
            return Routing(probabilities, probabilities, logits, chosen)
        weights = probabilities.gather(-1, chosen) if k == 1 else logits.gather(-1, chosen).softmax(dim=-1)
        return Routing(torch.zeros_like(probabilities).scatter(-1, chosen, weights), probabilities, logits, chosen)

    # Changed between passes -----------------------------------------------------------------------------------------

    def set_center(self, mean: Tensor) -> None:
        """Routes by x - `mean` [D] from now on; usually the mean of the first task's tokens."""
        self.center.copy_(mean)

    def set_temperature(self, value: float) -> None:
        """Usually `temperature(step, steps, start, end)`; what the last call sets is evaluated and saved."""
        if value <= 0:
            raise ValueError(f"a temperature must be above 0, got {value}")
        self.temperature.fill_(value)

    def set_offset(self, expert: int, value: float) -> None:
        """Adds `value` to an expert's logit after the temperature: CLOSED keeps it out, 0 lets it compete as any other."""
        self.offset[expert] = value

    @torch.no_grad()
    def sees(self, inputs: Tensor) -> bool:
        """Whether the mean of `inputs` [n, D] (as `read` gives them) lies off the center by more than rounding: what is
        identical to it gives noise as a direction, along which a discriminant would be steep without limit."""
        return bool(inputs.mean(dim=0).norm() > ROUNDING * self.center.norm())

    @torch.no_grad()
    def aim(self, expert: int, inputs: Tensor) -> None:
        """Opens an expert for what lies near `inputs` [n, D] (as `read` gives them) and leaves the rest to those before.

        Its logit becomes the log odds of a linear discriminant between the center and the mean v of the inputs, with their
        variance s^2 along v on both sides (Fisher 1936): v.x / s^2 - |v|^2 / (2 s^2), 0 half way, at v at most MOST_SURE. So
        inputs that do not tell the two apart leave the gates near even. Raises ValueError for inputs whose mean is the
        center, which `sees` tells before.
        """
        mean = inputs.mean(dim=0)
        square = mean.square().sum()
        if not self.sees(inputs):
            raise ValueError("inputs around the center have no direction a router could be aimed at")
        variance = (inputs @ mean).var(correction=0) / square
        scale = 1 / variance.clamp(min=square / (2 * MOST_SURE))
        self.columns[expert].copy_(scale * mean * self.temperature)
        self.offset[expert] = -scale * square / 2

    def grow(self) -> None:
        """Adds an expert whose gate is 0: the output stays as it was, to the last bit but for the order of sums.

        A fresh column alone would take its share at once. So the expert starts with the offset CLOSED, behind the
        temperature so that no temperature opens it, and with the lowest selection bias, so that it never displaces a choice.
        At gate 0 it gets no gradient either: `set_offset`, raised step by step or at once, is what opens it. Until then it
        stays out of what balances (`among`).
        """
        like = self.columns[0]
        self.columns.append(nn.Parameter(torch.zeros_like(like)))
        if self.noisy:
            self.noise.append(nn.Parameter(torch.zeros_like(like)))
        self.offset = torch.cat([self.offset, self.offset.new_full((1,), CLOSED)])
        self.selection_bias = torch.cat([self.selection_bias, self.selection_bias.min().view(1)])

    def drop(self, expert: int) -> None:
        """Takes an expert's column away; its share goes to the others in proportion to theirs. Raises ValueError for the
        last one or one that is not there."""
        if not 0 <= expert < len(self) or len(self) == 1:
            raise ValueError(f"expert {expert} of {len(self)} cannot be dropped")
        keep = [e for e in range(len(self)) if e != expert]
        self.columns = nn.ParameterList(self.columns[e] for e in keep)
        if self.noisy:
            self.noise = nn.ParameterList(self.noise[e] for e in keep)
        self.offset, self.selection_bias = self.offset[keep], self.selection_bias[keep]

    @torch.no_grad()
    def update_bias(self, counts: Tensor, rate: float, among: Tensor | None = None) -> None:
        """Auxiliary-loss-free balancing: b_e += rate * sign(mean c - c_e) (arXiv 2408.15664, algorithm 1).

        `counts` [E] assignments since the last call; `among` [E] bool: the experts that take part (None: all).
        """
        taking = torch.ones_like(counts, dtype=torch.bool) if among is None else among
        step = torch.sign(counts[taking].to(self.selection_bias).mean() - counts)
        self.selection_bias += rate * torch.where(taking, step, 0)


def temperature(step: int, steps: int, start: float, end: float) -> float:
    """start * (end / start) ** (step / steps): geometric from `start` at step 0 to `end` at step `steps`."""
    if steps < 1 or start <= 0 or end <= 0:
        raise ValueError(f"a schedule needs steps >= 1 and temperatures above 0, got {steps}, {start} and {end}")
    return start * (end / start) ** (step / steps)


# Routing without a router, for debugging and as a control: one choice for each vector of x [.., D] ------------------


def uniform(x: Tensor, experts: int) -> Routing:
    """All experts with gate 1 / E."""
    every = torch.arange(experts, device=x.device).expand(*x.shape[:-1], experts)
    return _fixed(every, experts, x)


def one_expert(x: Tensor, experts: int, expert: int | Tensor) -> Routing:
    """Gate 1 for `expert`: one for all, or indices of leading shape ([B] serves all tokens of a sample: an oracle's choice)."""
    if isinstance(expert, int) and not 0 <= expert < experts:
        raise ValueError(f"expert {expert} does not exist, there are experts 0..{experts - 1}")
    choice = torch.as_tensor(expert, device=x.device)
    choice = choice.view(*choice.shape, *(1 for _ in range(x.dim() - choice.dim())))
    return _fixed(choice.expand(*x.shape[:-1], 1), experts, x)


def random_experts(x: Tensor, experts: int, top_k: int, generator: torch.Generator | None = None) -> Routing:
    """`top_k` different experts, drawn anew for each vector, with gate 1 / k. Drawn on the generator's device, so that
    the same seed gives the same choice on every device."""
    if not 1 <= top_k <= experts:
        raise ValueError(f"{top_k} of {experts} experts cannot be drawn, expected 1..{experts}")
    device = generator.device if generator is not None else torch.device("cpu")
    drawn = torch.rand((*x.shape[:-1], experts), generator=generator, device=device)
    return _fixed(drawn.argsort(dim=-1)[..., :top_k].to(x.device), experts, x)


def _fixed(chosen: Tensor, experts: int, like: Tensor) -> Routing:
    gates = torch.zeros(
        (*like.shape[:-1], experts), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device
    )
    gates = gates.scatter(-1, chosen, 1 / chosen.shape[-1])
    return Routing(gates, gates, gates.log(), chosen)
