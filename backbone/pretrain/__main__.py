"""Pre-training of the embedded backbone on formula-made images only: `python -m backbone.pretrain`.

A small timm VisionTransformer learns to tell invented signs (utils/data/strokes.py) and fractals (utils/data/formula.py)
apart; every view is drawn afresh by a helper process. No photograph, digit, letter or font is ever shown to it.

Recipe: cross-entropy over all classes, Muon for the blocks' matrices (Jordan et al. 2024; with AdamW for everything the
loss had hardly moved after 64,000 views, with Muon it had after 25,000), AdamW for the rest, linear warm-up, then a
cosine driven by the share of the time budget that is used up (so a run ends on time on any machine), gradient clipping,
bf16 autocast, and an exponential moving average of the weights, which is what is exported, its stream rescaled
(backbone/pretrain/export.py). A checkpoint is written every few minutes; `--resume` goes on from it.

What was run: `python -m backbone.pretrain` with these settings on a busy machine of 2 CPU cores, one thread to train and
one to draw: 54 minutes, 8,012 steps, 1,025,536 views; at the end 84 % of the views, of 3,200 classes, named rightly. Not
repeatable to the bit: the schedule follows the clock, the first 4 minutes had two threads (four times slower in
contention), and the budget was 75 minutes for the first 20. What it gave, in percent of the test images of data it never
saw (`python -m benchmarks.floors`; NCM nearest class mean, probe logistic regression, choices on held-out training data):

    features       digits NCM  probe   glyphs NCM  probe   fractals NCM  probe
    raw pixels           90.5   96.4         42.1   60.0           18.7   18.9
    random ViT           67.4   93.9          6.3   23.1            1.9    5.0
    embedded ViT         98.1   99.2         98.1   99.7           96.2   98.5
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

from backbone.pretrain.export import export, to_input
from utils.data import formula
from utils.data.views import Views, render

EMBEDDED = Path(__file__).parents[1] / "embedded.safetensors"
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


@dataclass(frozen=True)
class Settings:
    minutes: float = 54.0  # training time, or
    steps: int | None = None  # number of steps, if set (the schedule is then exactly repeatable)
    batch_size: int = 128
    lr: float = 4e-3  # of Muon (updates scaled to AdamW's size)
    adamw_lr: float = 2e-3  # of the embedding, the norms, the biases and the head
    warmup: float = 0.02  # share of the budget
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    ema_decay: float = 0.999
    bf16: bool = True
    views: Views = field(default_factory=Views)
    architecture: dict[str, Any] = field(default_factory=lambda: dict(ARCHITECTURE))


def build(architecture: dict[str, Any], classes: int, seed: int) -> VisionTransformer:
    """The random ViT before training: timm's start values, positions from sines and cosines."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VisionTransformer(**{**architecture, "num_classes": classes})
    position = build_sincos2d_pos_embed(list(model.patch_embed.grid_size), dim=model.embed_dim)
    assert model.pos_embed is not None
    with torch.no_grad():
        model.pos_embed.copy_(position.reshape(model.pos_embed.shape))
        if isinstance(model.head, nn.Linear):
            nn.init.normal_(model.head.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    return model


class Run:
    """Everything a pre-training carries from step to step; `state` and `load` make it resumable."""

    def __init__(self, settings: Settings):
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(
                f"pre-training needs torch 2.9 or newer for its optimizer Muon, this is {torch.__version__}"
            )
        self.settings = settings
        self.model = build(settings.architecture, settings.views.classes, settings.views.seed)
        hidden = [p for p in self.model.blocks.parameters() if p.ndim == 2]
        taken = {id(p) for p in hidden}
        rest = [p for p in self.model.parameters() if id(p) not in taken]
        self.optimizers = [
            torch.optim.Muon(
                hidden, lr=settings.lr, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(
                rest, lr=settings.adamw_lr, weight_decay=settings.weight_decay, betas=(0.9, 0.98), fused=True
            ),
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
        """Plain numbers, strings and tensors only, so that it loads with `weights_only=True`."""
        return {
            "settings": json.dumps(asdict(self.settings)),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": self.average,
            "step": self.step,
            "seconds": self.seconds,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the state is of other settings; only the budget may have changed."""
        saved, current = json.loads(state["settings"]), json.loads(json.dumps(asdict(self.settings)))
        budget = ("minutes", "steps")
        other = sorted(k for k in saved.keys() | current.keys() if k not in budget and saved.get(k) != current.get(k))
        if other:
            raise ValueError(f"the checkpoint has another {', '.join(other)}; choose another --checkpoint")
        self.model.load_state_dict(state["model"])
        for optimizer, saved_optimizer in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved_optimizer)
        self.average = {name: value.clone() for name, value in state["average"].items()}
        self.step, self.seconds = int(state["step"]), float(state["seconds"])


def save_checkpoint(run: Run, path: Path) -> None:
    """Write beside, then rename: a run that is killed while writing keeps its last checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(run.state(), partial)
    partial.replace(path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, loaded without executing anything. Raises ValueError if it is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}; train without --export-only, or name another --checkpoint")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, torch.serialization.pickle.UnpicklingError):
        raise ValueError(f"{path} is damaged or no checkpoint of a pre-training; train without --resume") from None


def pretrain(settings: Settings, checkpoint: Path, *, resume: bool = False, save_minutes: float = 4.0) -> Run:
    """Train to the end of the budget, with a checkpoint every `save_minutes`; prints one line every 100 steps."""
    run = Run(settings)
    if resume and checkpoint.exists():
        run.load(read_checkpoint(checkpoint))
        print(f"resumed at step {run.step}, {run.seconds / 60:.1f} minutes trained", flush=True)
    context = multiprocessing.get_context("spawn")
    batches: Any = context.Queue(maxsize=12)
    job = (settings.views, settings.batch_size, run.step, batches, os.getpid())
    renderer = context.Process(target=render, args=job, daemon=True)
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
    formatter = argparse.RawDescriptionHelpFormatter
    ask = argparse.ArgumentParser(prog="python -m backbone.pretrain", description=__doc__, formatter_class=formatter)
    ask.add_argument("--minutes", type=float, default=Settings.minutes, help="training time (default %(default)s)")
    ask.add_argument("--threads", type=int, default=1, help="CPU threads of training (default %(default)s)")
    ask.add_argument("--out", type=Path, default=EMBEDDED, help="weights file to write (default %(default)s)")
    ask.add_argument("--checkpoint", type=Path, default=Path("logs/pretrain.pt"), help="default %(default)s")
    ask.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    ask.add_argument("--export-only", action="store_true", help="write the checkpoint's weights and stop")
    args = ask.parse_args()
    if args.minutes <= 0 or args.threads < 1:
        ask.error("--minutes must be above 0 and --threads at least 1")
    os.environ["OMP_NUM_THREADS"] = "1"  # for the rendering process
    torch.set_num_threads(args.threads)
    try:
        if not args.export_only:
            pretrain(Settings(minutes=args.minutes), args.checkpoint, resume=args.resume)
        state = read_checkpoint(args.checkpoint)
    except ValueError as error:
        ask.error(str(error))
    export(state, args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB, {state['step']} steps")


if __name__ == "__main__":
    main()
