"""One run in several processes, one a GPU, started by `torchrun --nproc_per_node N main.py --config FILE`.

Each rank has the whole model and computes a part of every batch; what the parts gave is gathered, so that between steps all
ranks hold the same state and take the same decisions. Rank 0 alone writes and speaks. Without torchrun, or with one process,
every function here is the identity and torch.distributed is not touched.

On torch.distributed alone. DistributedDataParallel wraps one module's forward, and a step here is a closure over parts; it
also turns absent gradients into zeros, which momentum and weight decay then move. Nothing is pickled. Processes belong
together for as long as they live, hence the global state, as in utils/process/interrupt.py.
Shapes: B rows of a batch, b of them a rank's own, W ranks.
"""

from __future__ import annotations

import gc
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeVar

from utils.process.machine import pick_device

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
TIMEOUT = timedelta(
    minutes=30
)  # for a rank that waits for another, which may be loading data; a dead one is noticed at once
ROUNDING = (
    1e-3  # part of a tensor's norm by which ranks may differ: what each computes for itself may be rounded otherwise
)
# how torch's backends say that another process is gone; they have no exception of their own for it
GONE = re.compile(r"gloo|NCCL|Connection (closed|reset) by peer|TCPStore|Broken pipe", re.IGNORECASE)

_rank, _world = 0, 1
_device: tuple[torch.device, str | None] | None = None


def rank() -> int:
    """This process's number, from 0."""
    return _rank


def world() -> int:
    """How many processes compute this run."""
    return _world


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return _rank == 0


def torchrun_ranks() -> tuple[int, int]:
    """(rank, processes) as torchrun's environment says, before `start`."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start(name: str = "auto") -> tuple[torch.device, str | None]:
    """As `pick_device`; under torchrun the processes find each other first, and LOCAL_RANK says which GPU is whose.

    Raises ValueError where there are more processes than GPUs."""
    global _rank, _world, _device
    number, count = torchrun_ranks()
    if count == 1:
        return pick_device(name)
    if _device is not None:
        return _device
    import torch
    from torch import distributed

    device, warning = pick_device(name)
    if device.type == "cuda":
        local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= there:
            raise ValueError(
                f"torchrun started more processes than there are GPUs here ({there}): give --nproc_per_node {there}, or "
                "--device cpu"
            )
        if name.startswith("cuda:"):
            warning = f"device '{name}' has no effect under torchrun: each process takes the GPU of its own number"
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    _rank, _world, _device = number, count, (device, warning)
    kinds = gather_objects(device.type)
    if len(set(kinds)) > 1:
        raise ValueError(f"the processes have different devices ({', '.join(kinds)}): give --device cpu")
    return _device


def rank_seed() -> tuple[str | int, ...]:
    """What makes random draws in training differ between ranks; nothing on rank 0."""
    return ("rank", _rank) if _rank else ()


def leave(code: int) -> None:
    """Ends the process. Where others may still wait for it, without any clean-up that could wait for them."""
    if _world > 1 and code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    gc.freeze()  # else Python ends by searching all that torch has loaded for cycles, a fifth of the time of --check
    sys.exit(code)


def stop() -> None:
    """Ends the group that `start` made, once all are here."""
    global _rank, _world, _device
    if _device is None:
        return
    from torch import distributed

    barrier()
    distributed.destroy_process_group()
    _rank, _world, _device = 0, 1, None


def lost(error: BaseException) -> bool:
    """Whether the error only says that another process has ended."""
    return _world > 1 and isinstance(error, RuntimeError | OSError) and bool(GONE.search(str(error)))


# Parts of batches, and what they give ----------------------------------------------------------------------------------


def shard(batch: Sequence[T]) -> list[T]:
    """This rank's own of a batch: contiguous parts whose sizes differ by one at most, empty for some of a small batch."""
    size, more = divmod(len(batch), _world)
    first = _rank * size + min(_rank, more)
    return list(batch[first : first + size + (_rank < more)])


def counts(own: int) -> list[int]:
    """The `own` of each rank [W]."""
    if _world == 1:
        return [own]
    import torch

    found = torch.zeros(_world, dtype=torch.int64)
    found[_rank] = own
    return total(found).tolist()


def gather(x: Any, sizes: Sequence[int]) -> Any:
    """The whole batch [B, ...] from each rank's first `sizes[rank]` rows of x [b or more, ...], in the order of ranks.

    x: a tensor, or a list, tuple or dict of what can be gathered. Every rank must have at least one row, if only as
    padding, since its shape is needed."""
    if _world == 1:
        return x
    if isinstance(x, dict):
        return {k: gather(v, sizes) for k, v in x.items()}
    if isinstance(x, list | tuple):
        found = [gather(v, sizes) for v in x]
        return type(x)(*found) if hasattr(x, "_fields") else type(x)(found)
    import torch
    from torch import distributed

    own = x.detach()[: sizes[_rank]].contiguous()
    padded = own.new_zeros(max(sizes), *x.shape[1:])
    padded[: len(own)] = own
    flat = padded.view(-1).view(torch.uint8)  # bytes: some backends lack some types
    everything = [torch.empty_like(flat) for _ in range(_world)]
    distributed.all_gather(everything, flat)
    parts = [of_rank.view(x.dtype).view(padded.shape) for of_rank in everything]
    return torch.cat([of_rank[:n] for of_rank, n in zip(parts, sizes, strict=True)])


def total(x: Tensor) -> Tensor:
    """Sum over ranks; all get the same bits."""
    if _world == 1:
        return x
    from torch import distributed

    summed = x.clone()
    distributed.all_reduce(summed)
    return summed


