"""N passes with one expert each against one routed pass, in time and memory: `python -m benchmarks.routing`.

A ViT with experts (backbone/adapters/adapter.py) in its last three layers. Three ways on the same batch, over one frozen ViT:
- N passes: K networks with one expert a layer each, run one after the other from the image to the feature;
- one routed pass: all K experts a layer in one network (backbone/experts/routed.py), mixed for every token by one
  shared router;
- single adapter: one of those K networks; the difference from it is the cost of routing.
`forward` is inference. `training` is forward, cross-entropy of a fixed random head, backward and an SGD step of the experts
and of the router, if there is one; each of K networks trains on the batch with a separate optimizer, and routing losses
are left out. The three are timed in turn in every round, and each round begins with another. Times are medians over the
rounds, ratios are medians of the rounds' ratios, so that what slows a round slows both sides. `--clock processor` counts
the time in which this process computes (all its threads together) instead of the wall clock's, for cores that others use too.

Peak memory is the most that is allocated during a pass beyond what was allocated before it, without the weights: on the CPU
from every allocation and release of a tensor that torch's profiler records (exact and repeatable, unlike a process's resident
set, but without buffers inside the matrix library), on a GPU torch's count.
Prints Markdown (benchmarks/routing.md). Shapes: B batch, D width, K experts, L layers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.adapters.adapter import Adapter
from backbone.experts.routed import RoutedLayer, attach_router
from backbone.vit import SlottedViT
from utils.process.machine import environment, pick_device
from utils.process.seeds import named_generator

LAYERS = 3  # adapted, the last ones
CLASSES = 100
WAYS = ("N passes", "one routed pass", "single adapter")
PHASES = ("forward", "training")
# What issue 4 asks of the CPU at 4 experts: times faster than N passes; slower and larger than a single adapter by at most
REQUIRED_AT, FASTER, SLOWER, LARGER = 4, 3.5, 0.10, 0.05
MIB = 2**20
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
Run = Callable[[], object]
Clock = Callable[[], float]


# The networks --------------------------------------------------------------------------------------------------------


def make_experts(width: int, rank: int, count: int) -> list[list[Adapter]]:
    """`count` x L experts with seeded start values, up projections not zero, so that outputs differ."""
    experts = [[Adapter(width, rank) for _ in range(LAYERS)] for _ in range(count)]
    generator = named_generator("benchmark", "experts")
    for expert in (adapter for layers in experts for adapter in layers):
        expert.reset_parameters(generator)
        nn.init.normal_(expert.up_proj.weight, std=0.02, generator=generator)
        nn.init.normal_(expert.up_proj.bias, std=0.02, generator=generator)
    return experts


def with_slots(vit: nn.Module, slots: Sequence[nn.Module]) -> SlottedViT:
    """The ViT, shared and not copied, with `slots` in its last layers."""
    backbone = SlottedViT(vit)
    for layer, slot in zip(range(backbone.depth - len(slots), backbone.depth), slots, strict=True):
        backbone.fill(layer, slot)
    return backbone


def routed_network(vit: nn.Module, experts: Sequence[Sequence[Adapter]]) -> SlottedViT:
    """Copies of experts [K][L], mixed by a shared token router whose gates differ."""
    slots = [RoutedLayer() for _ in range(LAYERS)]
    for layers in experts:
        for slot, expert in zip(slots, layers, strict=True):
            slot.add(copy_of(expert))
    backbone = with_slots(vit, slots)
    generator = named_generator("benchmark", "router")
    for router in attach_router(backbone, "shared"):
        for column in router.columns:
            column.data.copy_(torch.randn(column.shape, generator=generator) / 10)
    return backbone


def copy_of(expert: Adapter) -> Adapter:
    """A copy with separate parameters, so that training one network does not change the others."""
    copied = Adapter(expert.down_proj.in_features, expert.rank)
    copied.load_state_dict(expert.state_dict())
    return copied.to(expert.down_proj.weight)


def forward(backbone: SlottedViT, images: Tensor) -> Run:
    """One inference pass."""

    def run() -> Tensor:
        with torch.inference_mode():
            return backbone(images)

    return run


def training(backbone: SlottedViT, images: Tensor, labels: Tensor, head: Tensor) -> Run:
    """One training step of everything that is not frozen; gradients are released afterwards."""
    parameters = [p for p in backbone.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)

    def run() -> float:
        loss = F.cross_entropy(backbone(images) @ head, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run


def in_turn(runs: Sequence[Run]) -> Run:
    """One run after the other."""

    def run() -> None:
        for each in runs:
            each()

    return run


# Measuring -----------------------------------------------------------------------------------------------------------


def interleaved(
    runs: Sequence[Run], rounds: int, device: torch.device, clock: Clock = time.perf_counter
) -> list[list[float]]:
    """Seconds of each run in each round; every round starts with another run, so that none is always first."""
    seconds: list[list[float]] = [[] for _ in runs]
    for number in range(rounds):
        for place in range(len(runs)):
            which = (number + place) % len(runs)
            _wait(device)
            start = clock()
            runs[which]()
            _wait(device)
            seconds[which].append(clock() - start)
    return seconds


def peak_memory(run: Run, device: torch.device) -> int:
    """Largest number of bytes of tensors during `run`, beyond those allocated before."""
    if device.type == "cuda":
        _wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as watch:
        run()
    assert watch.profiler is not None and watch.profiler.kineto_results is not None
    events = watch.profiler.kineto_results.events()
    now = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()  # negative where memory is released; what was there before counts as 0
        peak = max(peak, now)
    return peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Row:
    """One phase with K experts. `seconds` [3][rounds], `peak` [3] bytes, both in the order of WAYS."""

    phase: str
    count: int
    seconds: list[list[float]]
    peak: list[int]

    def ratio(self, way: int, other: int) -> float:
        """Median over the rounds of the time of one way over that of another."""
        return statistics.median(a / b for a, b in zip(self.seconds[way], self.seconds[other], strict=True))

    @property
    def faster(self) -> float:
        """How many times faster the routed pass is than N passes."""
        return self.ratio(0, 1)

    @property
    def slower(self) -> float:
        """By which share the routed pass is slower than a single adapter."""
        return self.ratio(1, 2) - 1

    @property
    def larger(self) -> float:
        """By which share its peak memory is above a single adapter's."""
        return self.peak[1] / self.peak[2] - 1


