"""`fashion`: 4,000 photographs of clothes in 10 classes, 300 to train and 100 to test of each (Xiao et al. 2017).

utils/data/shipped has the file, its licence, and the script that makes it from the published files.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "shipped" / "fashion.npz"
_BORDER = 2  # pixels around the 28 x 28 of the originals


def load() -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Class names, training images uint8 [3000, 3, 32, 32], training labels [3000], test images [1000, ...], test labels
    [1000]. The originals' grey values in a black border of 2 pixels."""
    with np.load(FILE, allow_pickle=False) as file:
        names = file["classes"].tolist()
        train, test = (_framed(file[key]) for key in ("train", "test"))
        return names, train, file["train_labels"], test, file["test_labels"]


def _framed(grey: np.ndarray) -> np.ndarray:
    border = (_BORDER, _BORDER)
    return np.repeat(np.pad(grey, ((0, 0), border, border))[:, None], 3, axis=1)
