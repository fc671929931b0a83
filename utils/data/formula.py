"""Images from formulas: fractals of iterated function systems, and functions that colour and degrade any drawing.

A system is a set of contracting affine maps; the points its "chaos game" visits are its picture (Barnsley 1988). Systems
are drawn in the SVD form of Anderson and Farrell, "Improving Fractal Pre-training" (WACV 2022, section 3): a map is
`R(theta) diag(s1, s2) R(phi) diag(d1, d2) x + b`, which makes contraction (s1 < 1) and the fill of the plane directly
controllable. Classes in the manner of FractalDB (Kataoka et al., ACCV 2020). Pen strokes are in utils/data/strokes.py.

Letters: S systems, M maps a system, B images, P points, H = W = the side in pixels. Everything is numpy in float64 with
numpy's frozen legacy generator (RandomState, uniform draws), so the same seed gives the same bytes.
"""

from __future__ import annotations

import numpy as np

SIDE = 32  # pixels; the embedded sets and the embedded backbone share it
THETA, PHI, SCALE_1, SCALE_2, SIGN_1, SIGN_2, OFFSET_X, OFFSET_Y = range(8)  # columns of a map's parameters
MAX_SCALE = 0.96  # largest singular value: the maps stay contractions, so every orbit ends on the attractor


def sample_systems(families: int, siblings: int, rng: np.random.RandomState, max_maps: int = 4) -> np.ndarray:
    """Parameters float64 [families * siblings, max_maps, 8] of contracting systems; siblings stand next to each other.

    The first of a family is drawn afresh with 2 to `max_maps` maps (absent maps have scales 0), the others perturb it.
    """
    systems = np.zeros((families, siblings, max_maps, 8))
    for family in systems:
        count = rng.randint(2, max_maps + 1)
        base = _draw_maps(count, rng)
        for k, member in enumerate(family):
            member[:count] = base if k == 0 else _perturb(base, rng)
    return systems.reshape(families * siblings, max_maps, 8)


def _draw_maps(count: int, rng: np.random.RandomState) -> np.ndarray:
    """One system, [count, 8]; its weighted sum of singular values lies in the band that fills neither dust nor blob."""
    low, high = 0.5 * (5 + count), 0.5 * (6 + count)  # Anderson and Farrell, section 3.2: sum(s1 + 2 s2)
    while True:
        scales = np.sort(rng.random_sample((count, 2)), axis=1)[:, ::-1] * MAX_SCALE
        if low <= (scales[:, 0] + 2 * scales[:, 1]).sum() <= high:
            break
    angles = rng.uniform(-np.pi, np.pi, (count, 2))
    signs = np.where(rng.random_sample((count, 2)) < 0.5, -1.0, 1.0)
    return np.concatenate([angles, scales, signs, rng.uniform(-1, 1, (count, 2))], axis=1)


def _perturb(base: np.ndarray, rng: np.random.RandomState, amount: float = 1.0) -> np.ndarray:
    """A sibling: the same system with its angles (rad), scales (ratio) and offsets moved a little."""
    moved = base.copy()
    shift = rng.uniform(-amount, amount, base.shape)
    moved[..., :2] += 0.45 * shift[..., :2]
    moved[..., 2:4] = np.clip(moved[..., 2:4] * (1 + 0.18 * shift[..., 2:4]), 0.0, MAX_SCALE)
    moved[..., 6:] += 0.3 * shift[..., 6:]
    return moved


