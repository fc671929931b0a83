"""Pre-training of the embedded backbone on formula-made images only: `python -m backbone.pretrain`.

A small timm VisionTransformer learns to tell invented signs (utils/data/strokes.py) and fractals (utils/data/formula.py)
apart; every view is drawn afresh by a helper process. No photograph, digit, letter or font is ever shown to it.

Recipe: cross-entropy over all classes, AdamW, linear warm-up, then a cosine driven by the share of the time budget that
is used up (so a run ends on time on any machine), gradient clipping, bf16 autocast, and an exponential moving average
of the weights, which is what is exported. A checkpoint is written every few minutes; `--resume` goes on from it.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import queue
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from utils.data import formula, strokes

EMBEDDED = Path(__file__).parent / "embedded.safetensors"
ARCHITECTURE: dict[str, Any] = {
    "img_size": formula.SIDE,
    "patch_size": 8,
    "in_chans": 3,
    "num_classes": 0,
    "global_pool": "avg",
    "class_token": False,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
    "weight_init": "jax",  # timm's default start (std .02 everywhere) learns nothing in the first minutes
}
MEAN = STD = (0.5, 0.5, 0.5)  # images enter in [-1, 1]


@dataclass(frozen=True)
class Classes:
    """The formula-made classes of a run; labels run over the signs first, then the fractals."""

    seed: int = 20261
    sign_families: int = 1000
    sign_siblings: int = 2
    fractal_families: int = 400
    fractal_siblings: int = 3

    @property
    def signs(self) -> int:
        return self.sign_families * self.sign_siblings

    @property
    def total(self) -> int:
        return self.signs + self.fractal_families * self.fractal_siblings


@dataclass(frozen=True)
class Settings:
    minutes: float = 75.0  # training time, or
    steps: int | None = None  # number of steps, if given (the schedule is then exactly repeatable)
    batch_size: int = 128
    lr: float = 4e-3  # of Muon (updates scaled to AdamW's size)
    adamw_lr: float = 2e-3  # of the embedding, the norms, the biases and the head
    warmup: float = 0.02  # share of the budget
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    ema_decay: float = 0.999
    sign_share: float = 0.62  # of the views; the rest are fractals
    colour: float = 0.45
    blurred: tuple[float, float] = (0.5, 0.3)  # share of signs, of fractals drawn as if enlarged from few pixels
    erased: float = 0.1
    easy_steps: int = 3000  # steps over which colours and variation grow to their full strength
    bf16: bool = True
    classes: Classes = field(default_factory=Classes)
    architecture: dict[str, Any] = field(default_factory=lambda: dict(ARCHITECTURE))


class ViewSource:
    """Batches of views; batch number `step` depends on nothing but the seed and `step`."""

    def __init__(self, settings: Settings):
        self.settings = settings
        classes = settings.classes
        rng = np.random.RandomState([classes.seed, 0])
        self.signs = strokes.tabulate(strokes.sample_signs(classes.sign_families, classes.sign_siblings, rng))
        rng = np.random.RandomState([classes.seed, 1])
        self.systems = formula.sample_systems(classes.fractal_families, classes.fractal_siblings, rng)

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [B, 3, H, W] and labels int64 [B]."""
        settings, classes = self.settings, self.settings.classes
        rng = np.random.RandomState([classes.seed, 2, step])
        drawn = min(max(round(settings.batch_size * settings.sign_share), 0), settings.batch_size)
        sign = rng.randint(0, classes.signs, drawn)
        fractal = rng.randint(0, classes.total - classes.signs, settings.batch_size - drawn)
        strength = min(0.2 + step / settings.easy_steps, 1.0) if settings.easy_steps else 1.0
        coverage = np.concatenate(
            [
                formula.blur(strokes.draw_signs(self.signs, sign, rng, strength), rng, settings.blurred[0]),
                formula.blur(formula.draw_fractals(self.systems[fractal], rng, strength), rng, settings.blurred[1]),
            ]
        )
        grown = max(0.0, strength * 1.25 - 0.25)  # 0 at the start, 1 at full strength
        images = formula.paint(coverage, rng, settings.colour * grown, 0.2 * grown)
        images = formula.erase(images, rng, settings.erased * grown)
        return images, np.concatenate([sign, fractal + classes.signs]).astype(np.int64)


def _render(settings: Settings, first: int, out: multiprocessing.Queue, parent: int) -> None:
    """The helper process: puts batches first, first + 1, ... into `out` until its parent is gone."""
    source = ViewSource(settings)
    step = first
    batch = source.batch(step)
    while os.getppid() == parent:
        try:
            out.put((step, *batch), timeout=5)
        except queue.Full:
            continue
        step += 1
        batch = source.batch(step)
    out.cancel_join_thread()


def build(architecture: dict[str, Any], classes: int, seed: int) -> VisionTransformer:
    """The random ViT before training: timm's own start, positions from sines and cosines."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VisionTransformer(**{**architecture, "num_classes": classes})
    position = build_sincos2d_pos_embed(list(model.patch_embed.grid_size), dim=model.embed_dim)
    with torch.no_grad():
        model.pos_embed.copy_(position.reshape(model.pos_embed.shape))
        if classes:
            nn.init.normal_(model.head.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    return model


def to_input(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 in [-1, 1], as MEAN and STD say."""
    return images.float() / 127.5 - 1


