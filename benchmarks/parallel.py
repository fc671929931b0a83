"""Time of a training step in several processes, and how much of it is communication: `python -m benchmarks.parallel`.

The step is that of `fit`: a shard of the batch through a ViT with adapters in its last layers, backward, one all_reduce of
gradients and counts (utils/process/parallel.py), SGD. The batch is the same for every number of processes, so each of two
processes has half of it. Times are medians over the steps of rank 0 by the wall clock, which other work on the machine makes
longer; `processor` is the processor time of forward and backward. `waiting` is for the slowest rank; a barrier, which a run
does not have, separates it from the exchange.

Starts torchrun once for each number of processes; on a machine with GPUs each process uses one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from backbone.adapters.adapter import Adapter
from backbone.vit import SlottedViT
from benchmarks import measure
from utils.process import parallel
from utils.process.seeds import named_generator

CLASSES = 100
MARK = "measured "
TIMES = ("step", "compute", "processor", "waiting", "exchange")


def worker(args: argparse.Namespace) -> None:
    """Measures in one of the processes; rank 0 prints a line of JSON."""
    device, _ = parallel.start(args.device)
    torch.manual_seed(0)  # the head's start values, which must be equal on all ranks
    backbone = SlottedViT(measure.random_vit(args.model, args.image_size))
    generator = named_generator("benchmark", "parallel")
    for layer in range(backbone.depth - args.layers, backbone.depth):
        adapter = Adapter(backbone.width, args.rank)
        adapter.reset_parameters(generator)
        backbone.fill(layer, adapter)
    head = nn.Linear(backbone.width, CLASSES).to(device)
    backbone.to(device)
    parameters = [*backbone.slots.parameters(), *head.parameters()]
    parallel.broadcast_rounding({str(number): p for number, p in enumerate(parameters)}, "at the start")
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
    size = backbone.vit.patch_embed.img_size
    images = torch.rand(args.batch, 3, *size, generator=generator).to(device)
    labels = torch.randint(CLASSES, (args.batch,), generator=generator).to(device)
    shard = parallel.shard(range(args.batch))
    if not shard:
        raise ValueError(f"--batch {args.batch}: fewer images than processes")
    images, labels = images[shard[0] : shard[-1] + 1], labels[shard[0] : shard[-1] + 1]

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    times: dict[str, list[float]] = {name: [] for name in TIMES}
    for number in range(args.steps + 2):
        start, busy = now(), time.process_time()
        loss = F.cross_entropy(head(backbone(images)), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        computed, busy = now(), time.process_time() - busy
        parallel.barrier()
        waited = now()
        if parallel.world() > 1:
            parallel.average(parameters, len(labels), [loss], [], False)
        exchanged = now()
        optimizer.step()
        end = now()
        if number >= 2:
            spans = (end - start, computed - start, busy, waited - computed, exchanged - waited)
            for name, seconds in zip(times, spans, strict=True):
                times[name].append(seconds)
    elements = sum(p.numel() for p in parameters) + len(parameters) + parallel.world() + 2
    if parallel.is_first():
        facts = {name: statistics.median(values) for name, values in times.items()}
        facts |= {"processes": parallel.world(), "bytes": elements * 4 if parallel.world() > 1 else 0}
        print(MARK + json.dumps(facts), flush=True)
    parallel.stop()


def measured(processes: int, arguments: list[str]) -> dict[str, Any]:
    """The measurements with one number of processes, from a run of torchrun."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*launch, "-m", "benchmarks.parallel", "--worker", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={"OMP_NUM_THREADS": "1", **os.environ},
    )
    lines = [line for line in done.stdout.splitlines() if MARK in line]
    if done.returncode or not lines:
        raise SystemExit(f"{processes} processes ended with {done.returncode}; see above")
    facts: dict[str, Any] = json.loads(lines[0].partition(MARK)[2])
    return facts


def table(rows: list[dict[str, Any]], batch: int) -> str:
    """A row for each number of processes; efficiency: images a second for each process, relative to the first row."""
    lines = [f"| processes | {' | '.join(f'{name} ms' for name in TIMES)} | MB exchanged | images/s | efficiency |"]
    lines.append("|---:" * (len(TIMES) + 4) + "|")
    for row in rows:
        times = " | ".join(f"{1000 * row[name]:.1f}" for name in TIMES)
        share = rows[0]["step"] * rows[0]["processes"] / row["step"] / row["processes"]
        lines.append(
            f"| {row['processes']} | {times} | {row['bytes'] / 1e6:.2f} | {batch / row['step']:.1f} | {100 * share:.0f} % |"
        )
    return "\n".join(lines)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    ask.add_argument("--model", default="vit_tiny_patch16_224")
    ask.add_argument("--image_size", type=int, default=64)
    ask.add_argument("--batch", type=int, default=32)
    ask.add_argument("--layers", type=int, default=12)
    ask.add_argument("--rank", type=int, default=16)
    ask.add_argument("--steps", type=int, default=30)
    ask.add_argument("--device", default="auto")
    ask.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = ask.parse_args()
    if args.worker:
        worker(args)
        return
    rows = [measured(count, sys.argv[1:]) for count in args.processes]
    print(
        f"{args.model}, {args.image_size} px, batch {args.batch}, adapters of rank {args.rank} in {args.layers} layers\n"
    )
    print(table(rows, args.batch))


if __name__ == "__main__":
    main()
