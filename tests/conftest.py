"""Fixtures that tests of several rooms use."""

import math
import signal

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

import models
from backbone.vit import SlottedViT
from commands import load
from tests.helpers.toy import toy_backbone, toy_settings
from utils.data import cifar
from utils.data.dataset import Dataset
from utils.data.images import ImageFiles
from utils.process import interrupt
from utils.report import plots
from utils.run.log import RunLog

torch.set_num_threads(1)  # toy sizes: a second thread only costs
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts what it puts into the background so
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_signal_before(monkeypatch):
    """A signal that an earlier test of this process raised does not silence those of this test."""
    monkeypatch.setattr(interrupt, "_raised", -math.inf)


@pytest.fixture(autouse=True)
def one_run_at_a_time(monkeypatch):
    """A test that runs several seeds in this process does not start processes for them, whatever cores are free."""
    monkeypatch.setattr(load, "jobs_by_default", lambda loaded, args: 1)


@pytest.fixture
def log(tmp_path):
    with RunLog(tmp_path / "run", console=False) as made:
        yield made


@pytest.fixture
def toy_learner(log):
    """Builds a learner of any method: toy_learner("sema", exp_threshold=1)."""

    def build(method: str, *, num_classes: int = 6, seed: int = 1, backbone: SlottedViT | None = None, **settings):
        cfg = toy_settings(method, **settings)
        return models.build(cfg, backbone or toy_backbone(), num_classes, seed, log)

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


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """Eleven images of different sizes in two classes."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.RandomState(0)
    paths = [folder / f"{k}.png" for k in range(11)]
    for k, path in enumerate(paths):
        Image.fromarray(random.randint(0, 256, (40 + k, 60 - k, 3), dtype=np.uint8)).save(path)
    images = ImageFiles(paths, [k % 2 for k in range(11)])
    return Dataset("disk", ["a", "b"], images, images, "imagenet")


# -------------------------------------------------------------------------------------------------- CIFAR


@pytest.fixture
def few(monkeypatch):
    """Ten training and four test images instead of the official counts."""
    monkeypatch.setattr(cifar, "TRAIN_IMAGES", 10)
    monkeypatch.setattr(cifar, "TEST_IMAGES", 4)
    random = np.random.RandomState(0)
    return random.randint(0, 256, (14, 3072), dtype=np.uint8), random.randint(0, 100, 14)
