"""The labelled images computed from formulas on which the embedded backbone was trained: invented signs and fractals.

A view is one random drawing of a class. Labels number the signs first, then the fractals. Views are easy at first (little
variation, no colour) and reach full strength after `easy_steps` batches: with full variation from the start the backbone
learned nothing for a long time.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
from dataclasses import dataclass

import numpy as np

from utils.data import formula, strokes


@dataclass(frozen=True)
class Views:
    """Which classes there are and how their views are drawn."""

    seed: int = 20261
    sign_families: int = 1000
    sign_siblings: int = 2
    fractal_families: int = 400
    fractal_siblings: int = 3
    sign_share: float = 0.62  # of the views; the rest are fractals
    colour: float = 0.45  # share of two-coloured views; the rest are grey
    blurred: tuple[float, float] = (0.5, 0.3)  # share of signs, of fractals drawn as if enlarged from few pixels
    erased: float = 0.1  # share of views with a rectangle of noise
    easy_steps: int = 3000  # batches over which colours and variation grow to their full strength

    @property
    def signs(self) -> int:
        return self.sign_families * self.sign_siblings

    @property
    def classes(self) -> int:
        return self.signs + self.fractal_families * self.fractal_siblings


class ViewSource:
    """Batches of views; batch number `step` depends on `views`, the batch size and `step` alone."""

    def __init__(self, views: Views, batch_size: int):
        self.views, self.batch_size = views, batch_size
        rng = np.random.RandomState([views.seed, 0])
        self.signs = strokes.tabulate(strokes.sample_signs(views.sign_families, views.sign_siblings, rng))
        rng = np.random.RandomState([views.seed, 1])
        self.systems = formula.sample_systems(views.fractal_families, views.fractal_siblings, rng)

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [B, 3, H, W] and labels int64 [B]: the signs of the batch, then its fractals."""
        views = self.views
        rng = np.random.RandomState([views.seed, 2, step])
        drawn = min(max(round(self.batch_size * views.sign_share), 0), self.batch_size)
        sign = rng.randint(0, views.signs, drawn)
        fractal = rng.randint(0, views.classes - views.signs, self.batch_size - drawn)
        strength = min(0.2 + step / views.easy_steps, 1.0) if views.easy_steps else 1.0
        coverage = np.concatenate(
            [
                formula.blur(strokes.draw_signs(self.signs, sign, rng, strength), rng, views.blurred[0]),
                formula.blur(formula.draw_fractals(self.systems[fractal], rng, strength), rng, views.blurred[1]),
            ]
        )
        grown = max(0.0, strength * 1.25 - 0.25)  # 0 at the start, 1 at full strength
        images = formula.paint(coverage, rng, views.colour * grown, 0.2 * grown)
        images = formula.erase(images, rng, views.erased * grown)
        return images, np.concatenate([sign, fractal + views.signs]).astype(np.int64)


def render(views: Views, batch_size: int, first: int, out: multiprocessing.Queue, parent: int) -> None:
    """The work of a helper process: puts (step, images, labels) for first, first + 1, ... into `out` until the process with
    id `parent` has ended."""
    source = ViewSource(views, batch_size)
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