def affine_maps(systems: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Parameters [S, M, 8] -> maps [S, M, 6] (a b c d e f: x' = ax + by + e, y' = cx + dy + f), cumulative odds [S, M].

    Odds follow |det|, the share of the attractor's area. Rounded to 1e-9, so the last bit of a machine's sine has no effect.
    """
    cos_t, sin_t = np.cos(systems[..., THETA]), np.sin(systems[..., THETA])
    cos_p, sin_p = np.cos(systems[..., PHI]), np.sin(systems[..., PHI])
    s1, s2, d1, d2 = (systems[..., k] for k in (SCALE_1, SCALE_2, SIGN_1, SIGN_2))
    a = (cos_t * s1 * cos_p - sin_t * s2 * sin_p) * d1
    b = -(cos_t * s1 * sin_p + sin_t * s2 * cos_p) * d2
    c = (sin_t * s1 * cos_p + cos_t * s2 * sin_p) * d1
    d = (cos_t * s2 * cos_p - sin_t * s1 * sin_p) * d2
    maps = np.stack([a, b, c, d, systems[..., OFFSET_X], systems[..., OFFSET_Y]], axis=-1)
    present = s1 > 0
    odds = np.where(present, np.maximum(s1 * s2, 0.02), 0.0)
    odds = np.cumsum(odds, axis=-1)
    return np.round(maps, 9), np.round(odds / odds[..., -1:], 9)


def chaos_game(
    maps: np.ndarray, odds: np.ndarray, rng: np.random.RandomState, chains: int = 96, steps: int = 24, burn: int = 8
) -> np.ndarray:
    """Points float64 [B, chains * (steps - burn), 2] on the attractors of maps [B, M, 6], centred, spread one.

    Many short chains instead of one long one: each step is one numpy operation over all images and chains.
    """
    batch, count = odds.shape
    draws = rng.random_sample((steps, batch, chains))
    picked = (draws[..., None] > odds[None, :, None, :-1]).sum(-1) + (np.arange(batch) * count)[None, :, None]
    table = maps.reshape(-1, 6)
    x, y = np.zeros((batch, chains)), np.zeros((batch, chains))
    visited = np.empty((batch, steps - burn, chains, 2))
    for step in range(steps):
        a, b, c, d, e, f = np.moveaxis(table[picked[step]], -1, 0)
        x, y = a * x + b * y + e, c * x + d * y + f
        if step >= burn:
            visited[:, step - burn, :, 0], visited[:, step - burn, :, 1] = x, y
    points = visited.reshape(batch, -1, 2)
    points = points - np.round(points.mean(1, keepdims=True), 6)
    spread = np.sqrt((points * points).mean((1, 2)))
    return points / np.round(np.maximum(spread, 1e-3), 6)[:, None, None]


def rasterise(points: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Coverage in [0, 1], [B, side, side]: how often the points [B, P, 2] (pixels, x right, y down) hit each pixel."""
    batch = len(points)
    cell = np.floor(points).astype(np.int64)
    inside = ((cell >= 0) & (cell < side)).all(-1)
    flat = (np.arange(batch)[:, None] * side + cell[..., 1]) * side + cell[..., 0]
    counts = np.bincount(flat[inside], minlength=batch * side * side).reshape(batch, side, side)
    table = np.round(1 - 0.5 ** np.arange(12.0), 6)  # saturating, so that a rare branch is seen beside a dense core
    return table[np.minimum(counts, 11)]


def view_transforms(
    batch: int, rng: np.random.RandomState, rotation: float, scale: tuple[float, float], shear: float, shift: float
) -> np.ndarray:
    """Affine maps [B, 6] of random views: rotation and shear (rad, up to +-), scale (from, to; axes differ by 15 %), shift."""
    turn = rng.uniform(-rotation, rotation, batch)
    lean = rng.uniform(-shear, shear, batch)
    size = rng.uniform(*scale, batch)
    ratio = rng.uniform(0.85, 1.18, batch)
    move = rng.uniform(-shift, shift, (batch, 2))
    cos, sin = np.cos(turn), np.sin(turn)
    a, b = size * ratio * cos, size * (ratio * cos * lean - sin / ratio)
    c, d = size * ratio * sin, size * (ratio * sin * lean + cos / ratio)
    return np.round(np.stack([a, b, c, d, move[:, 0], move[:, 1]], -1), 6)


def move_points(points: np.ndarray, views: np.ndarray) -> np.ndarray:
    """Points [B, P, 2] under views [B, 6]; written out, because a matrix product may round differently elsewhere."""
    a, b, c, d, e, f = (views[:, k, None] for k in range(6))
    x, y = points[..., 0], points[..., 1]
    return np.stack([a * x + b * y + e, c * x + d * y + f], axis=-1)


def draw_fractals(
    systems: np.ndarray, rng: np.random.RandomState, strength: float = 1.0, side: int = SIDE
) -> np.ndarray:
    """One random view of each system [B, M, 8] as coverage [B, side, side]; `strength` (0 to 1) scales the variation."""
    varied = np.where(systems[..., 2:3] > 0, _perturb(systems, rng, 0.15 * strength), systems)
    points = chaos_game(*affine_maps(varied), rng)
    scale = (0.17 * side, 0.27 * side)
    views = view_transforms(len(systems), rng, 0.35 * strength, scale, 0.15 * strength, 0.09 * side * strength)
    return rasterise(move_points(points, views) + side / 2, side)


def paint(coverage: np.ndarray, rng: np.random.RandomState, colour: float = 0.5, flips: float = 0.2) -> np.ndarray:
    """Coverage [B, H, W] -> uint8 [B, 3, H, W]: a share `colour` in two random colours apart, the rest in greys.

    Greys are mostly light on black, a share `flips` of them the other way round.
    """
    batch = len(coverage)
    grey = rng.random_sample(batch) >= colour
    back, ink = rng.random_sample((batch, 3)), rng.random_sample((batch, 3))
    apart = np.round(ink.mean(1) - back.mean(1), 6)
    weak = np.abs(apart) < 0.3  # push two colours of like brightness apart, or the drawing could not be seen
    sign = np.where(apart >= 0, 1.0, -1.0)
    ink = np.where(weak[:, None], np.clip(ink + 0.4 * sign[:, None], 0, 1), ink)
    back = np.where(weak[:, None], np.clip(back - 0.4 * sign[:, None], 0, 1), back)
    dark, light = 0.15 * rng.random_sample(batch) ** 2, 1 - 0.3 * rng.random_sample(batch)
    flipped = rng.random_sample(batch) < flips
    back = np.where(grey[:, None], np.where(flipped, light, dark)[:, None], back)
    ink = np.where(grey[:, None], np.where(flipped, dark, light)[:, None], ink)
    images = back[:, :, None, None] + (ink - back)[:, :, None, None] * coverage[:, None]
    return np.floor(images * 255 + 0.5).astype(np.uint8)


def erase(images: np.ndarray, rng: np.random.RandomState, odds: float) -> np.ndarray:
    """Fill one random rectangle (up to 40 % of the side) of a share `odds` of the images [B, 3, H, W] with noise."""
    side = images.shape[-1]
    for k in np.flatnonzero(rng.random_sample(len(images)) < odds):
        height, width = rng.randint(side // 8, side * 2 // 5 + 1, 2)
        top, left = rng.randint(0, side - height + 1), rng.randint(0, side - width + 1)
        images[k, :, top : top + height, left : left + width] = rng.randint(0, 256, (3, 1, 1))
    return images


def blur_matrices(side: int = SIDE) -> np.ndarray:
    """Matrices [K, side, side] that average a row into cells of 1, 2, 3 and 4 pixels and interpolate it back linearly.

    `M image M^T` looks like a small picture enlarged to `side`, as scanned digits of 8 x 8 pixels are.
    """
    matrices = [np.eye(side)]
    for cell in (2, 3, 4):
        border = (side % cell) // 2 if side % cell else 0
        count = side // cell
        edges = border + cell * np.arange(count)
        down = np.zeros((count, side))
        for k, edge in enumerate(edges):
            down[k, edge : edge + cell] = 1 / cell
        position = np.clip((np.arange(side) + 0.5 - border) / cell - 0.5, 0, count - 1)
        left = np.minimum(np.floor(position).astype(int), count - 2)
        up = np.zeros((side, count))
        up[np.arange(side), left] = 1 - (position - left)
        up[np.arange(side), left + 1] += position - left
        matrices.append(up @ down)
    return np.stack(matrices)


def blur(coverage: np.ndarray, rng: np.random.RandomState, odds: float) -> np.ndarray:
    """Coverage [B, H, W], a share `odds` of it as if enlarged from cells of 2 to 4 pixels."""
    matrices = blur_matrices(coverage.shape[-1])
    kind = np.where(rng.random_sample(len(coverage)) < odds, rng.randint(1, len(matrices), len(coverage)), 0)
    out = coverage.copy()
    for k in range(1, len(matrices)):
        chosen = kind == k
        out[chosen] = matrices[k] @ coverage[chosen] @ matrices[k].T
    return out
