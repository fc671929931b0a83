"""Floating-point operations of a pass, counted from the shapes of what torch computes.

A product of [m, k] and [k, n] counts 2 m k n, a multiplication and an addition for each term, as torch's FlopCounterMode and
most papers count them; papers that count multiply-adds (MACs) have half of it. Counted are matrix products, convolutions
and attention. Sums, norms, activation functions and softmax, under a hundredth in a ViT, are not.

torch.utils.flop_counter counts the same (tests/backbone/test_operations.py), but its import takes half a second.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def _product(a: Tensor, b: Tensor) -> int:
    """[..., m, k] x [..., k, n], or a vector in the place of b."""
    return 2 * a.numel() * (b.shape[-1] if b.dim() > 1 else 1)


def _convolution(x: Tensor, weight: Tensor, out: Tensor) -> int:
    """Each number of the output sums the inputs that one filter sees: weight [out, in / groups, *kernel]."""
    return 2 * out.numel() * prod(weight.shape[1:])


def _attention(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Q K^T and its product with V: query [..., n, e], key [..., m, e], value [..., m, v]."""
    *batch, n, e = query.shape
    return 2 * prod(batch) * n * key.shape[-2] * (e + value.shape[-1])


OPERATIONS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot"), lambda args, out: _product(args[0], args[1])),
    **dict.fromkeys(("addmm", "addmv", "baddbmm", "addbmm"), lambda args, out: _product(args[1], args[2])),
    "convolution": lambda args, out: _convolution(args[0], args[1], out),
}


class Counter(TorchDispatchMode):
    """Inside the block `total` grows with every product that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        attention = name.startswith("_scaled_dot_product")
        if name not in OPERATIONS and not attention:
            with self:  # what consists of other operations, such as a linear map of inference tensors
                result = func.decompose(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {})) if result is NotImplemented else result
        out = func(*args, **(kwargs or {}))
        self.total += _attention(*args[:3]) if attention else OPERATIONS[name](args, out)
        return out


def of(compute: Callable[[], object]) -> int:
    """The floating-point operations of `compute()`, whose result is dropped; it runs without gradients."""
    with torch.no_grad(), Counter() as counter:
        compute()
    return counter.total
