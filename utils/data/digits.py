"""`digits`: scikit-learn's 1,797 real handwritten digits (UCI optdigits test set), 1,438 to train and 359 to test."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

TEST_SHARE = 0.2
_SPLIT_SEED = 1797
_INNER, _BORDER = 24, 4  # a black border, and no blocks of constant colour, suits the pre-training: design section 9


def load() -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Class names, train images uint8 [1438, 3, 32, 32], train labels [1438], test images [359, ...], test labels
    [359].

    The split is fixed: of each class a seeded 20 percent, rounded, is the test set. scikit-learn ships no writer
    identities, so writers are shared between the two parts."""
    grey, labels = _raw()
    images = enlarge(grey)
    random = np.random.RandomState(_SPLIT_SEED)  # numpy guarantees this generator's stream for good
    held = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        own = np.flatnonzero(labels == digit)
        held[random.permutation(own)[: round(TEST_SHARE * len(own))]] = True
    return [str(d) for d in range(10)], images[~held], labels[~held], images[held], labels[held]


def _raw() -> tuple[np.ndarray, np.ndarray]:
    """Images [1797, 8, 8] of whole numbers 0..16 and labels, as `load_digits` gives them: from the file it reads, since
    importing scikit-learn takes longer than the first training step after it."""
    found = importlib.util.find_spec("sklearn")
    for place in (found.submodule_search_locations or []) if found else []:
        path = Path(place) / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            table = np.loadtxt(path, delimiter=",", dtype=np.int64)
            return table[:, :-1].reshape(-1, 8, 8), table[:, -1]
    from sklearn.datasets import load_digits  # a version that keeps it elsewhere

    raw = load_digits()
    return raw.images, np.asarray(raw.target, dtype=np.int64)


def enlarge(grey: np.ndarray) -> np.ndarray:
    """[N, 8, 8] with whole numbers 0..16 to uint8 [N, 3, 32, 32]: bilinear to 24 x 24 in a black border of 4 pixels.

    In whole numbers, because many results lie exactly between two grey values, where one machine's floats round up and
    another's down: fine pixel k lies at (k - 1) / 3 of the coarse ones."""
    thirds = (np.arange(_INNER) - 1).clip(0)
    low, high, part = thirds // 3, (thirds // 3 + 1).clip(max=7), thirds % 3
    raw = grey.astype(np.int64)
    rows = raw[:, low] * (3 - part)[:, None] + raw[:, high] * part[:, None]
    large = rows[:, :, low] * (3 - part) + rows[:, :, high] * part
    framed = np.zeros((len(raw), 1, 32, 32), dtype=np.uint8)
    inner = slice(_BORDER, _BORDER + _INNER)
    framed[:, 0, inner, inner] = (large * 255 + 72) // 144  # 144 = 16 * 3 * 3
    return np.repeat(framed, 3, axis=1)
