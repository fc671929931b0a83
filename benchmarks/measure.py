"""Times ways to do the same thing against each other, in rounds: what all speed benchmarks share.

In every round each way runs once, each round beginning with another. Times are medians over the rounds; ratios are medians of
each round's own ratio to the first way, so that what slows a round slows both sides. `--clock processor` (the default on the
CPU) counts the time this process computes instead of the wall clock's: for cores that others use too. Peak memory is the most
that is allocated during a run beyond what was there before, see benchmarks/routing.py.
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
        """How many times faster than another way, by round."""
        return statistics.median(a / b for a, b in zip(first.seconds, self.seconds, strict=True))


def compare(ways: Sequence[Way], rounds: int, device: torch.device, clock: str) -> list[Measured]:
    """All ways in turn; each has run twice before the clock starts."""
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
    return [Measured(way.name, own, peak) for way, own, peak in zip(ways, seconds, peaks, strict=True)]


def table(groups: dict[str, list[Measured]]) -> str:
    """A Markdown row for each way of each group; the first of a group is what the others are compared with."""
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
    """A parser with the sizes of a benchmark and how it is measured."""
    ask = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in defaults.items():
        ask.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    ask.add_argument("--rounds", type=int, default=5)
    ask.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    ask.add_argument("--device", default="cpu", help="auto, cpu or cuda")
    ask.add_argument("--clock", choices=CLOCKS, help="wall or processor; processor on the CPU if not given")
    return ask


def begin(ask: argparse.ArgumentParser) -> tuple[argparse.Namespace, torch.device]:
    """The arguments and the device; says what is measured and on what machine."""
    args = ask.parse_args()
    torch.set_num_threads(args.threads)
    device, _ = pick_device(args.device)
    args.clock = args.clock or ("processor" if device.type == "cpu" else "wall")
    if device.type != "cpu" and args.clock != "wall":
        ask.error("--clock processor does not see what a GPU computes; take wall")
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
    doc: str, compare: Callable[..., list[Measured]], **sizes: int | str
) -> tuple[argparse.Namespace, list[Measured]]:
    """A script's arguments, and what its `compare` finds at the sizes asked for."""
    args, device = begin(arguments(doc, **sizes))
    own = {name: getattr(args, name) for name in sizes}
    return args, compare(**own, rounds=args.rounds, device=device, clock=args.clock)


def random_vit(model: str, image_size: int) -> VisionTransformer:
    """timm's model with seeded random weights, without classifier."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = timm.create_model(model, pretrained=False, num_classes=0, img_size=image_size)
    assert isinstance(vit, VisionTransformer)
    return vit.eval()
