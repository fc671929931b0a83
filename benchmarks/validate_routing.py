"""One routed pass of a finished run equals the N-pass loop over its experts: `python -m benchmarks.validate_routing RUN`.

On a draw of the run's training images, in float32 and float64, with the experts and routers of the finished run:
- each routed layer, on its input in the network: its one pass against sum_e g_e expert_e(x), where every expert runs alone
  with gate 1 (for experts on linear layers the sum is taken in each of these layers, where the experts are mixed);
- the whole network: one pass with one-hot gates for expert e against the network that has only expert e.
Features of N networks averaged are another model (the layers above are not linear) and are not compared. Then time and peak
memory of one routed pass and of N passes, measured as in benchmarks/routing.py.
Prints Markdown. Exit codes: 0 all equal to 1e-10 in float64, relative to the largest output; 1 not so; 2 not such a run.
Shapes: B batch, N tokens, D width, E experts.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from backbone.adapters.lora import TARGETS
from backbone.experts.moe import SparseMoE
from backbone.experts.routed import RoutedLinears, RoutedSlot
from backbone.vit import SlottedViT
from benchmarks.routing import MIB, forward, in_turn, interleaved, peak_memory
from commands import saved
from utils.process.machine import environment, pick_device

METHODS = ("dylora_moe", "sparse_moe")
LIMIT = 1e-10  # largest relative difference in float64
DTYPES = (torch.float32, torch.float64)
Slot = RoutedSlot | SparseMoE


class Difference(NamedTuple):
    """`absolute`: largest difference of two outputs; `relative`: the same over the largest value of the second."""

    absolute: float
    relative: float


def difference(one: Tensor, other: Tensor) -> Difference:
    absolute, largest = float((one - other).abs().max()), float(other.abs().max())
    return Difference(absolute, absolute / largest if largest else absolute)


# Each kind of routed slot: its experts, its gates, the slow way, and a network with one expert only --------------------


def routed_slots(backbone: SlottedViT) -> dict[int, Slot]:
    """The routed slots by layer. Raises ValueError where there are none."""
    slots: dict[int, Slot] = {int(n): s for n, s in backbone.slots.items() if isinstance(s, RoutedSlot | SparseMoE)}
    if not slots:
        raise ValueError("the network has no layer of routed experts")
    return dict(sorted(slots.items()))


def experts_of(slot: Slot) -> list[nn.Module]:
    return list(slot.adapters if isinstance(slot, RoutedSlot) else slot.experts)


def gates_of(slot: Slot, x: Tensor, routed: Tensor | None = None) -> Tensor:
    """Gates of the experts of a slot that reads x [B, N, D]: [B, N, E], or [B, E] for whole images. `routed` are those of a
    shared router; without them the slot's router decides, and without a router all are 1."""
    if isinstance(slot, SparseMoE):
        return slot.forward_with_routing(x)[1].gates
    if routed is not None:
        return routed
    return slot.router(x).gates if slot.router is not None else x.new_ones(len(x), len(slot))


def by_loop(slot: Slot, inputs: tuple[Any, ...]) -> Tensor:
    """The slot's output [B, N, D] with its experts run one after the other, for the arguments it is called with."""
    gates, experts = gates_of(slot, *inputs[:2]), experts_of(slot)
    gates = gates.unsqueeze(1) if gates.dim() == 2 else gates

    def weighted(experts: list[nn.Module], x: Tensor) -> Tensor:
        return torch.stack([gates[..., e : e + 1] * expert(x) for e, expert in enumerate(experts)]).sum(dim=0)

    if not isinstance(slot, RoutedLinears):
        return weighted(experts, inputs[0])
    x, _, block = inputs

    def adding(loras: list[nn.Module]) -> Callable[..., Tensor]:
        return lambda linear, z, output: output + weighted(loras, z[0])

    hooks = [
        block.get_submodule(TARGETS[target]).register_forward_hook(
            adding([bundle[target] for bundle in slot.experts()])
        )
        for target in slot.experts()[0].targets
    ]
    try:
        return block(x)
    finally:
        for hook in hooks:
            hook.remove()


def with_only(backbone: SlottedViT, expert: int) -> SlottedViT:
    """A network over the same frozen ViT that has this expert alone in every layer, with gate 1, and no router."""
    single: SlottedViT = copy.deepcopy(backbone, {id(backbone.vit): backbone.vit})
    single.router = None
    for layer, slot in routed_slots(single).items():
        alone = experts_of(slot)[expert]
        if isinstance(slot, RoutedLinears):
            inside = RoutedLinears()
            inside.add(alone)
            single.fill(layer, inside.eval())
        else:
            single.fill(layer, alone)
    return single


def one_hot_pass(backbone: SlottedViT, images: Tensor, gates: list[Tensor], expert: int) -> Tensor:
    """Features [B, D] from one pass of the routed network with gate 1 for this expert and 0 for the others. `gates`: the
    router's gates, for their shapes. Changes the network, a copy: sparse layers, which route themselves, stay fixed."""
    sparse = [slot for slot in routed_slots(backbone).values() if isinstance(slot, SparseMoE)]
    for slot in sparse:
        slot.fix(expert)
    if sparse:
        return backbone(images)
    chosen = [torch.zeros_like(g) for g in gates]
    for gate in chosen:
        gate[..., expert] = 1
    return backbone(images, route=lambda x: chosen)


