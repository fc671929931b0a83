"""What a training step costs in several processes, and how much of it is their exchange: `python -m benchmarks.parallel`.

The step is `fit`'s: a part of the batch through a ViT with adapters in its last layers, backward, one all_reduce of gradients
and counts (utils/process/parallel.py), SGD. The batch is the same whatever the processes are, so half of it is left
for each of two.
Medians over the steps of rank 0, by the wall clock: cores that others use too make them longer, so `processor` counts what
forward and backward computed. `waiting` is for the slowest rank and is told apart from the exchange by a barrier, which a run
does not have.

Starts torchrun itself, once for each number of processes; on a machine with GPUs each process takes one.
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
    """One of the processes: measures, and rank 0 prints a line of JSON."""
    device, _ = parallel.start(args.device)
    torch.manual_seed(0)  # the head's start values; ranks with others are refused below
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
    own = parallel.shard(range(args.batch))
    if not own:
        raise ValueError(f"--batch {args.batch}: fewer images than processes")
    images, labels = images[own[0] : own[-1] + 1], labels[own[0] : own[-1] + 1]

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    found: dict[str, list[float]] = {name: [] for name in TIMES}
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
            for name, seconds in zip(found, spans, strict=True):
                found[name].append(seconds)
    elements = sum(p.numel() for p in parameters) + len(parameters) + parallel.world() + 2
    if parallel.is_first():
        facts = {name: statistics.median(values) for name, values in found.items()}
        facts |= {"processes": parallel.world(), "bytes": elements * 4 if parallel.world() > 1 else 0}
        print(MARK + json.dumps(facts), flush=True)
    parallel.stop()


def measured(processes: int, arguments: list[str]) -> dict[str, Any]:
    """The facts of one number of processes, from a torchrun of its own."""
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
    """A line for each number of processes; efficiency: how much of a process's work of one remains, by images a second."""
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
