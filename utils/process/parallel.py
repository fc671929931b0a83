"""One run in several processes, one a GPU, started by `torchrun --nproc_per_node N main.py --config FILE`.

Each rank has the whole model and computes one shard of every batch. The results of all shards are gathered, so between two
steps all ranks have the same state and take the same decisions. Only rank 0 writes files and prints. Without torchrun, or
with one process, every function here is the identity and torch.distributed is never called.

Why not DistributedDataParallel: it wraps the forward of one module, while a training step here is a closure over several;
and it turns absent gradients into zeros, which momentum and weight decay would then apply. Nothing is pickled. The ranks form
one group for the life of the process, hence the global state, as in utils/process/interrupt.py.
Shapes: B rows of a batch, b rows of this rank's shard, W ranks.
"""

from __future__ import annotations

import json
import os
import re
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
# How long a rank waits for another, which may be loading data. A rank that died is noticed at once.
TIMEOUT = timedelta(minutes=30)
# Largest difference between ranks, relative to the tensor's norm, that counts as rounding.
ROUNDING = 1e-3
# Messages by which torch's backends report that another process has ended; there is no exception class for it.
GONE = re.compile(r"gloo|NCCL|Connection (closed|reset) by peer|TCPStore|Broken pipe", re.IGNORECASE)

_rank, _world = 0, 1
_device: tuple[torch.device, str | None] | None = None


def rank() -> int:
    """The number of this process, from 0."""
    return _rank


def world() -> int:
    """The number of processes that compute this run."""
    return _world


def is_first() -> bool:
    """Whether this is rank 0, the process that writes files and prints."""
    return _rank == 0


def torchrun_ranks() -> tuple[int, int]:
    """(rank, number of processes) from torchrun's environment variables; valid before `start`."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start(name: str = "auto") -> tuple[torch.device, str | None]:
    """The device as `pick_device` finds it, and a warning or None. Under torchrun it also joins the process group and takes
    the GPU with the number LOCAL_RANK.

    Raises ValueError if there are more processes than GPUs, or if the processes have different kinds of device."""
    global _rank, _world, _device
    number, count = torchrun_ranks()
    if count == 1:
        return pick_device(name), None
    if _device is not None:
        return _device
    import torch
    from torch import distributed

    device, warning = pick_device(name), None
    if device.type == "cuda":
        local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(
                f"torchrun started more processes than there are GPUs here ({gpus}): give --nproc_per_node {gpus}, or "
                "--device cpu"
            )
        if name.startswith("cuda:"):
            warning = f"device '{name}' has no effect under torchrun: each process takes the GPU with its local rank"
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    _rank, _world, _device = number, count, (device, warning)
    kinds = gather_objects(device.type)
    if len(set(kinds)) > 1:
        raise ValueError(f"the processes have different devices ({', '.join(kinds)}): give --device cpu")
    return _device


def rank_seed() -> tuple[str | int, ...]:
    """Names to add to a seed so that ranks draw different numbers; empty on rank 0, as in a run of one process."""
    return ("rank", _rank) if _rank else ()


def stop() -> None:
    """Leaves the process group once every rank has called this."""
    global _rank, _world, _device
    if _device is None:
        return
    from torch import distributed

    barrier()
    distributed.destroy_process_group()
    _rank, _world, _device = 0, 1, None


def lost(error: BaseException) -> bool:
    """Whether `error` only reports that another process of the run has ended."""
    return _world > 1 and isinstance(error, RuntimeError | OSError) and bool(GONE.search(str(error)))


# Shards of batches, and their results ----------------------------------------------------------------------------------


def shard(batch: Sequence[T]) -> list[T]:
    """This rank's shard of `batch`. Shards are contiguous and their sizes differ by at most one; in a batch smaller than the
    number of ranks, some are empty."""
    size, rest = divmod(len(batch), _world)
    first = _rank * size + min(_rank, rest)
    return list(batch[first : first + size + (_rank < rest)])


def counts(count: int) -> list[int]:
    """The `count` of every rank, [W]."""
    if _world == 1:
        return [count]
    import torch

    by_rank = torch.zeros(_world, dtype=torch.int64)
    by_rank[_rank] = count
    return total(by_rank).tolist()


def gather(x: Any, sizes: Sequence[int]) -> Any:
    """The whole batch [B, ...], put together from the first `sizes[rank]` rows of every rank's x [b or more, ...].

    `x` is a tensor, or a list, tuple or dict of tensors. Every rank must pass at least one row, if only as padding, because
    the shape of a row is read from it."""
    if _world == 1:
        return x
    if isinstance(x, dict):
        return {k: gather(v, sizes) for k, v in x.items()}
    if isinstance(x, list | tuple):
        gathered = [gather(v, sizes) for v in x]
        return type(x)(*gathered) if hasattr(x, "_fields") else type(x)(gathered)
    import torch
    from torch import distributed

    rows = x.detach()[: sizes[_rank]].contiguous()
    padded = rows.new_zeros(max(sizes), *x.shape[1:])
    padded[: len(rows)] = rows
    flat = padded.view(-1).view(torch.uint8)  # bytes: some backends lack some types
    flat_by_rank = [torch.empty_like(flat) for _ in range(_world)]
    distributed.all_gather(flat_by_rank, flat)
    by_rank = [received.view(x.dtype).view(padded.shape) for received in flat_by_rank]
    return torch.cat([rows[:n] for rows, n in zip(by_rank, sizes, strict=True)])


def total(x: Tensor) -> Tensor:
    """The sum over ranks; every rank receives the same bits."""
    if _world == 1:
        return x
    from torch import distributed

    summed = x.clone()
    distributed.all_reduce(summed)
    return summed


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank."""
    return sum(counts(int(flag))) > 0


