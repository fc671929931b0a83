"""Are the embedded weights useful? Frozen features against two floors: `python -m benchmarks.floors`.

Features: raw pixels (1,024 grey values, which on fractals are better than 3,072 colour values), the ViT with random
weights, the ViT with the embedded weights.
Measures, in percent of the test images:
    NCM    nearest class mean; chosen: preparation of the features, euclidean or cosine distance
    probe  multinomial logistic regression (at most 200 steps of L-BFGS); chosen: preparation, L2 penalty
The choices are the same for every kind of feature and are decided on a stratified quarter of the TRAINING images; the best
one, fitted on all training images, is then scored once on the test images. `--held-out` stops before the test images.
Takes about 3 minutes on one thread; on a busy machine run it with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import Tensor

from backbone import weights
from utils import data
from utils.config.schema import Experiment
from utils.data.images import ImageArray

SETS = ("digits", "glyphs", "fractals", "icons", "fashion")
KINDS = {"raw pixels": None, "random ViT": "random", "embedded ViT": "pretrained"}  # value: key backbone_weights
PREPARATIONS = ("as they are", "centred", "standardised")
PENALTIES = (
    3.0,
    1.0,
    0.3,
    0.1,
    0.03,
    0.01,
    0.003,
    0.001,
    3e-4,
    1e-4,
    1e-5,
    1e-6,
)  # L2, against the mean loss of a sample
PATIENCE = 2  # penalties without a better held-out accuracy before the smaller ones are left out: they fit slower
ITERATIONS = 200
HELD_OUT, SPLIT_SEED = 0.25, 2026


@dataclass(frozen=True)
class Samples:
    """x float32 [N, D], y int64 [N]."""

    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Choice:
    """A fully specified classifier: nearest class mean with `metric`, or a probe with `penalty`."""

    preparation: str
    metric: str | None = None
    penalty: float | None = None

    def __str__(self) -> str:
        return f"{self.preparation}, {self.metric or f'penalty {self.penalty:g}'}"


def features(kind: str, images: Tensor) -> np.ndarray:
    """float32 [N, D] of uint8 images [N, 3, H, W]."""
    source = KINDS[kind]
    if source is None:
        return images.float().mean(1).flatten(1).numpy() / 255
    any_task = {"model_name": "simplecil", "dataset": "digits", "init_cls": 2, "increment": 2}
    backbone, _ = weights.build(Experiment.model_validate(any_task | {"backbone_weights": source}))
    with torch.inference_mode():
        return torch.cat([backbone(part.float() / 255) for part in images.split(256)]).numpy()


def prepare(train: np.ndarray, test: np.ndarray, preparation: str) -> tuple[np.ndarray, np.ndarray]:
    """Both parts shifted and scaled by what the training part [N, D] says; one common scale unless standardised."""
    shift = 0.0 if preparation == "as they are" else train.mean(0)
    spread = train.std(0)
    scale = np.maximum(spread, 1e-4) if preparation == "standardised" else np.float32(np.sqrt((spread**2).mean()))
    return (train - shift) / scale, (test - shift) / scale


def accuracy(choice: Choice, train: Samples, test: Samples) -> float:
    """Fraction of `test` that `choice`, fitted on `train`, gets right."""
    train_x, test_x = prepare(train.x, test.x, choice.preparation)
    if choice.metric is not None:
        return float((nearest_mean(train_x, train.y, test_x, choice.metric) == test.y).mean())
    assert choice.penalty is not None
    probe = LogisticRegression(C=1 / (choice.penalty * len(train.y)), max_iter=ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the number of steps is part of the probe
        return float(probe.fit(train_x, train.y).score(test_x, test.y))


def nearest_mean(train: np.ndarray, labels: np.ndarray, test: np.ndarray, metric: str) -> np.ndarray:
    """Class [M] of the nearest class mean for each row of test [M, D]; cosine: rows at unit length before averaging."""
    if metric == "cosine":
        train, test = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-8) for x in (train, test))
    classes = np.unique(labels)
    means = np.stack([train[labels == c].mean(0) for c in classes])
    if metric == "cosine":
        means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-8)
    return classes[(test @ means.T - 0.5 * (means**2).sum(1)).argmax(1)]


def choose(train: Samples) -> dict[str, tuple[Choice, float]]:
    """For NCM and probe the choice that does best on the held-out part of `train`, and its accuracy there."""
    fit, held = train_test_split(np.arange(len(train.y)), test_size=HELD_OUT, stratify=train.y, random_state=SPLIT_SEED)
    parts = Samples(train.x[fit], train.y[fit]), Samples(train.x[held], train.y[held])
    means = [Choice(p, metric=m) for p, m in product(PREPARATIONS, ("euclidean", "cosine"))]
    tried = {choice: accuracy(choice, *parts) for choice in means}
    probes: dict[Choice, float] = {}
    for preparation in PREPARATIONS[1:]:  # the probe has a free bias: a shift changes nothing but the solver's speed
        path: list[float] = []
        for penalty in PENALTIES:
            choice = Choice(preparation, penalty=penalty)
            probes[choice] = accuracy(choice, *parts)
            path.append(probes[choice])
            if len(path) - 1 - path.index(max(path)) >= PATIENCE:
                break
    return {name: max(scores.items(), key=lambda item: item[1]) for name, scores in (("NCM", tried), ("probe", probes))}


def measure(name: str, kind: str, held_out: bool) -> dict[str, tuple[float, Choice]]:
    """Accuracy (fraction) and choice for NCM and probe on data set `name`: on its test images, or held-out training."""
    dataset = data.load(name)
    assert isinstance(dataset.train, ImageArray) and isinstance(dataset.test, ImageArray)
    train = Samples(features(kind, dataset.train.images), dataset.train.labels)
    chosen = choose(train)
    if held_out:
        return {measured: (score, choice) for measured, (choice, score) in chosen.items()}
    test = Samples(features(kind, dataset.test.images), dataset.test.labels)
    return {measured: (accuracy(choice, train, test), choice) for measured, (choice, _) in chosen.items()}


def table(results: dict[tuple[str, str], dict[str, tuple[float, Choice]]]) -> str:
    """Markdown: one row a kind of feature, two columns a data set, percent; the choices stand below it."""
    names = list(dict.fromkeys(name for name, _ in results))
    lines = [
        "| features | " + " | ".join(f"{n} NCM | {n} probe" for n in names) + " |",
        "|---" * (1 + 2 * len(names)) + "|",
    ]
    for kind in KINDS:
        cells = [f"{100 * results[n, kind][m][0]:.1f}" for n in names for m in ("NCM", "probe")]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    chosen = [
        f"- {kind}, {name}: " + "; ".join(f"{m} {choice}" for m, (_, choice) in measured.items())
        for (name, kind), measured in results.items()
    ]
    return "\n".join([*lines, "", "Chosen on held-out training images:", "", *chosen])


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    ask = argparse.ArgumentParser(prog="python -m benchmarks.floors", description=__doc__, formatter_class=formatter)
    ask.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    ask.add_argument("--held-out", action="store_true", help="held-out training accuracy; no look at the test images")
    args = ask.parse_args()
    begun = time.monotonic()
    results = {}
    for name, kind in product(args.sets, KINDS):
        print(f"{name}, {kind} ...", file=sys.stderr, flush=True)
        results[name, kind] = measure(name, kind, args.held_out)
    print(table(results))
    print(f"\n{(time.monotonic() - begun) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
