"""Tiny runs of the whole program, and how two of them are compared."""

import itertools
import json
from dataclasses import replace

import torch

import main
import models
from utils import data
from utils.config.strict_json import read_json
from utils.data.dataset import Dataset
from utils.data.images import ImageArray
from utils.process import interrupt
from utils.report import page
from utils.run import checkpoint

# ---------------------------------------------------------------- runs of the whole program

# two tasks on some digits over a random ViT of 16 px: a run of any method takes about a second
TINY = {
    "about": "a tiny run", "dataset": "digits", "init_cls": 5, "increment": 5, "seed": [3], "backbone_weights": "random",
    "image_size": 16, "batch_size": 32, "epochs": 1, "func_epoch": 1, "rd_epoch": 1, "init_lr": 0.05, "rd_lr": 0.01,
    "ffn_num": 4, "rd_dim": 4, "exp_threshold": 0.5, "num_experts": 2, "expert_hidden": 2,
    "novelty_confidence": 0.0, "tuned_epoch": 1, "init_epochs": 1, "M": 20, "device": "cpu",
}  # fmt: skip


def few_digits() -> Dataset:
    """Eight training and four test images of each digit."""
    whole = data._embedded(data.DATASETS["digits"])

    def first(images, count):
        rows = torch.cat([torch.from_numpy(images.labels == c).nonzero().flatten()[:count] for c in range(10)])
        return ImageArray(images.images[rows].numpy(), images.labels[rows.numpy()])

    return replace(whole, train=first(whole.train, 8), test=first(whole.test, 4))


def tiny_experiment(method, place, monkeypatch, **settings) -> list[str]:
    """Arguments of main.py for a tiny run of `method`, whose file lies in `place`; keys it does not have are left out."""
    dataset = few_digits()
    monkeypatch.setattr(data, "load", lambda *args, **options: dataset)
    monkeypatch.setattr(page, "write_report", lambda *args, **options: None)  # most of the time of so small a run
    known = models.settings_of(method).model_fields
    values = {k: v for k, v in (TINY | {"model_name": method} | settings).items() if k in known}
    path = place / f"{method}.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return ["--config", str(path)]


def stopped_again_and_again(run, out, monkeypatch):
    """The same command until it ends, where every fourth question whether to stop is answered yes: (exit code, stops)."""
    questions = itertools.count(1)
    monkeypatch.setattr(interrupt, "stop_requested", lambda: next(questions) % 4 == 0)
    stops = 0
    while (code := main.main([*run, "--out", str(out)])) == 75:
        stops += 1
        assert stops < 200
    return code, stops


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def timeless(value):
    """The value without what may differ between equal runs: times, speed, memory, and the digest over them."""
    if isinstance(value, dict):
        varying = ("time", "seconds", "images_per_second", "peak_memory_bytes", "peak_memory_by_task", "digest")
        varying += ("cpu_seconds", "cpu_hours", "gpu_hours")
        return {k: timeless(v) for k, v in value.items() if k not in varying}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def assert_same_run(folder, other):
    """Equal results and metrics rows, times and memory apart."""
    assert timeless(read_json(folder / "results.json")[0]) == timeless(read_json(other / "results.json")[0])
    assert timeless(rows_of(folder)) == timeless(rows_of(other))


def tiny_run(method, place, monkeypatch, **settings):
    """The folder of a finished run of `method` under `place`, and its learner at the end."""
    kept = []

    def keep(folder, task, learner, *rest, write=checkpoint.save):
        kept.append(learner)
        write(folder, task, learner, *rest)

    run = tiny_experiment(method, place, monkeypatch, **settings)
    monkeypatch.setattr(checkpoint, "save", keep)
    assert main.main([*run, "--out", str(place / "logs")]) == 0
    (folder,) = (place / "logs" / method).glob("*/seed_3")
    return folder, kept[-1]