def any_rank(flag: bool) -> bool:
    """Whether any rank says so."""
    return sum(counts(int(flag))) > 0


def barrier() -> None:
    """Returns when all ranks have come here."""
    counts(0)


@dataclass(frozen=True)
class StepTotals:
    """What the parts of a step gave: `sizes` of the parts [W], `means` over samples, `sums`, whether any has a `flag`."""

    sizes: list[int]
    means: list[Tensor]
    sums: list[Tensor]
    flag: bool


def average(
    parameters: Iterable[torch.nn.Parameter], own: int, means: Sequence[Tensor], sums: Sequence[Tensor], flag: bool
) -> StepTotals:
    """After backward: each gradient becomes that of the mean over the whole batch, in one exchange with all the rest.

    A rank counts by its `own` samples, with 0 not at all. A gradient that no rank has stays None."""
    import torch
    from torch import distributed

    own_parameters = list(parameters)
    scalars = [v.detach() for v in (*means, *sums)]
    dtype = reduce(torch.promote_types, [p.dtype for p in own_parameters], scalars[0].dtype)
    device = scalars[0].device
    weights = [float(own)] * len(means) + [float(own > 0)] * len(sums)
    weighted = [v.to(dtype) * w if w else v.new_zeros((), dtype=dtype) for v, w in zip(scalars, weights, strict=True)]
    here = torch.zeros(_world, dtype=dtype)
    here[_rank] = own
    there = [p.grad is not None for p in own_parameters]
    facts = torch.tensor([*here.tolist(), float(flag), *map(float, there)], dtype=dtype).to(device)
    gradients = [
        p.new_zeros(p.numel(), dtype=dtype) if p.grad is None or not own else p.grad.reshape(-1).to(dtype) * own
        for p in own_parameters
    ]
    flat = torch.cat([facts, torch.stack(weighted), *gradients])
    distributed.all_reduce(flat)
    head, values, rest = flat.split([len(facts), len(weighted), len(flat) - len(facts) - len(weighted)])
    told = head.tolist()
    sizes = [round(n) for n in told[:_world]]
    count, present = sum(sizes), told[_world + 1 :]
    rest = rest / count
    for p, gradient, n in zip(own_parameters, rest.split([p.numel() for p in own_parameters]), present, strict=True):
        p.grad = gradient.view_as(p).to(p.dtype) if n else None
    made = list(values.unbind())
    return StepTotals(sizes, [v / count for v in made[: len(means)]], made[len(means) :], told[_world] > 0)


def mean(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Mean over ranks of x, each counting by its samples."""
    if _world == 1:
        return x
    weight = sizes[_rank] / sum(sizes)
    return total(x * weight if weight else x.new_zeros(x.shape))


# What all must know, from one of them ----------------------------------------------------------------------------------


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, JSON data, in the order of ranks."""
    if _world == 1:
        return [value]
    import torch

    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = counts(len(own))
    return [json.loads(text.numpy().tobytes()) for text in gather(own, sizes).split(sizes)]


def broadcast_from_first(make: Callable[[], tuple[Any, Mapping[str, Tensor]]]) -> tuple[Any, dict[str, Tensor]]:
    """What `make` gives on rank 0, which alone calls it: JSON data, and tensors by name, on the CPU."""
    if _world == 1:
        facts, tensors = make()
        return facts, dict(tensors)
    import torch
    from torch import distributed

    facts, tensors = make() if is_first() else (None, {})
    own = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    shapes = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in own.items()}
    facts, shapes = _text_from_first([facts, shapes])
    for name, (kind, shape) in shapes.items():
        if not is_first():
            own[name] = torch.empty(shape, dtype=getattr(torch, kind))
        if own[name].numel():
            distributed.broadcast(own[name].view(-1).view(torch.uint8), src=0)
    return facts, {name: own[name] for name in shapes}


def _text_from_first(value: Any) -> Any:
    import torch
    from torch import distributed

    data = json.dumps(value).encode() if is_first() else b""
    size = sum(counts(len(data)))
    text = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(size, dtype=torch.uint8)
    distributed.broadcast(text, src=0)
    return json.loads(text.numpy().tobytes())


def first_rank_first(make: Callable[[], T]) -> T:
    """What `make` gives, on rank 0 before it is called on the others: what it downloads is there by then."""
    if is_first():
        made = make()
        barrier()
        return made
    barrier()
    return make()


def broadcast_rounding(tensors: Mapping[str, Tensor], when: str) -> None:
    """Ranks compute for themselves what is no pass over data; where that was rounded otherwise, rank 0's values count.

    Raises RuntimeError, which names the first tensor, where they differ by more: then something took another way."""
    if _world == 1:
        return
    import torch
    from torch import distributed

    shapes = gather_objects([[name, list(t.shape)] for name, t in tensors.items()])
    if shapes[_rank] != shapes[0]:
        raise RuntimeError(f"{when} rank {_rank} holds other tensors than rank 0")
    with torch.no_grad():
        for name, own in tensors.items():
            if not own.numel():
                continue
            flat = own.detach().contiguous().view(-1)
            first = flat.clone()
            distributed.broadcast(first.view(torch.uint8), src=0)
            if torch.equal(first.view(torch.uint8), flat.view(torch.uint8)):
                continue
            wide = torch.float64
            if not (first - flat).to(wide).norm() <= ROUNDING * first.to(wide).norm() or not own.is_floating_point():
                raise RuntimeError(f"{when} rank {_rank} has other values in {name} than rank 0")
            own.copy_(first.view_as(own))
