"""The embedded data set `domains`: ten classes each of digits, glyphs and fractals, so that the domain shifts within a run.

With `shuffle` false the classes come domain by domain. Then it is known at which task a method should detect something new,
which no single data set tells.
"""

from __future__ import annotations

import numpy as np

from utils.data import digits, fractals, glyphs

# Handwriting; the letters A to J; one fractal of each of ten families.
DOMAINS = ((digits, range(10)), (glyphs, range(10)), (fractals, range(0, 40, fractals.SIBLINGS)))


def load() -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Class names, training images uint8 [2638, 3, 32, 32], training labels, test images [709, ...], test labels.

    The images are those of the three data sets, and so are the ValueErrors."""
    names: list[str] = []
    images: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    labels: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for module, classes in DOMAINS:
        class_names, *splits = module.load()
        for split, (all_images, all_labels) in enumerate((splits[:2], splits[2:])):
            chosen = np.isin(all_labels, classes)
            images[split].append(all_images[chosen])
            labels[split].append(len(names) + np.searchsorted(np.asarray(classes), all_labels[chosen]))
        domain = module.__name__.rpartition(".")[2]
        names += [f"{domain} {class_names[c]}" for c in classes]
    train, test = (np.concatenate(of_split) for of_split in images)
    train_labels, test_labels = (np.concatenate(of_split) for of_split in labels)
    return names, train, train_labels, test, test_labels
