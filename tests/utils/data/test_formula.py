"""Formula-made images: same seed same bytes, contracting systems, correct maps and strokes, drawings on the canvas."""

import hashlib

import numpy as np
import pytest

from utils.data import formula, strokes
from utils.data.views import Views, ViewSource

SMALL = Views(sign_families=6, sign_siblings=2, fractal_families=3, fractal_siblings=2, easy_steps=10)


def systems(seed: int = 0, families: int = 20, siblings: int = 3) -> np.ndarray:
    return formula.sample_systems(families, siblings, np.random.RandomState(seed))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others():
    def bytes_of(seed: int, step: int) -> str:
        views = Views(**{**vars(SMALL), "seed": seed})
        images, labels = ViewSource(views, 40).batch(step)
        return hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()

    assert bytes_of(5, 20) == bytes_of(5, 20)
    assert len({bytes_of(5, 20), bytes_of(6, 20), bytes_of(5, 21)}) == 3


def test_a_batch_does_not_depend_on_the_batches_before_it():
    source = ViewSource(SMALL, 24)
    source.batch(0)
    late, fresh = source.batch(30), ViewSource(SMALL, 24).batch(30)
    assert np.array_equal(late[0], fresh[0]) and np.array_equal(late[1], fresh[1])


def test_batches_have_the_promised_shapes_types_and_labels():
    images, labels = ViewSource(SMALL, 50).batch(100)
    assert images.shape == (50, 3, 32, 32) and images.dtype == np.uint8
    assert labels.shape == (50,) and labels.dtype == np.int64
    assert (labels[:31] < 12).all()  # 62 % signs of 12 classes, then fractals of 6
    assert ((labels[31:] >= 12) & (labels[31:] < 18)).all() and SMALL.classes == 18


def test_early_views_are_grey_and_full_strength_views_are_partly_coloured():
    def coloured(step: int) -> float:
        images, _ = ViewSource(SMALL, 200).batch(step)
        return float((images[:, :1] != images).any((1, 2, 3)).mean())

    assert coloured(0) == 0
    assert 0.35 < coloured(50) < 0.65  # colour 0.45 and rectangles of coloured noise in 0.1


def test_sampled_systems_contract():
    drawn = systems()
    maps, odds = formula.affine_maps(drawn)
    largest = np.linalg.svd(maps[..., :4].reshape(*maps.shape[:2], 2, 2), compute_uv=False)[..., 0]
    assert largest.max() < 1
    scales = drawn[..., formula.SCALE_1]
    assert np.allclose(largest, np.maximum(scales, drawn[..., formula.SCALE_2]), atol=1e-7)  # the SVD form is one
    assert (np.diff(odds, axis=-1) >= 0).all() and (odds[..., -1] == 1).all()
    assert ((scales > 0).sum(1) >= 2).all()


def test_a_map_is_the_product_of_its_svd_form():
    theta, phi, s1, s2, d1, d2 = 0.4, -1.1, 0.7, 0.3, -1.0, 1.0
    maps, _ = formula.affine_maps(np.array([[[theta, phi, s1, s2, d1, d2, 0.25, -0.5]]]))

    def turn(angle: float) -> np.ndarray:
        return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])

    expected = turn(theta) @ np.diag([s1, s2]) @ turn(phi) @ np.diag([d1, d2])
    assert np.allclose(maps[0, 0], [*expected.reshape(-1), 0.25, -0.5], atol=1e-9)


def test_siblings_differ_from_each_other_but_less_than_families_do():
    drawn = systems(families=30, siblings=2)
    pairs = np.abs(drawn[0::2] - drawn[1::2]).max((1, 2))
    strangers = np.abs(drawn[0:-2:2] - drawn[2::2]).max((1, 2))
    assert pairs.min() > 0 and pairs.max() < strangers.min()


def test_the_chaos_game_finds_the_sierpinski_triangle():
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    maps = np.array([[[0.5, 0, 0, 0.5, *corner / 2] for corner in corners]])
    odds = np.array([[1 / 3, 2 / 3, 1.0]])
    points = formula.chaos_game(maps, odds, np.random.RandomState(0), chains=200, steps=40, burn=20)[0]
    assert np.allclose(points.mean(0), 0, atol=1e-5) and np.isclose((points**2).mean(), 1, atol=1e-4)
    unit = (points - points.min(0)) / (points.max(0) - points.min(0))
    hole = (unit < 0.45).all(1) & (unit.sum(1) > 0.55)  # within the middle hole, the triangle (.5, 0) (0, .5) (.5, .5)
    assert not hole.any() and len(np.unique(unit.round(2), axis=0)) > 300


