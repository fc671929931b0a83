"""`digits`: scikit-learn's 1,797 real handwritten digits (UCI optdigits test set), 1,438 to train and 359 to test."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

TEST_SHARE = 0.2
_SPLIT_SEED = 1797
_INNER, _BORDER = 24, 4  # a black border and no blocks of constant colour, as in the backbone's pre-training


def load() -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Class names, training images uint8 [1438, 3, 32, 32], training labels [1438], test images [359, ...], test labels
    [359].

    The split is fixed: of each class a seeded 20 percent, rounded, is the test set. scikit-learn has no writer identities,
    so training and test images share writers."""
    grey, labels = _raw()
    images = enlarge(grey)
    random = np.random.RandomState(_SPLIT_SEED)  # numpy guarantees this generator's stream for good
    is_test = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        of_class = np.flatnonzero(labels == digit)
        is_test[random.permutation(of_class)[: round(TEST_SHARE * len(of_class))]] = True
    return [str(d) for d in range(10)], images[~is_test], labels[~is_test], images[is_test], labels[is_test]


def _raw() -> tuple[np.ndarray, np.ndarray]:
    """Images [1797, 8, 8] of whole numbers 0..16 and labels, as `load_digits` returns them. They are read from its file,
    because importing scikit-learn takes longer than the first training step."""
    package = importlib.util.find_spec("sklearn")
    for folder in (package.submodule_search_locations or []) if package else []:
        path = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            table = np.loadtxt(path, delimiter=",", dtype=np.int64)
            return table[:, :-1].reshape(-1, 8, 8), table[:, -1]
    from sklearn.datasets import load_digits  # a version with the file at another path

    raw = load_digits()
    return raw.images, np.asarray(raw.target, dtype=np.int64)


def enlarge(grey: np.ndarray) -> np.ndarray:
    """[N, 8, 8] with whole numbers 0..16 to uint8 [N, 3, 32, 32]: bilinear to 24 x 24 in a black border of 4 pixels.

    In whole numbers, because many results lie exactly between two grey values, which floats round up on one machine and down
    on another. Fine pixel k lies at (k - 1) / 3 of the coarse ones."""
    thirds = (np.arange(_INNER) - 1).clip(0)
    low, high, weight = thirds // 3, (thirds // 3 + 1).clip(max=7), thirds % 3
    raw = grey.astype(np.int64)
    rows = raw[:, low] * (3 - weight)[:, None] + raw[:, high] * weight[:, None]
    large = rows[:, :, low] * (3 - weight) + rows[:, :, high] * weight
    framed = np.zeros((len(raw), 1, 32, 32), dtype=np.uint8)
    inner = slice(_BORDER, _BORDER + _INNER)
    framed[:, 0, inner, inner] = (large * 255 + 72) // 144  # 144 = 16 * 3 * 3
    return np.repeat(framed, 3, axis=1)
