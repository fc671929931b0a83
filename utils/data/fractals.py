"""The embedded data set `fractals`: 100 classes of iterated function systems, 25 families of 4 siblings, rendered on load.

The systems are stored (fractals.npy, 25 KB, checked by hash) and disjoint from those the embedded backbone was trained
on: other seeds, and a test compares the parameters. The images are computed with numpy in float64 from seeded draws, so they
are the same on every machine. `python -m utils.data.fractals` writes the stored file again.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from utils.data import formula

FAMILIES, SIBLINGS = 25, 4
TRAIN_PER_CLASS, TEST_PER_CLASS = 60, 20
PARAMETERS = Path(__file__).with_name("fractals.npy")  # float64 [100, maps, 8], columns as in utils/data/formula.py
PARAMETERS_SHA256 = "ca03c7b6509f5d544de13eff80a8dc16bfd531b54ecd16a110156f992694f882"
SEED = 40014  # of the systems (SEED, 0) and of the views of class c (SEED, 1, c)


def load() -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Class names, training images uint8 [6000, 3, 32, 32], labels int64 [6000], test images [2000, ...] and labels.

    Raises ValueError if the stored parameters are not those the published numbers were measured on.
    """
    systems = read_parameters()
    per_class = TRAIN_PER_CLASS + TEST_PER_CLASS
    images = np.empty((len(systems), per_class, 3, formula.SIDE, formula.SIDE), np.uint8)
    for k, system in enumerate(systems):
        images[k] = draw_class(system, k, per_class)
    labels = np.arange(len(systems), dtype=np.int64)
    names = [f"family {k // SIBLINGS + 1:02d} {'abcd'[k % SIBLINGS]}" for k in range(len(systems))]
    train, test = images[:, :TRAIN_PER_CLASS], images[:, TRAIN_PER_CLASS:]
    shape = (-1, 3, formula.SIDE, formula.SIDE)
    return (
        names,
        train.reshape(shape),
        labels.repeat(TRAIN_PER_CLASS),
        test.reshape(shape),
        labels.repeat(TEST_PER_CLASS),
    )


def draw_class(system: np.ndarray, label: int, count: int) -> np.ndarray:
    """`count` views uint8 [count, 3, 32, 32] of one system [maps, 8]; they depend on the label and the system alone."""
    rng = np.random.RandomState([SEED, 1, label])
    coverage = formula.draw_fractals(np.repeat(system[None], count, axis=0), rng)
    return formula.paint(coverage, rng)


def read_parameters(path: Path = PARAMETERS) -> np.ndarray:
    """The stored systems float64 [100, maps, 8]; ValueError if the file was altered."""
    try:
        systems = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: cannot read the parameters of the fractals data set ({error})") from None
    digest = fingerprint(systems)
    if digest != PARAMETERS_SHA256:
        raise ValueError(
            f"{path}: the parameters of the fractals data set were altered (SHA-256 {digest[:16]}..., expected "
            f"{PARAMETERS_SHA256[:16]}...); restore the file from the repository"
        )
    return systems


def fingerprint(systems: np.ndarray) -> str:
    """SHA-256 in hex digits over shape and little-endian values."""
    values = np.ascontiguousarray(systems, dtype="<f8")
    return hashlib.sha256(repr(values.shape).encode() + values.tobytes()).hexdigest()


def make_parameters() -> np.ndarray:
    """Draws families until the fractals of 25 cover between 10 % and 55 % of the image: neither dust nor a blob."""
    rng = np.random.RandomState([SEED, 0])
    chosen: list[np.ndarray] = []
    while len(chosen) < FAMILIES:
        family = formula.sample_systems(1, SIBLINGS, rng)
        filled = formula.draw_fractals(family, np.random.RandomState(SEED), strength=0.0).mean((1, 2))
        if filled.min() > 0.10 and filled.max() < 0.55:
            chosen.append(family)
    return np.concatenate(chosen)


if __name__ == "__main__":
    parameters = make_parameters()
    np.save(PARAMETERS, parameters)
    print(f"{PARAMETERS}: {parameters.shape}, PARAMETERS_SHA256 = {fingerprint(parameters)!r}")