def measure(
    vit: VisionTransformer,
    rank: int,
    ks: Sequence[int],
    batch: int,
    rounds: int,
    device: torch.device,
    clock: Clock = time.perf_counter,
) -> list[Row]:
    """All rows, measured in interleaved rounds; every network runs twice before that."""
    vit.to(device)
    generator = named_generator("benchmark", "batch")
    images = torch.rand(batch, 3, *vit.patch_embed.img_size, generator=generator).to(device)
    labels = torch.randint(CLASSES, (batch,), generator=generator).to(device)
    head = torch.randn(vit.embed_dim, CLASSES, generator=generator).to(device) / vit.embed_dim**0.5
    experts = make_experts(vit.embed_dim, rank, max(ks))
    singles = [with_slots(vit, [copy_of(e) for e in layers]).to(device) for layers in experts]
    routed = [routed_network(vit, experts[:k]).to(device) for k in ks]
    plan: list[tuple[str, int, list[Run]]] = []
    for phase in PHASES:
        runs: list[Run] = [
            forward(net, images) if phase == "forward" else training(net, images, labels, head)
            for net in (*singles, *routed)
        ]
        interleaved(runs, 1, device)  # warms up; and the optimizers' state is there from the first step on
        alone, together = runs[: len(singles)], runs[len(singles) :]
        plan += [(phase, k, [in_turn(alone[:k]), run, alone[0]]) for k, run in zip(ks, together, strict=True)]
    peaks = [[peak_memory(run, device) for run in runs] for _, _, runs in plan]
    seconds: list[list[list[float]]] = [[[] for _ in WAYS] for _ in plan]
    for number in range(rounds):
        for (_, _, runs), of_row in zip(plan, seconds, strict=True):
            turned = [(number + i) % len(runs) for i in range(len(runs))]
            for which, (taken,) in zip(turned, interleaved([runs[i] for i in turned], 1, device, clock), strict=True):
                of_row[which].append(taken)
    return [Row(phase, k, s, p) for (phase, k, _), s, p in zip(plan, seconds, peaks, strict=True)]


# Tables --------------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| phase | K | N passes, ms | one routed pass, ms | single adapter, ms | faster than N passes | time over single | "
        "N passes, MiB | one routed pass, MiB | single adapter, MiB | memory over single |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = [f"{1000 * statistics.median(of_way):.1f}" for of_way in row.seconds]
        sizes = [f"{size / MIB:.2f}" for size in row.peak]
        cells = [row.phase, str(row.count), *times, f"{row.faster:.2f}x", f"{100 * row.slower:+.1f} %", *sizes]
        lines.append(f"| {' | '.join(cells)} | {100 * row.larger:+.1f} % |")
    return "\n".join(lines)


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A line for each requirement with the figure and whether it is met."""
    lines = []
    for row in (row for row in rows if row.count == REQUIRED_AT):
        where = f"{row.phase}, K = {row.count}:"
        for text, met in (
            (f"{row.faster:.2f}x faster than N passes, at least {FASTER}x required", row.faster >= FASTER),
            (f"{100 * row.slower:+.1f} % time over a single adapter, at most 10 % required", row.slower <= SLOWER),
            (f"{100 * row.larger:+.1f} % memory over a single adapter, at most 5 % required", row.larger <= LARGER),
        ):
            lines.append(f"- {where} {text}: {'met' if met else 'NOT MET'}")
    return lines


def main() -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler prints to stderr
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--batch", type=int, default=8)
    ask.add_argument("--rounds", type=int, default=5)
    ask.add_argument("--ks", type=int, nargs="+", default=[2, 4, 8], help="numbers of experts")
    ask.add_argument("--rank", type=int, default=16, help="rank of an expert")
    ask.add_argument("--model", default="vit_base_patch16_224", help="timm ViT, random weights")
    ask.add_argument("--image-size", type=int, default=224)
    ask.add_argument("--threads", type=int, help="threads of torch on the CPU (default: as torch chooses)")
    ask.add_argument("--device", default="auto", help="auto, cpu or cuda")
    ask.add_argument("--clock", choices=CLOCKS, default="wall", help="wall, or on the CPU processor: see above")
    args = ask.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    if device.type != "cpu" and args.clock != "wall":
        ask.error("--clock processor does not count what a GPU computes; use wall")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = cast(
            VisionTransformer,
            timm.create_model(args.model, pretrained=False, num_classes=0, img_size=args.image_size),
        )
    rows = measure(vit, args.rank, args.ks, args.batch, args.rounds, device, CLOCKS[args.clock])
    facts = environment(device)
    threads = f", {facts['threads']} threads" if device.type == "cpu" else ""
    print(
        f"{args.model} at {args.image_size} px, experts of rank {args.rank} in the last {LAYERS} layers, batch {args.batch}, "
        f"float32, {args.rounds} rounds, {args.clock} time; "
        f"{facts['device_name']}{threads}, torch {facts['versions']['torch']}\n"
    )
    print(table(rows))
    if device.type == "cpu":
        print("\n" + "\n".join(verdicts(rows)))


if __name__ == "__main__":
    main()
