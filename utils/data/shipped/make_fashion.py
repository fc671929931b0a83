"""Makes fashion.npz again: `python -m utils.data.shipped.make_fashion FOLDER`.

FOLDER has the four .gz files of Fashion-MNIST (Xiao, Rasul and Vollgraf, arXiv 1708.07747), from its repository
https://github.com/zalandoresearch/fashion-mnist or from Debian's package dataset-fashion-mnist. The file has the first 300
training and the first 100 test images of each class, as they are: 28 x 28 grey values.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
CLASSES = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
TRAIN_PER_CLASS, TEST_PER_CLASS = 300, 100


def first_of_each_class(folder: Path, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [10 count, 28, 28] and labels, class by class: the first `count` of each in the files of `split`."""
    images = np.frombuffer(
        gzip.decompress((folder / f"{split}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16
    )
    labels = np.frombuffer(gzip.decompress((folder / f"{split}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    rows = np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(len(CLASSES))])
    return images.reshape(-1, 28, 28)[rows], labels[rows].astype(np.int64)


def make(folder: Path, to: Path = HERE) -> None:
    """Writes fashion.npz to `to`."""
    train, train_labels = first_of_each_class(folder, "train", TRAIN_PER_CLASS)
    test, test_labels = first_of_each_class(folder, "t10k", TEST_PER_CLASS)
    np.savez_compressed(
        to / "fashion.npz",
        classes=np.array(CLASSES),
        train=train,
        train_labels=train_labels,
        test=test,
        test_labels=test_labels,
    )


if __name__ == "__main__":
    make(Path(sys.argv[1]))