def barrier() -> None:
    """Returns once every rank has called this."""
    counts(0)


@dataclass(frozen=True)
class StepTotals:
    """A step over all ranks: `sizes` of the shards [W], `means` over all samples, `sums`, and whether any rank's `flag` was
    true."""

    sizes: list[int]
    means: list[Tensor]
    sums: list[Tensor]
    flag: bool


def average(
    parameters: Iterable[torch.nn.Parameter], count: int, means: Sequence[Tensor], sums: Sequence[Tensor], flag: bool
) -> StepTotals:
    """Call after backward, on every rank: makes each gradient that of the mean over the whole batch, in one all-reduce which
    also carries `means`, `sums` and `flag`.

    A rank counts by `count`, the samples of its shard; with 0 its padding adds nothing. A parameter without a gradient on
    every rank keeps None."""
    import torch
    from torch import distributed

    trained = list(parameters)
    scalars = [v.detach() for v in (*means, *sums)]
    dtype = reduce(torch.promote_types, [p.dtype for p in trained], scalars[0].dtype)
    device = scalars[0].device
    weights = [float(count)] * len(means) + [float(count > 0)] * len(sums)
    weighted = [v.to(dtype) * w if w else v.new_zeros((), dtype=dtype) for v, w in zip(scalars, weights, strict=True)]
    count_by_rank = torch.zeros(_world, dtype=dtype)
    count_by_rank[_rank] = count
    has_gradient = [float(p.grad is not None) for p in trained]
    facts = torch.tensor([*count_by_rank.tolist(), float(flag), *has_gradient], dtype=dtype).to(device)
    gradients = [
        p.new_zeros(p.numel(), dtype=dtype) if p.grad is None or not count else p.grad.reshape(-1).to(dtype) * count
        for p in trained
    ]
    flat = torch.cat([facts, torch.stack(weighted), *gradients])
    distributed.all_reduce(flat)
    facts, values, gradient = flat.split([len(facts), len(weighted), len(flat) - len(facts) - len(weighted)])
    numbers = facts.tolist()
    sizes = [round(n) for n in numbers[:_world]]
    samples, ranks_with_gradient = sum(sizes), numbers[_world + 1 :]
    by_parameter = (gradient / samples).split([p.numel() for p in trained])
    for p, mean_gradient, ranks in zip(trained, by_parameter, ranks_with_gradient, strict=True):
        p.grad = mean_gradient.view_as(p).to(p.dtype) if ranks else None
    totals = list(values.unbind())
    return StepTotals(sizes, [v / samples for v in totals[: len(means)]], totals[len(means) :], numbers[_world] > 0)