# The comparison --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def compare(backbone: SlottedViT, images: Tensor, dtype: torch.dtype) -> dict[str, Difference]:
    """Every comparison by name, in one precision, on a copy of the network. images [B, 3, H, W]."""
    network: SlottedViT = copy.deepcopy(backbone).to(dtype).eval()
    slots = routed_slots(network)
    calls: dict[int, tuple[tuple[Any, ...], Tensor]] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            calls[layer] = inputs, output

        return hook

    hooks = [slot.register_forward_hook(keep(layer)) for layer, slot in slots.items()]
    network(images)
    for hook in hooks:
        hook.remove()
    differences = {}
    for layer, slot in slots.items():
        inputs, output = calls[layer]
        differences[f"layer {layer}: one pass, loop over experts"] = difference(output, by_loop(slot, inputs))
    gates = [gates_of(slot, *calls[layer][0][:2]) for layer, slot in slots.items()]
    for expert in range(len(experts_of(next(iter(slots.values()))))):
        alone = with_only(network, expert)(images)
        one_hot = one_hot_pass(network, images, gates, expert)
        differences[f"features: one-hot gates, network of expert {expert} alone"] = difference(one_hot, alone)
    return differences


def table(results: dict[torch.dtype, dict[str, Difference]]) -> str:
    titles = [
        f"{str(d).removeprefix('torch.')}, {kind}" for d in results for kind in ("largest difference", "relative")
    ]
    lines = [f"| compared | {' | '.join(titles)} |", "|---" * (1 + len(titles)) + "|"]
    for name in next(iter(results.values())):
        cells = [f"{value:.1e}" for differences in results.values() for value in differences[name]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def costs(backbone: SlottedViT, images: Tensor, rounds: int) -> str:
    """Time and peak memory of inference: N passes, each with one expert, and one routed pass."""
    count = len(experts_of(next(iter(routed_slots(backbone).values()))))
    runs = [
        in_turn([forward(with_only(backbone, e), images) for e in range(count)]),
        forward(backbone, images),
    ]
    interleaved(runs, 1, images.device)
    peaks = [peak_memory(run, images.device) / MIB for run in runs]
    seconds = interleaved(runs, rounds, images.device)
    times = [1000 * statistics.median(of_way) for of_way in seconds]
    ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
    return (
        "| float32 inference | ms | peak MiB |\n|---|---|---|\n"
        f"| {count} passes, one expert each | {times[0]:.1f} | {peaks[0]:.2f} |\n"
        f"| one routed pass | {times[1]:.1f} | {peaks[1]:.2f} |\n"
        f"| N passes over one pass | {ratio:.2f}x | {peaks[0] / peaks[1]:.2f}x |"
    )


def validate(run: saved.SavedRun, count: int, rounds: int) -> bool:
    """Prints all tables. Returns whether everything is equal."""
    learner, device = run.learner, next(run.learner.backbone.vit.parameters()).device
    task = run.stream.task(run.task, with_past=True)
    images = next(iter(task.train.join(*task.past).batches(count, draw="validate", augment=False)))[0].to(device)
    slots = routed_slots(learner.backbone)
    facts = environment(device)
    keys = ("router_scope", "router_granularity", "use_moe_routing", "top_k_experts", "fixed_routing", "lora_target")
    values = learner.cfg.model_dump()
    settings = ", ".join(f"{key} {values[key]}" for key in keys if key in values)
    print(
        f"{learner.cfg.model_name} on {learner.cfg.dataset} after task {run.task + 1} of {len(run.stream)}: "
        f"{len(experts_of(next(iter(slots.values()))))} experts in layers {', '.join(map(str, slots))}; {settings}.\n"
        f"{len(images)} training images; {facts['device_name']}, {facts['threads']} threads, "
        f"torch {facts['versions']['torch']}.\n"
    )
    results = {dtype: compare(learner.backbone, images, dtype) for dtype in DTYPES}
    print(table(results) + "\n")
    print(costs(learner.backbone, images, rounds) + "\n")
    worst = max((d.relative for d in results[torch.float64].values()), key=lambda r: (r != r, r))  # NaN is the worst
    equal = worst <= LIMIT
    print(f"Largest relative difference in float64: {worst:.1e}, {'within' if equal else 'ABOVE'} {LIMIT:g}.")
    return equal


def main(argv: list[str] | None = None) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler prints to stderr
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("run", type=Path, metavar="RUN", help="folder of a run: OUT/<config name>/<hash>/seed_<seed>")
    ask.add_argument("--images", type=int, default=32)
    ask.add_argument("--rounds", type=int, default=5, help="of the timing")
    ask.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    ask.add_argument("--data-root", help="where the data are, if not where the run had them")
    args = ask.parse_args(argv)
    try:
        device = pick_device(args.device)
        run = saved.load(args.run, device, args.data_root)
        if (method := cast(Any, run.learner.cfg).model_name) not in METHODS:
            raise ValueError(f"{args.run} is a run of {method}; routed experts are those of {' and '.join(METHODS)}")
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if validate(run, args.images, args.rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
