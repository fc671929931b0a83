"""A mixture of experts as a loop and as the kernel of backbone/adapters/adapter.py: `python -m benchmarks.kernel`.

The loop runs one expert after the other and adds up their gated outputs. `forward` is inference; `backward` is the gradient
of a fixed cotangent with respect to the input and all parameters, without the forward pass. Shapes: B batch, N tokens,
D width, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backbone.adapters.adapter import Adapter, mixture
from benchmarks import measure
from benchmarks.measure import Measured, Way
from utils.process.seeds import named_generator


def loop(x: Tensor, experts: Sequence[Adapter], gates: Tensor) -> Tensor:
    """x [B, N, D], gates [B, E] -> [B, N, D]."""
    y = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        y = y + gates[:, e, None, None] * expert(x)
    return y


def compare(
    batch: int, tokens: int, width: int, rank: int, count: int, rounds: int, device: torch.device, clock: str
) -> dict[str, list[Measured]]:
    generator = named_generator("benchmark", "kernel")
    experts = [Adapter(width, rank) for _ in range(count)]
    for expert in experts:
        expert.reset_parameters(generator)
        torch.nn.init.normal_(expert.up_proj.weight, std=0.02, generator=generator)
        expert.to(device)
    x = torch.randn(batch, tokens, width, generator=generator).to(device).requires_grad_(True)
    gates = torch.rand(batch, count, generator=generator).to(device).requires_grad_(True)
    cotangent = torch.randn(batch, tokens, width, generator=generator).to(device)
    inputs = [x, gates, *(p for expert in experts for p in expert.parameters())]

    def forward(way):
        def run() -> Tensor:
            with torch.inference_mode():
                return way(x, experts, gates)

        return run

    def backward(way):
        y = way(x, experts, gates)
        return lambda: torch.autograd.grad(y, inputs, cotangent, retain_graph=True)

    return {
        phase: measure.compare([Way("loop", make(loop)), Way("kernel", make(mixture))], rounds, device, clock)
        for phase, make in (("forward", forward), ("backward", backward))
    }


def main() -> None:
    ask = measure.arguments(__doc__ or "", batch=8, tokens=197, width=768, rank=16, experts=4)
    args, device = measure.begin(ask)
    results = compare(args.batch, args.tokens, args.width, args.rank, args.experts, args.rounds, device, args.clock)
    print(measure.table(results) + "\n")
    for (phase, (plain, ours)), required in zip(results.items(), (4, 3), strict=True):
        print(measure.verdict(phase, ours.faster(plain), required))


if __name__ == "__main__":
    main()
