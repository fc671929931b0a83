"""What all speed benchmarks share: ways to do the same thing are timed against each other, in rounds.

In every round each way runs once, and each round begins with another way. Times are medians over the rounds; ratios are
medians of the ratios to the first way in each round, so that what slows a round slows both sides. `--clock processor` (the
default on the CPU) counts the time in which this process computes instead of the wall clock's, for cores that others use too.
Peak memory is the most that is allocated during a run beyond what was allocated before, see benchmarks/routing.py.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from benchmarks.routing import CLOCKS, MIB, Run, interleaved, peak_memory
from utils.process.machine import environment, pick_device

# Sizes of the benchmarks that train or run K adapters in the last layers of a ViT.
FOUR_ADAPTERS: dict[str, int | str] = {
    "model": "vit_base_patch16_224",
    "image_size": 224,
    "batch": 4,
    "layers": 3,
    "rank": 16,
    "count": 4,
}


@dataclass(frozen=True)
class Way:
    """One way to do it. `prepare` runs before each run, outside the clock."""

    name: str
    run: Run
    prepare: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Measured:
    """`seconds` of each round and `peak` bytes of one way."""

    name: str
    seconds: list[float]
    peak: int

    def faster(self, first: Measured) -> float:
        """How many times faster than another way: the median over the rounds of their ratio."""
        return statistics.median(a / b for a, b in zip(first.seconds, self.seconds, strict=True))


def compare(ways: Sequence[Way], rounds: int, device: torch.device, clock: str) -> list[Measured]:
    """Times all ways in turn; each runs twice before that."""
    peaks = []
    for way in ways:
        way.prepare()
        way.run()
        way.prepare()
        peaks.append(peak_memory(way.run, device))
    seconds: list[list[float]] = [[] for _ in ways]
    for number in range(rounds):
        for place in range(len(ways)):
            which = (number + place) % len(ways)
            ways[which].prepare()
            ((taken,),) = interleaved([ways[which].run], 1, device, CLOCKS[clock])
            seconds[which].append(taken)
    return [Measured(way.name, of_way, peak) for way, of_way, peak in zip(ways, seconds, peaks, strict=True)]


def table(groups: dict[str, list[Measured]]) -> str:
    """A Markdown row for each way of each group; the others of a group are compared with its first."""
    lines = ["| what | way | median, ms | times faster | peak, MiB |", "|---|---|---|---|---|"]
    for what, rows in groups.items():
        for row in rows:
            faster = "-" if row is rows[0] else f"{row.faster(rows[0]):.2f}x"
            median = 1000 * statistics.median(row.seconds)
            lines.append(f"| {what} | {row.name} | {median:.1f} | {faster} | {row.peak / MIB:.2f} |")
    return "\n".join(lines)


def verdict(text: str, figure: float, required: float) -> str:
    return f"- {text}: {figure:.2f}x, at least {required:g}x required: {'met' if figure >= required else 'NOT MET'}"


def arguments(doc: str, **defaults: int | str) -> argparse.ArgumentParser:
    """A parser with the sizes of a benchmark and the options of measuring."""
    ask = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in defaults.items():
        ask.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    ask.add_argument("--rounds", type=int, default=5)
    ask.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
    ask.add_argument("--device", default="cpu", help="auto, cpu or cuda")
    ask.add_argument("--clock", choices=CLOCKS, help="wall or processor (default: processor on the CPU, wall on a GPU)")
    return ask


def begin(ask: argparse.ArgumentParser) -> tuple[argparse.Namespace, torch.device]:
    """Parses the arguments; prints what is measured and on what machine. Returns arguments and device."""
    args = ask.parse_args()
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    args.clock = args.clock or ("processor" if device.type == "cpu" else "wall")
    if device.type != "cpu" and args.clock != "wall":
        ask.error("--clock processor does not count what a GPU computes; use wall")
    facts = environment(device)
    precision = getattr(args, "precision", "float32")
    git = facts["git"] or {"commit": "unknown", "dirty": False}
    sizes = ", ".join(f"{k} {v}" for k, v in vars(args).items() if k not in ("device", "clock", "precision"))
    print(
        f"{sizes}; {precision}, {args.clock} time; {facts['device_name']}, torch {facts['versions']['torch']}, "
        f"commit {git['commit'][:7]}{' and changes' if git['dirty'] else ''}\n",
        flush=True,
    )
    return args, device


def measured(
    doc: str, compare: Callable[[argparse.Namespace, torch.device], list[Measured]], **sizes: int | str
) -> tuple[argparse.Namespace, list[Measured]]:
    """The arguments of a script, `sizes` among them, and what its `compare` measures with them."""
    args, device = begin(arguments(doc, **sizes))
    return args, compare(args, device)


def random_vit(model: str, image_size: int) -> VisionTransformer:
    """timm's model with seeded random weights, without classifier."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = timm.create_model(model, pretrained=False, num_classes=0, img_size=image_size)
    assert isinstance(vit, VisionTransformer)
    return vit.eval()
