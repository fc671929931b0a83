"""Toy parts that many tests share: a tiny random ViT, a tiny data set of coloured noise, a learner over both."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from timm.models.vision_transformer import VisionTransformer

import models
from backbone.vit import SlottedViT
from models.learner.base import SeededInit
from utils import data
from utils.config.strict_json import read_json
from utils.data.dataset import Dataset
from utils.data.images import ImageArray
from utils.data.tasks import TaskStream
from utils.report import page, plots
from utils.run import task
from utils.run.journal import Journal
from utils.run.log import RunLog

torch.set_num_threads(1)  # toy sizes: a second thread only costs


def toy_backbone(seed: int = 0, **other) -> SlottedViT:
    """Depth 3, width 16, 8-pixel images in 4 patches, class token."""
    torch.manual_seed(seed)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 0, **other}
    return SlottedViT(VisionTransformer(**sizes))


def toy_dataset(classes: int = 6, train: int = 10, test: int = 4, seed: int = 0) -> Dataset:
    """Each class is its own mean colour and pattern plus noise: easy, but not trivial."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(40, 215, (classes, 3, 8, 8))

    def draw(count: int) -> ImageArray:
        labels = np.repeat(np.arange(classes), count)
        images = centres[labels] + rng.normal(0, 25, (len(labels), 3, 8, 8))
        return ImageArray(images.clip(0, 255).astype(np.uint8), labels)

    return Dataset("toy", [f"class {c}" for c in range(classes)], draw(train), draw(test), "small")


def toy_stream(dataset: Dataset | None = None, *, init_cls=2, increment=2, seed=1, **other) -> TaskStream:
    return TaskStream(
        dataset or toy_dataset(), init_cls=init_cls, increment=increment, seed=seed, image_size=8, **other
    )


# Small settings that let any method run on the toy set; keys a method does not have are left out.
TOY_SETTINGS = {
    "dataset": "digits", "init_cls": 2, "increment": 2, "batch_size": 8, "init_lr": 0.05, "epochs": 2, "func_epoch": 2,
    "rd_epoch": 2, "rd_lr": 0.01, "ffn_num": 2, "rd_dim": 4, "buffer_size": 30, "detect_batch_size": 8,
    "exp_threshold": 0.5, "adapt_start_layer": 1, "adapt_end_layer": 2, "nested_lora_rank": 2, "num_experts": 3,
    "expert_hidden": 2, "tuned_epoch": 2, "init_epochs": 2, "M": 9, "ffn_adapter_dropout": 0.0,
    "e_prompt_layer_idx": (2,), "prompt_layer_idx": (0, 2), "prompt_param": (6, 2, 0.1),
}  # fmt: skip


def toy_settings(method: str, **other):
    schema = models.settings_of(method)
    values = {k: v for k, v in (TOY_SETTINGS | other).items() if k in schema.model_fields}
    return schema(model_name=method, **values)


def learn_and_score(learner, stream, index, record):
    """One task as main.py does it, without a run folder's journal."""
    task.score(learner, stream, index, record, task.learn(learner, stream, index, record.seed, Journal()))


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


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def timeless(value):
    """The value without what may differ between equal runs: times, speed, memory."""
    if isinstance(value, dict):
        varying = ("time", "seconds", "images_per_second", "peak_memory_bytes", "peak_memory_by_task")
        return {k: timeless(v) for k, v in value.items() if k not in varying}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def assert_same_run(folder, other):
    """Equal results and metrics rows, times and memory apart."""
    assert timeless(read_json(folder / "results.json")[0]) == timeless(read_json(other / "results.json")[0])
    assert timeless(rows_of(folder)) == timeless(rows_of(other))


@pytest.fixture
def log(tmp_path):
    with RunLog(tmp_path / "run", console=False) as made:
        yield made


@pytest.fixture
def toy_learner(log):
    """Builds a learner of any method: toy_learner("sema", exp_threshold=1)."""

    def build(method: str, *, num_classes: int = 6, seed: int = 1, backbone: SlottedViT | None = None, **settings):
        cfg = toy_settings(method, **settings)
        return models.learner_of(method)(cfg, backbone or toy_backbone(), num_classes, SeededInit(seed), log)

    return build


@pytest.fixture
def overlaps(monkeypatch):
    """Function: the pairs of texts that a figure really draws (no ticks beyond the axes) and whose boxes intersect."""
    drawn, draw = [], Text.draw

    def record(self, renderer):
        if self.get_visible() and self.get_text().strip():
            drawn.append((self.get_text(), self.get_window_extent(renderer).padded(-1)))
        draw(self, renderer)

    monkeypatch.setattr(Text, "draw", record)

    def find(figure):
        drawn.clear()
        plots.png(figure)
        assert drawn
        return [
            (a, b)
            for i, (a, x) in enumerate(drawn)
            for b, y in drawn[i + 1 :]
            if x.overlaps(y) and (a, x.bounds) != (b, y.bounds)
        ]

    return find