def mean(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Mean of x over ranks, each weighted by `sizes`, the samples of its shard."""
    if _world == 1:
        return x
    weight = sizes[_rank] / sum(sizes)
    return total(x * weight if weight else x.new_zeros(x.shape))


# Facts that every rank needs -------------------------------------------------------------------------------------------


def gather_objects(value: Any) -> list[Any]:
    """The `value` of every rank, JSON data, in the order of ranks."""
    if _world == 1:
        return [value]
    import torch

    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = counts(len(text))
    return [json.loads(received.numpy().tobytes()) for received in gather(text, sizes).split(sizes)]


def broadcast_from_first(make: Callable[[], tuple[Any, Mapping[str, Tensor]]]) -> tuple[Any, dict[str, Tensor]]:
    """Calls `make` on rank 0 alone and returns its result on every rank: JSON data, and tensors by name, on the CPU."""
    if _world == 1:
        facts, tensors = make()
        return facts, dict(tensors)
    import torch
    from torch import distributed

    facts, tensors = make() if is_first() else (None, {})
    copies = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    shapes = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in copies.items()}
    facts, shapes = _json_from_first([facts, shapes])
    for name, (dtype, shape) in shapes.items():
        if not is_first():
            copies[name] = torch.empty(shape, dtype=getattr(torch, dtype))
        if copies[name].numel():
            distributed.broadcast(copies[name].view(-1).view(torch.uint8), src=0)
    return facts, {name: copies[name] for name in shapes}


def _json_from_first(value: Any) -> Any:
    """Rank 0's `value`, JSON data, on every rank."""
    import torch
    from torch import distributed

    data = json.dumps(value).encode() if is_first() else b""
    size = sum(counts(len(data)))
    text = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(size, dtype=torch.uint8)
    distributed.broadcast(text, src=0)
    return json.loads(text.numpy().tobytes())


def first_rank_first(make: Callable[[], T]) -> T:
    """Calls `make` on rank 0, then on the others, which find what rank 0 has downloaded; returns its result."""
    if is_first():
        result = make()
        barrier()
        return result
    barrier()
    return make()


def broadcast_rounding(tensors: Mapping[str, Tensor], when: str) -> None:
    """Copies rank 0's values into `tensors` where another rank's differ by rounding. Everything that is not a pass over data
    is computed on every rank, and different processors may round it differently. `when` begins the error message.

    Raises RuntimeError naming the first tensor that differs by more than rounding: the ranks have diverged."""
    if _world == 1:
        return
    import torch
    from torch import distributed

    shapes = gather_objects([[name, list(t.shape)] for name, t in tensors.items()])
    if shapes[_rank] != shapes[0]:
        raise RuntimeError(f"{when} rank {_rank} has tensors of other names or shapes than rank 0")
    with torch.no_grad():
        for name, tensor in tensors.items():
            if not tensor.numel():
                continue
            here = tensor.detach().contiguous().view(-1)
            first = here.clone()
            distributed.broadcast(first.view(torch.uint8), src=0)
            if torch.equal(first.view(torch.uint8), here.view(torch.uint8)):
                continue
            difference, norm = (first - here).to(torch.float64).norm(), first.to(torch.float64).norm()
            if not difference <= ROUNDING * norm or not tensor.is_floating_point():
                raise RuntimeError(f"{when} rank {_rank} has other values in {name} than rank 0")
            tensor.copy_(first.view_as(tensor))
