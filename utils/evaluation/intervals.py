"""The interval of an accuracy that was measured on n test images."""

from __future__ import annotations

import math

Z95 = 1.959963984540054  # 0.975 quantile of the standard normal distribution


def wilson(correct: int, images: int, z: float = Z95) -> tuple[float, float] | None:
    """The ends of the score interval of a share `correct / images`, as fractions (Wilson, 1927, "Probable inference, the law
    of succession, and statistical inference", JASA 22); 95 % by default, None without images.

    (p + z^2/2n -+ z sqrt(p (1-p)/n + z^2/4n^2)) / (1 + z^2/n). Unlike p -+ z sqrt(p (1-p)/n) it stays within [0, 1] and has a
    width at p = 0 and p = 1. It says how much a fixed model's accuracy may differ on other test images of the same kind; it
    does not contain the difference between seeds."""
    if not images:
        return None
    p, share = correct / images, z * z / images
    centre, half = p + share / 2, z * math.sqrt(p * (1 - p) / images + share / (4 * images))
    return max(0.0, (centre - half) / (1 + share)), min(1.0, (centre + half) / (1 + share))
