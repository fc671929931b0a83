"""The embedded data set `domains`: ten classes each of digits, glyphs and fractals, so that the domain shifts on the way.

With `shuffle` false the classes come domain by domain: where a method should see something new is known, which within one
data set nobody knows.
"""

from __future__ import annotations

import numpy as np

from utils.data import digits, fractals, glyphs

# Handwriting; the letters A to J; one fractal of each of ten families.
PARTS = ((digits, range(10)), (glyphs, range(10)), (fractals, range(0, 40, fractals.SIBLINGS)))


def load() -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Class names, train images uint8 [2638, 3, 32, 32], train labels, test images [709, ...], test labels.

    The images are those of the three data sets. Raises their ValueErrors."""
    names: list[str] = []
    images: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    labels: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for module, classes in PARTS:
        known, *splits = module.load()
        for split, (pictures, owners) in enumerate((splits[:2], splits[2:])):
            own = np.isin(owners, classes)
            images[split].append(pictures[own])
            labels[split].append(len(names) + np.searchsorted(np.asarray(classes), owners[own]))
        domain = module.__name__.rpartition(".")[2]
        names += [f"{domain} {known[c]}" for c in classes]
    (train, test), (train_labels, test_labels) = ([np.concatenate(p) for p in parts] for parts in (images, labels))
    return names, train, train_labels, test, test_labels
