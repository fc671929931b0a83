"""Images per second on a GPU, and the share of its matrix rate that is used: `python -m benchmarks.gpu --device cuda`.

ViT-B/16 at 224 px in bf16 (`precision`): the forward pass of the bare frozen timm network; training of one adapter in each of
the last layers; training of K competing adapters. The matrix rate is that of products of large matrices in the same precision.
A way's share of it is the number of floating-point operations that torch counts in a step (forward and backward, a
multiply-add is two) divided by the step's time and the matrix rate.
`--run N` adds a whole SEMA run of 10 tasks over N generated training images of 100 classes at about 32 px, which the
transform enlarges as it does CIFAR-100's. Runs on a CPU too, where its numbers mean little.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from backbone import precision as computing
from backbone.adapters.adapter import Adapter
from backbone.adapters.nested import NestedLoRAAdapter
from backbone.timm_vit import VisionTransformer
from backbone.vit import SlottedViT
from benchmarks import measure, sema_run
from benchmarks.routing import CLASSES, LAYERS, MIB, Run, interleaved, peak_memory, with_slots
from models.learner.start_values import SeededInit
from utils.data.tasks import TaskStream
from utils.process.seeds import named_generator

RANK, GOAL = 16, 0.6


def matrix_rate(device: torch.device, size: int, dtype: torch.dtype, repeats: int = 10) -> float:
    """Floating-point operations per second of [size, size] products."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def run() -> object:
        for _ in range(repeats):
            c = a @ b
        return c

    run()
    return repeats * 2 * size**3 / statistics.median(interleaved([run], 5, device)[0])


def operations(run: Run) -> int:
    """Floating-point operations of one run as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def networks(vit: VisionTransformer, count: int, device: torch.device) -> dict[str, tuple[SlottedViT, int]]:
    """By name: a backbone over the shared ViT, and the number of branches in its training."""
    draws = named_generator("benchmark", "experts")
    alone = with_slots(vit, [Adapter(vit.embed_dim, RANK) for _ in range(LAYERS)])
    competing = with_slots(vit, [NestedLoRAAdapter(vit.embed_dim, RANK, count) for _ in range(LAYERS)])
    for slot in [*alone.slots.values(), *competing.slots.values()]:
        slot.reset_parameters(draws)  # type: ignore[operator]
    for slot in competing.slots.values():
        slot.use(branches=True)  # type: ignore[operator]
    trained = {"training, one adapter": (alone, 1), f"training, {count} competing": (competing, count)}
    for backbone, _ in trained.values():
        backbone.slots.requires_grad_(True)
        backbone.to(device)
    return trained


def step(backbone: SlottedViT, images: torch.Tensor, branches: int) -> Run:
    """One training step of the slots under a fixed random head."""
    draws = named_generator("benchmark", "gpu")
    labels = torch.randint(CLASSES, (branches * len(images),), generator=draws).to(images.device)
    head = torch.randn(backbone.width, CLASSES, generator=draws).to(images.device) / backbone.width**0.5
    optimizer = torch.optim.SGD(backbone.slots.parameters(), lr=1e-3, momentum=0.9)

    def run() -> None:
        F.cross_entropy(backbone(images, branches=branches) @ head, labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def throughput(
    model: str, image_size: int, batch: int, count: int, rounds: int, device: torch.device, precision: str, rate: float
) -> list[tuple[str, float, float, float]]:
    """(what, images/s, share of the matrix rate, peak MiB) of each way; the first is the bare network."""
    vit = measure.random_vit(model, image_size).to(device)
    images = torch.rand(batch, 3, *vit.patch_embed.img_size, generator=named_generator("benchmark", "images")).to(
        device
    )
    kind = torch.bfloat16 if precision == "bf16" else torch.float32

    def bare() -> torch.Tensor:
        with torch.inference_mode(), torch.autocast(device.type, kind, enabled=precision == "bf16"):
            return vit.forward_head(vit.forward_features(images), pre_logits=True)

    ways: dict[str, Run] = {"bare frozen forward": bare}
    for name, (backbone, branches) in networks(vit, count, device).items():
        computing.prepare(backbone, precision)  # type: ignore[arg-type]
        ways[name] = step(backbone, images, branches)
    for run in ways.values():
        run()  # kernels are chosen and compiled before the clock starts
    seconds = [statistics.median(of_way) for of_way in interleaved(list(ways.values()), rounds, device)]
    return [
        (name, batch / spent, operations(run) / spent / rate, peak_memory(run, device) / MIB)
        for (name, run), spent in zip(ways.items(), seconds, strict=True)
    ]


def whole_run(
    model: str, image_size: int, batch: int, images: int, tasks: int, device: torch.device, precision: str
) -> float:
    """Seconds of a SEMA run over generated images of 32 px."""
    classes = 10 * tasks
    dataset = sema_run.patterns(classes, images // classes, max(1, images // classes // 5), 32)
    keys: dict[str, object] = {"precision": precision, "prefix_cache_gb": 32.0, "batch_size": batch}
    plan = {"func_epoch": 5, "rd_epoch": 20, "batch_size": batch, "rd_dim": 128, "increment": 10}
    cfg = sema_run.settings(plan, **keys)
    backbone = SlottedViT(measure.random_vit(model, image_size)).to(device)
    stream = TaskStream(
        dataset, init_cls=10, increment=10, seed=1, image_size=backbone.vit.patch_embed.img_size[0], device=device
    )
    start = time.perf_counter()
    sema_run.ours(cfg, backbone, stream, SeededInit(1))
    return time.perf_counter() - start


def main() -> None:
    ask = measure.arguments(__doc__ or "", model="vit_base_patch16_224", image_size=224, batch=128, count=4, size=8192)
    ask.add_argument("--precision", choices=("bf16", "tf32", "fp32"), default="bf16")
    ask.add_argument("--run", type=int, default=0, metavar="N", help="training images of the whole run; 0: none")
    args, device = measure.begin(ask)
    kind = torch.bfloat16 if args.precision == "bf16" else torch.float32
    rate = matrix_rate(device, args.size, kind)
    print(f"products of [{args.size}, {args.size}]: {rate / 1e12:.2f} TFLOP/s\n")
    print("| what | images/s | of the bare forward | of the matrix rate | peak, MiB |\n|---|---|---|---|---|")
    rows = throughput(args.model, args.image_size, args.batch, args.count, args.rounds, device, args.precision, rate)
    for name, speed, share, peak in rows:
        print(f"| {name} | {speed:.1f} | {100 * speed / rows[0][1]:.0f} % | {100 * share:.0f} % | {peak:.0f} |")
    reached = rows[1][1] / rows[0][1]
    met = "met" if reached >= GOAL else "NOT MET"
    print(f"\n- training at {100 * reached:.0f} % of the bare forward's images/s, goal {100 * GOAL:.0f} %: {met}")
    if args.run:
        spent = whole_run(args.model, args.image_size, args.batch, args.run, 10, device, args.precision)
        print(f"- a whole SEMA run, 10 tasks, {args.run} training images: {spent:.0f} s")


if __name__ == "__main__":
    main()
