"""Pen strokes from formulas: invented signs of lines, polylines, curves and closed contours, with a hand's variation.

A sign is a set of control points and strokes over them. Every stroke kind is linear in its control points, so a whole
class is one matrix `basis [P, Q]` that turns Q control points into P points along the pen's path; strokes that meet
share a control point and still meet after the points are moved. No fonts, no handwriting: only random numbers.

Letters: S signs, B images, P points, Q control points, H = W = the side in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from utils.data.formula import SIDE, move_points, view_transforms

POINTS = 112  # pen positions a sign: about one a pixel for the longest
CONTROLS = 24  # control points a sign at most
KINDS = ("line", "polyline", "bezier", "spline", "arc", "closed", "dot")
KIND_ODDS = (0.30, 0.14, 0.16, 0.14, 0.12, 0.10, 0.04)


@dataclass(frozen=True)
class Stroke:
    kind: str  # straight, curve, spline or closed: how its control points are joined
    controls: tuple[int, ...]  # indices into the sign's control points


@dataclass(frozen=True)
class Sign:
    controls: np.ndarray  # [<= CONTROLS, 2] in about [-1, 1], y down
    strokes: tuple[Stroke, ...]


def sample_signs(families: int, siblings: int, rng: np.random.RandomState) -> list[Sign]:
    """families * siblings signs; siblings stand next to each other and differ in one stroke or one control point."""
    signs = []
    for _ in range(families):
        base = _draw_sign(rng)
        signs.append(base)
        signs.extend(_sibling(base, rng) for _ in range(siblings - 1))
    return signs


def _draw_sign(rng: np.random.RandomState) -> Sign:
    sign = Sign(np.zeros((0, 2)), ())
    for _ in range(rng.choice([1, 2, 3, 4], p=[0.2, 0.35, 0.3, 0.15])):
        sign = _add_stroke(sign, rng)
    return _fitted(sign)


def _add_stroke(sign: Sign, rng: np.random.RandomState) -> Sign:
    """The sign with one more random stroke; usually it starts at an existing control point."""
    name = rng.choice(KINDS, p=KIND_ODDS)
    snapped = rng.random_sample() < 0.5  # half of the strokes on a coarse grid: upright, level and diagonal lines
    count = {"line": 2, "polyline": rng.randint(3, 6), "bezier": rng.randint(3, 5), "spline": rng.randint(4, 7)}
    if name in ("arc", "closed"):
        angles, radius = rng.uniform(0, 2 * np.pi), rng.uniform(0.35, 1.0, 2) * (0.6 if sign.strokes else 1.0)
        span = 2 * np.pi * 7 / 8 if name == "closed" else rng.uniform(0.7, 1.8) * np.pi
        turn = angles + np.linspace(0, span, 8 if name == "closed" else 6)
        wave = np.ones_like(turn)
        if rng.random_sample() < 0.4:  # a radial contour: harmonics on the circle
            wave = 1 + rng.uniform(0.1, 0.35) * np.cos(rng.randint(2, 5) * turn + rng.uniform(0, 2 * np.pi))
        points = np.stack([radius[0] * np.cos(turn), radius[1] * np.sin(turn)], -1) * wave[:, None]
        points = points + rng.uniform(-0.5, 0.5, 2)
    elif name == "dot":
        points = rng.uniform(-0.9, 0.9, (1, 2)) + np.array([[0, 0], [0.02, 0.02]])
    else:
        points = rng.uniform(-1, 1, (count[name], 2))
        if snapped:
            points = np.round(points * 2) / 2
        if name == "line" and np.abs(points[0] - points[1]).sum() < 0.6:
            points[1] = points[0] + np.array([[1.2, 0], [0, 1.2], [0.9, 0.9], [0.9, -0.9]])[rng.randint(4)]
    indices = list(range(len(sign.controls), len(sign.controls) + len(points)))
    if len(sign.controls) and name != "dot" and rng.random_sample() < 0.7:
        anchor = rng.randint(len(sign.controls))
        if name in ("arc", "closed"):
            points = points + sign.controls[anchor] - points[0]
        else:
            indices, points = [anchor, *[i - 1 for i in indices[1:]]], points[1:]
    if len(sign.controls) + len(points) > CONTROLS:
        return sign
    kind = {"bezier": "curve", "spline": "spline", "arc": "spline", "closed": "closed"}.get(name, "straight")
    return Sign(np.concatenate([sign.controls, points]), (*sign.strokes, Stroke(kind, tuple(indices))))


def _sibling(base: Sign, rng: np.random.RandomState) -> Sign:
    """`base` with one stroke more, one stroke less, or one control point moved by at least 0.4."""
    change = rng.randint(3)
    if change == 0:
        return _fitted(_add_stroke(base, rng))
    if change == 1 and len(base.strokes) > 1:
        gone = rng.randint(len(base.strokes))
        return _fitted(Sign(base.controls, tuple(s for k, s in enumerate(base.strokes) if k != gone)))
    controls = base.controls.copy()
    used = sorted({i for stroke in base.strokes for i in stroke.controls})
    direction = rng.uniform(0, 2 * np.pi)
    controls[rng.choice(used)] += rng.uniform(0.4, 0.9) * np.array([np.cos(direction), np.sin(direction)])
    return _fitted(Sign(controls, base.strokes))


def _fitted(sign: Sign) -> Sign:
    """The sign moved and scaled into [-1, 1]; its height and width keep their ratio."""
    used = sign.controls[sorted({i for stroke in sign.strokes for i in stroke.controls})]
    low, high = used.min(0), used.max(0)
    size = max(float((high - low).max()), 0.5)
    return Sign((sign.controls - (low + high) / 2) / (size / 2), sign.strokes)


def _stroke_basis(kind: str, count: int, points: int) -> np.ndarray:
    """Matrix [points, count]: control points -> points along the stroke."""
    t = np.linspace(0, 1, points)
    if kind == "curve":  # Bernstein polynomials of degree count - 1
        n = count - 1
        binomial = np.array([np.prod([(n - j) / (j + 1) for j in range(k)]) for k in range(count)])
        return binomial * t[:, None] ** np.arange(count) * (1 - t[:, None]) ** (n - np.arange(count))
    segments = count if kind == "closed" else count - 1
    position = t * segments
    left = np.minimum(np.floor(position).astype(int), segments - 1)
    f = position - left
    rows, basis = np.arange(points), np.zeros((points, count))
    if kind == "straight":
        basis[rows, left] += 1 - f
        basis[rows, left + 1] += f
        return basis
    weights = np.stack(  # Catmull-Rom: through every control point, smooth there
        [-f + 2 * f**2 - f**3, 2 - 5 * f**2 + 3 * f**3, f + 4 * f**2 - 3 * f**3, -(f**2) + f**3], -1
    )
    for k in range(4):
        at = left + k - 1
        at = at % count if kind == "closed" else np.clip(at, 0, count - 1)
        np.add.at(basis, (rows, at), weights[:, k] / 2)
    return basis


@dataclass(frozen=True)
class SignTable:
    """Signs as arrays: basis float32 [S, P, Q], controls float32 [S, Q, 2], first float32 [S, P] (1 at a stroke's start)."""

    basis: np.ndarray
    controls: np.ndarray
    first: np.ndarray


def tabulate(signs: list[Sign]) -> SignTable:
    """Signs as arrays; the P points are distributed over the strokes by length."""
    basis = np.zeros((len(signs), POINTS, CONTROLS), np.float32)
    controls = np.zeros((len(signs), CONTROLS, 2), np.float32)
    first = np.zeros((len(signs), POINTS), np.float32)
    for s, sign in enumerate(signs):
        controls[s, : len(sign.controls)] = sign.controls
        lengths = [_length(sign.controls[list(stroke.controls)], stroke.kind) for stroke in sign.strokes]
        shares = np.cumsum([0.0, *lengths]) / sum(lengths)
        marks = np.round(shares * (POINTS - 3 * len(lengths))).astype(int) + 3 * np.arange(len(lengths) + 1)
        for stroke, begin, end in zip(sign.strokes, marks[:-1], marks[1:], strict=True):
            along = _stroke_basis(stroke.kind, len(stroke.controls), end - begin)
            np.add.at(basis[s, begin:end].T, np.array(stroke.controls), along.T)  # a control point may occur twice
            first[s, begin] = 1
    return SignTable(basis, controls, first)


def _length(points: np.ndarray, kind: str) -> float:
    steps = np.diff(np.concatenate([points, points[:1]]) if kind == "closed" else points, axis=0)
    return float(np.sqrt((steps**2).sum(1)).sum()) + 1e-3


def draw_signs(
    table: SignTable, labels: np.ndarray, rng: np.random.RandomState, strength: float = 1.0, side: int = SIDE
) -> np.ndarray:
    """One random drawing of each sign in labels [B] as coverage [B, side, side] in [0, 1].

    Varied: control points (a hand's jitter), rotation, shear, size, position, pen width, the pen's slant (broad-nib contrast
    as in type), softness of the edge. `strength` (0 to 1) scales the variation of the shape.
    """
    batch = len(labels)
    jitter = strength * rng.uniform(0.01, 0.11, (batch, 1, 1)) * rng.standard_normal((batch, CONTROLS, 2))
    path = table.basis[labels] @ (table.controls[labels] + jitter.astype(np.float32))
    scale = ((0.4 - 0.16 * strength) * side, 0.43 * side)
    views = view_transforms(batch, rng, 0.3 * strength, scale, 0.35 * strength, 0.08 * side * strength)
    path = move_points(path, views).astype(np.float32)
    path += np.float32(side / 2)
    width = np.exp(rng.uniform(np.log(0.45), np.log(2.3), (batch, 1))) * side / 32  # pen radius, pixels
    contrast, nib = (
        rng.uniform(0, 0.6, (batch, 1)) * (rng.random_sample((batch, 1)) < 0.6),
        rng.uniform(0, np.pi, (batch, 1)),
    )
    step = np.diff(path, axis=1, append=path[:, -1:])
    step = np.where(np.roll(table.first[labels], -1, axis=1)[..., None] > 0, np.roll(step, 1, axis=1), step)
    angle = np.arctan2(step[..., 1], step[..., 0])
    radius = (width * (1 + contrast * np.cos(2 * (angle - nib)))).astype(np.float32)
    soft = rng.uniform(0.5, 1.3, (batch, 1, 1)).astype(np.float32)
    return np.clip(0.5 + _depth(path, radius, side).reshape(batch, side, side) / soft, 0, 1)


def _depth(path: np.ndarray, radius: np.ndarray, side: int) -> np.ndarray:
    """How far each pixel centre lies inside the pen's trace (pixels, negative outside): [B, side * side]."""
    centre = np.arange(side, dtype=np.float32) + 0.5
    out = np.empty((len(path), side * side), np.float32)
    for k, (points, reach) in enumerate(zip(path, radius, strict=True)):  # one image fits the cache, a batch does not
        dx = (points[:, 0, None] - centre) ** 2
        dy = (points[:, 1, None] - centre) ** 2
        distance = np.sqrt(dy[:, :, None] + dx[:, None, :])
        out[k] = (reach[:, None, None] - distance).max(0).reshape(-1)
    return out
