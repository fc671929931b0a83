"""`icons`: 100 concepts, each as many designers drew it: 5,428 icons of 32 pixels, of 112 sets of icons.

The test asks for the concept and not for the style: training and test images are of different designers, as the styles of
ImageNet-R. utils/data/shipped has the file, the authors with their licences, and the script that makes it from a package.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "shipped" / "icons.npz"


def load() -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Class names, training images uint8 [4339, 3, 32, 32], training labels [4339], test images [1089, ...], test labels
    [1089]. Black on white.

    A quarter of the designers is the test set, the same for ever: those whose name has an MD5 digest divisible by 4. Sets
    of one designer, such as heroicons-outline and heroicons-solid, are on one side."""
    with np.load(FILE, allow_pickle=False) as file:
        names, images, labels, sets = (file[key] for key in ("classes", "images", "labels", "sets"))
    is_test = np.array([digest_of_designer(name) % 4 == 0 for name in sets.tolist()])
    images = np.repeat(images[:, None], 3, axis=1)
    return names.tolist(), images[~is_test], labels[~is_test], images[is_test], labels[is_test]


def digest_of_designer(name: str) -> int:
    """A number that depends on the name of a set of icons up to its first hyphen alone."""
    return int(hashlib.md5(name.split("-")[0].encode(), usedforsecurity=False).hexdigest(), 16)
