"""A sparse layer of SwiGLU experts beside the frozen MLP.

Shapes: B batch, N tokens, T = B N, D width, H hidden units of an expert, E experts, k chosen experts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.blocks import Slot
from backbone.experts.router import Granularity, Router, Routing, one_expert, uniform

Dispatch = Literal["auto", "dense", "loop", "grouped"]
DENSE_UP_TO = (
    64  # E H / k up to which all experts at once beat sorting (CPU, float32, D 768 and 128, forward and backward)
)


class SwiGLU(Slot):
    """y = U (silu(A x) * (B x)), no biases (Shazeer 2020, arXiv 2002.05202, eq. 6). x [.., D] -> y [.., D].

    A `gate_proj` [H, D], B `down_proj` [H, D], U `up_proj` [D, H]. U starts at zero, so the output is exactly 0 until the
    first step.
    """

    reads = "token"

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        for weight in (self.gate_proj.weight, self.down_proj.weight):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.up_proj.weight)

    def forward(self, x: Tensor, gates: None = None) -> Tensor:
        return self.up_proj(F.silu(self.gate_proj(x)) * self.down_proj(x))


class SparseMoE(Slot):
    """y_t = sum over the chosen e of g_te expert_e(x_t), [B, N, D] -> [B, N, D]. No residual inside: it is the block's.

    A slot of SlottedViT. `collect`, a list set between passes, receives the Routing of every pass; `forward` itself
    changes nothing. `capacity` c: in training each expert takes at most ceil(c T k / E) assignments, first choices before
    second ones, then in the batch's order; what is over adds 0. Never in evaluation, where it would let one sample change
    another's result; None (no limit) is the default.

    `dispatch`, all equal to rounding: `dense` computes every expert for every token in three products and multiplies by
    gates that are 0 outside the choice, `loop` sorts the tokens by expert and runs one expert after the other,
    `grouped` passes the sorted tokens to torch's grouped_mm; `auto` takes the first while E H is small or every expert
    acts, else grouped on a GPU that has it, else the loop.
    A gate of 0 and an expert without tokens both give a gradient of exactly zero.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int,
        top_k: int = 1,
        *,
        noisy: bool = False,
        granularity: Granularity = "token",
        capacity: float | None = None,
        dispatch: Dispatch = "auto",
    ):
        super().__init__()
        if hidden < 1 or (capacity is not None and capacity <= 0):
            raise ValueError(f"hidden must be at least 1 and capacity above 0 or None, got {hidden} and {capacity}")
        if dispatch not in get_args(Dispatch):
            raise ValueError(f"dispatch {dispatch!r} is unknown, expected one of {', '.join(get_args(Dispatch))}")
        self.width, self.hidden, self.capacity, self.dispatch = width, hidden, capacity, dispatch
        self.router = Router(width, experts, top_k, noisy=noisy, granularity=granularity)
        self.experts = nn.ModuleList(SwiGLU(width, hidden) for _ in range(experts))
        self.collect: list[Routing] | None = None
        self.fix(None)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        self.router.reset_parameters()
        for expert in self._experts():
            expert.reset_parameters(generator)

    def fix(self, routing: Literal["uniform"] | int | Callable[[Tensor], Routing] | None) -> None:
        """Routes without the router: `uniform`, all to the expert of this index, or by a function of the router's input
        ([B, N, D], or mean tokens [B, D] when routing samples); None lets the router decide again."""
        if isinstance(routing, str) and routing != "uniform":
            raise ValueError(f"fixed routing {routing!r} is unknown, expected uniform, an expert's index or a function")
        if isinstance(routing, int) and not 0 <= routing < len(self.experts):
            raise ValueError(f"expert {routing} does not exist, there are experts 0..{len(self.experts) - 1}")
        self.fixed = routing

    def grow(self, generator: torch.Generator | None = None) -> None:
        """Adds an expert with gate 0: the output stays. See Router.grow for how it is opened."""
        self.router.grow()
        expert = SwiGLU(self.width, self.hidden)
        expert.reset_parameters(generator)
        self.experts.append(expert.to(self._experts()[0].up_proj.weight))

    def forward(self, x: Tensor, gates: None = None) -> Tensor:
        y, routing = self.forward_with_routing(x)
        if self.collect is not None:
            self.collect.append(routing)
        return y

    def forward_with_routing(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Output [B, N, D] and the Routing as it acted (gates of dropped assignments are 0; chosen still lists them)."""
        routing = self.route(x)
        gates, chosen = routing.gates, routing.chosen
        if self.router.granularity == "sample":
            gates = gates.unsqueeze(1).expand(*x.shape[:-1], -1)
            chosen = chosen.unsqueeze(1).expand(*x.shape[:-1], -1)
        rows, gates, chosen = x.flatten(0, -2), gates.flatten(0, -2), chosen.flatten(0, -2)
        if self.training and self.capacity is not None:
            gates = gates * within_capacity(chosen, gates.shape[-1], self.capacity)
            if self.router.granularity == "token":
                routing = routing._replace(gates=gates.view_as(routing.gates))
        how = self._resolve(rows, chosen.shape[1])
        if how == "dense":
            y = _dense(rows, self._experts(), gates)
        else:
            y = _sorted(rows, self._experts(), gates, chosen, _grouped if how == "grouped" else _loop)
        return y.view(x.shape), routing

    def route(self, x: Tensor) -> Routing:
        """The routing alone, by the router or as fixed."""
        if self.fixed is None:
            return cast(Routing, self.router(x))
        vectors = x.mean(dim=1) if self.router.granularity == "sample" else x
        if isinstance(self.fixed, int):
            return one_expert(vectors, len(self.experts), self.fixed)
        return uniform(vectors, len(self.experts)) if self.fixed == "uniform" else self.fixed(vectors)

    def _experts(self) -> list[SwiGLU]:
        return list(cast(Sequence[SwiGLU], self.experts))

    def _resolve(self, rows: Tensor, k: int) -> Dispatch:
        device, dtype = rows.device.type, _compute_dtype(rows)
        if self.dispatch == "grouped" and not grouped_works(device, dtype, self.width, self.hidden):
            raise ValueError(
                f"grouped_mm takes no {self.width} x {self.hidden} {dtype} on {device} here; set dispatch to auto"
            )
        if self.dispatch != "auto":
            return self.dispatch
        if k == len(self.experts) or len(self.experts) * self.hidden <= DENSE_UP_TO * k:
            return "dense"
        return "grouped" if device == "cuda" and grouped_works(device, dtype, self.width, self.hidden) else "loop"


def within_capacity(chosen: Tensor, experts: int, capacity: float) -> Tensor:
    """1 for the assignments an expert has room for, 0 for the others: chosen [T, k] -> [T, E] of 0 and 1.

    Room for ceil(capacity * T k / E), for first choices, then to second ones, each in the order of the tokens
    (Switch, Fedus et al. 2021, eq. 3; priority of the first choice: GShard, Lepikhin et al. 2020, algorithm 1).
    """
    room = math.ceil(capacity * chosen.numel() / experts)
    wanted = F.one_hot(chosen.T, experts)  # [k, T, E]: choices outermost, so that the count serves first ones first
    before = wanted.flatten(0, 1).cumsum(dim=0).view_as(wanted) - wanted
    return (wanted * (before < room)).sum(dim=0)


# Three ways to compute the same: rows [T, D], gates [T, E], chosen [T, k] -> [T, D] ----------------------------------


def _dense(rows: Tensor, experts: Sequence[SwiGLU], gates: Tensor) -> Tensor:
    gate_proj = torch.cat([e.gate_proj.weight for e in experts])  # [E H, D]
    down = torch.cat([e.down_proj.weight for e in experts])
    up = torch.cat([e.up_proj.weight for e in experts], dim=1)  # [D, E H]
    hidden = F.silu(F.linear(rows, gate_proj)) * F.linear(rows, down)
    spread = gates.to(hidden.dtype).repeat_interleave(len(up[0]) // len(experts), dim=1)
    return F.linear(hidden * spread, up)


def _sorted(
    rows: Tensor, experts: Sequence[SwiGLU], gates: Tensor, chosen: Tensor, run: Callable[..., Tensor]
) -> Tensor:
    """Copies each row once for each choice, sorts the copies by expert, runs them, puts them back, weights and adds.

    Putting back and summing over k, instead of index_add into the tokens, keeps the order of sums fixed on a GPU too.
    """
    k = chosen.shape[1]
    expert_of = chosen.T.flatten()  # [k T]
    order = expert_of.argsort(stable=True)
    counts = torch.bincount(expert_of, minlength=len(experts))
    outputs = run(rows.repeat(k, 1)[order], experts, counts)
    back = outputs[order.argsort()].view(k, *rows.shape)
    return (back * gates.gather(1, chosen).T.unsqueeze(-1).to(back.dtype)).sum(dim=0)


def _loop(rows: Tensor, experts: Sequence[SwiGLU], counts: Tensor) -> Tensor:
    # An expert without rows runs on none of them: its gradient is zero as in the other two ways, not None.
    return torch.cat([expert(part) for expert, part in zip(experts, rows.split(counts.tolist()), strict=True)])


def _grouped(rows: Tensor, experts: Sequence[SwiGLU], counts: Tensor) -> Tensor:
    dtype, ends = _compute_dtype(rows), counts.cumsum(0).to(torch.int32)

    def product(inputs: Tensor, weights: list[Tensor]) -> Tensor:  # grouped_mm knows no autocast
        return F.grouped_mm(inputs, torch.stack(weights).to(dtype).transpose(1, 2), offs=ends)

    rows = rows.to(dtype)
    hidden = F.silu(product(rows, [e.gate_proj.weight for e in experts]))
    hidden = hidden * product(rows, [e.down_proj.weight for e in experts])
    return product(hidden, [e.up_proj.weight for e in experts])


def _compute_dtype(rows: Tensor) -> torch.dtype:
    device = rows.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype


@functools.cache
def grouped_works(device: str, dtype: torch.dtype, width: int, hidden: int) -> bool:
    """Whether this torch's grouped_mm takes these sizes in this precision, forward and backward: tried once on 8 rows, for
    what it accepts (precisions, strides, devices) differs from version to version."""
    if not hasattr(F, "grouped_mm"):
        return False
    try:
        with torch.enable_grad():
            probe = [SwiGLU(width, hidden).to(device, dtype) for _ in range(2)]
            rows = torch.zeros(8, width, device=device, dtype=dtype, requires_grad=True)
            with torch.autocast(device, enabled=False):
                out = _grouped(rows, probe, torch.tensor([8, 0], device=device))
            out.backward(torch.zeros_like(out))
    except RuntimeError:  # NotImplementedError is one
        return False
    return True


# Sizes of equal parameters -------------------------------------------------------------------------------------------


def hidden_for(width: int, rank: int, experts: int, top_k: int | None = None, noisy: bool = False) -> int:
    """H with which a SparseMoE has as many parameters as an Adapter of `rank`, or, with `top_k`, as many as act on a token.

    An adapter has 2 D R + R + D; n experts and the router 3 D H n + E D (twice that router if noisy), n = E or `top_k`.
    Rule: H = round((2 D R + R + D - E D) / (3 D n)). Its error is at most 1.5 n / (2 R + 1): within 1 % for sure only where
    2 R + 1 >= 150 n; for smaller ranks fix H and match the adapter by `rank_for`.
    Raises ValueError where the budget does not pay for one hidden unit.
    """
    router = experts * width * (2 if noisy else 1)
    hidden = round((2 * width * rank + rank + width - router) / (3 * width * (top_k or experts)))
    if hidden < 1:
        raise ValueError(
            f"ffn_num: an adapter of rank {rank} is too small to split among {experts} experts; raise it or lower num_experts"
        )
    return hidden


def rank_for(width: int, hidden: int, experts: int, top_k: int | None = None, noisy: bool = False) -> int:
    """The rank with which an Adapter comes closest to a SparseMoE's parameters (all, or those that act on a token): the
    inverse of `hidden_for`, in steps of 2 D + 1, so within 1 % from 3 H n + E >= 100 on."""
    total = 3 * width * hidden * (top_k or experts) + experts * width * (2 if noisy else 1)
    return max(1, round((total - width) / (2 * width + 1)))