class Run:
    """Everything a pre-training carries from step to step; `state` and `load` make it resumable."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.model = build(settings.architecture, settings.classes.total, settings.classes.seed)
        hidden = [p for p in self.model.blocks.parameters() if p.ndim == 2]
        taken = {id(p) for p in hidden}
        rest = [p for p in self.model.parameters() if id(p) not in taken]
        self.optimizers = [
            torch.optim.Muon(
                hidden, lr=settings.lr, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(rest, lr=settings.adamw_lr, weight_decay=settings.weight_decay, betas=(0.9, 0.98), fused=True),
        ]
        self.average = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.step, self.seconds = 0, 0.0

    def used(self) -> float:
        """Share of the budget that is used up, 0 to 1."""
        if self.settings.steps is not None:
            return min(self.step / self.settings.steps, 1.0)
        return min(self.seconds / (60 * self.settings.minutes), 1.0)

    def train_step(self, images: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
        """One update; loss and accuracy (fraction) of the batch before it."""
        settings, used = self.settings, self.used()
        rate = min((used + 0.0002) / settings.warmup, 1.0, 0.5 * (1 + math.cos(math.pi * used)))
        for optimizer, full in zip(self.optimizers, (settings.lr, settings.adamw_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * full
        target = torch.from_numpy(labels)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
            logits = self.model(to_input(torch.from_numpy(images)))
        loss = F.cross_entropy(logits.float(), target, label_smoothing=settings.label_smoothing)
        self.model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        decay = min(settings.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            pairs = [(self.average[name], value) for name, value in self.model.state_dict().items()]
            torch._foreach_lerp_([a for a, _ in pairs], [v for _, v in pairs], 1 - decay)
        return float(loss.detach()), float((logits.argmax(1) == target).float().mean())

    def state(self) -> dict[str, Any]:
        return {
            "settings": json.dumps(asdict(self.settings)),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": self.average,
            "step": self.step,
            "seconds": self.seconds,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.average = {name: value.clone() for name, value in state["average"].items()}
        self.step, self.seconds = int(state["step"]), float(state["seconds"])


def save_checkpoint(run: Run, path: Path) -> None:
    """Write beside, then rename: a run that is killed while writing keeps its last checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(run.state(), partial)
    partial.replace(path)


def export(run: Run, path: Path, about: str) -> None:
    """Write the averaged weights without the class head as fp16 safetensors; metadata are strings (JSON inside)."""
    weights = {n: v.half().contiguous() for n, v in run.average.items() if not n.startswith("head.")}
    metadata = {
        "architecture": json.dumps(run.settings.architecture),
        "mean": json.dumps(MEAN),
        "std": json.dumps(STD),
        "about": about,
        "settings": json.dumps(asdict(run.settings)),
        "views": str(run.step * run.settings.batch_size),
        "training_seconds": f"{run.seconds:.0f}",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(weights, partial, metadata)
    partial.replace(path)


def pretrain(settings: Settings, checkpoint: Path, *, resume: bool = False, save_minutes: float = 4.0) -> Run:
    """Train to the end of the budget, with a checkpoint every `save_minutes`; prints one line every 100 steps."""
    run = Run(settings)
    if resume and checkpoint.exists():
        run.load(torch.load(checkpoint, weights_only=True))
        print(f"resumed at step {run.step}, {run.seconds / 60:.1f} minutes trained", flush=True)
    context = multiprocessing.get_context("spawn")
    batches: Any = context.Queue(maxsize=12)
    renderer = context.Process(target=_render, args=(settings, run.step, batches, os.getpid()), daemon=True)
    renderer.start()
    losses: list[float] = []
    hits: list[float] = []
    saved = time.monotonic()
    try:
        images, labels = batches.get(timeout=600)[1:]
        while run.used() < 1:
            begun = time.monotonic()
            loss, hit = run.train_step(images, labels)
            _, images, labels = batches.get(timeout=600)
            run.seconds += time.monotonic() - begun
            losses.append(loss)
            hits.append(hit)
            if run.step % 100 == 0:
                print(
                    f"step {run.step}  {run.seconds / 60:.1f} min ({run.used():.1%})  "
                    f"views {run.step * settings.batch_size}  loss {np.mean(losses):.3f}  accuracy {np.mean(hits):.3f}",
                    flush=True,
                )
                losses, hits = [], []
            if time.monotonic() - saved > 60 * save_minutes:
                save_checkpoint(run, checkpoint)
                saved = time.monotonic()
    finally:
        renderer.terminate()
        renderer.join()
    save_checkpoint(run, checkpoint)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m backbone.pretrain", description=__doc__)
    parser.add_argument("--minutes", type=float, default=Settings.minutes, help="training time (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    parser.add_argument("--out", type=Path, default=EMBEDDED, help="weights file to write (default %(default)s)")
    parser.add_argument("--checkpoint", type=Path, default=Path("logs/pretrain.pt"), help="default %(default)s")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--export-only", action="store_true", help="write the checkpoint's weights and stop")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # for the rendering process
    torch.set_num_threads(args.threads)
    settings = Settings(minutes=args.minutes)
    if args.export_only:
        run = Run(settings)
        run.load(torch.load(args.checkpoint, weights_only=True))
    else:
        run = pretrain(settings, args.checkpoint, resume=args.resume)
    export(run, args.out, "python -m backbone.pretrain: formula-made signs and fractals only")
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB, {run.step * settings.batch_size} views")


if __name__ == "__main__":
    main()