def test_rasterise_counts_hits_and_ignores_points_off_the_canvas():
    points = np.array([[[0.5, 0.5], [0.9, 0.1], [3.2, 1.5], [-0.1, 1.0], [4.0, 0.0]]])
    expected = np.zeros((1, 4, 4))
    expected[0, 0, 0], expected[0, 1, 3] = 0.75, 0.5  # 1 - 2^-hits; x runs right, y down
    assert np.array_equal(formula.rasterise(points, 4), expected)


def test_signs_stay_inside_the_canvas_and_leave_ink():
    rng = np.random.RandomState(3)
    table = strokes.tabulate(strokes.sample_signs(100, 2, rng))
    assert table.basis.shape == (200, strokes.POINTS, strokes.CONTROLS)
    drawn = strokes.draw_signs(table, np.arange(200), rng)
    assert drawn.shape == (200, 32, 32) and drawn.min() == 0 and drawn.max() <= 1
    ink = drawn.sum((1, 2))
    border = ink - drawn[:, 1:-1, 1:-1].sum((1, 2))
    assert ink.min() > 3 and (border / ink).mean() < 0.02  # a shift may cut a corner now and then, no more
    still = strokes.draw_signs(table, np.arange(200), rng, strength=0.0)
    used = (table.basis != 0).any(1)  # a sibling without a stroke keeps that stroke's control points, unused
    assert np.abs(table.controls[used]).max() < 1 + 1e-6  # fitted into [-1, 1]; a curve may swing a little beyond
    assert np.abs(table.basis @ table.controls).max() < 1.5
    assert (still[:, [0, -1]].sum((1, 2)) / still.sum((1, 2))).max() < 0.1


@pytest.mark.parametrize("kind", ["straight", "curve", "spline", "closed"])
def test_strokes_run_through_their_ends_and_keep_a_constant_point(kind):
    basis = strokes._stroke_basis(kind, 5, 30)
    assert np.allclose(basis.sum(1), 1)  # affine: a moved sign is the moved drawing
    corners = np.random.RandomState(0).uniform(-1, 1, (5, 2))
    path = basis @ corners
    assert np.allclose(path[0], corners[0])
    assert np.allclose(path[-1], corners[0] if kind == "closed" else corners[-1])


def test_strokes_that_share_a_control_point_still_meet_after_it_moves():
    controls = np.array([[-0.5, 0.0], [0.0, 0.5], [0.5, -0.5]])
    sign = strokes.Sign(controls, (strokes.Stroke("straight", (0, 1)), strokes.Stroke("straight", (1, 2))))
    table = strokes.tabulate([sign])
    moved = table.controls[0].copy()
    moved[1] += 0.3
    path = table.basis[0] @ moved
    begin = int(np.flatnonzero(table.first[0])[1])
    assert np.allclose(path[begin], moved[1], atol=1e-6) and np.allclose(path[begin - 1], moved[1], atol=1e-6)


def test_paint_makes_grey_and_coloured_pictures_with_visible_ink():
    coverage = np.zeros((60, 8, 8))
    coverage[:, 2:6, 2:6] = 1
    grey = formula.paint(coverage, np.random.RandomState(0), colour=0.0, flips=0.0)
    assert (grey[:, :1] == grey).all()
    assert grey[:, :, 4, 4].min() >= round(0.7 * 255) - 1 and grey[:, :, 0, 0].max() <= round(0.15 * 255) + 1
    colour = formula.paint(coverage, np.random.RandomState(0), colour=1.0).astype(int)
    assert (colour[:, :1] != colour).any((1, 2, 3)).all()
    contrast = np.abs(colour[:, :, 4, 4].mean(1) - colour[:, :, 0, 0].mean(1))
    assert contrast.min() > 0.2 * 255


def test_erase_fills_one_rectangle_of_the_chosen_share():
    blank = np.zeros((300, 3, 32, 32), np.uint8)
    erased = (formula.erase(blank.copy(), np.random.RandomState(0), 0.3) != 0).any(1)
    assert 0.2 < erased.any((1, 2)).mean() < 0.4
    assert erased.mean((1, 2)).max() <= (13 / 32) ** 2
    assert not formula.erase(blank.copy(), np.random.RandomState(0), 0.0).any()


def test_blur_averages_cells_and_keeps_a_constant_picture():
    matrices = formula.blur_matrices(32)
    assert np.array_equal(matrices[0], np.eye(32)) and np.allclose(matrices.sum(2), 1)
    picture = np.random.RandomState(0).random_sample((40, 32, 32))
    assert np.array_equal(formula.blur(picture, np.random.RandomState(0), 0.0), picture)
    blurred = formula.blur(picture, np.random.RandomState(0), 1.0)
    assert (blurred.std((1, 2)) < 0.75 * picture.std((1, 2))).all()
