"""Repair of statistics whose features moved: exact for linear moves, nothing where nothing moves."""

import pytest
import torch

from backbone.heads.discriminant import DiscriminantHead
from backbone.heads.drift import RATIOS, linear_motion, mean_motion
from backbone.heads.gaussians import new_gaussians
from backbone.heads.heads import StatisticsHead


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


OLD, OLD_Y = normal(40, 6) + 1, torch.arange(40) % 2
NEW, NEW_Y = normal(50, 6, seed=1) - 0.5, 2 + torch.arange(50) % 3
MAP = torch.eye(6, dtype=torch.float64) + 0.3 * normal(6, 6, seed=2)
KINDS = {"ncm": lambda: StatisticsHead("ncm", 6, 5), "ridge": lambda: StatisticsHead("ridge", 6, 5),
         "lda": lambda: DiscriminantHead(6, 5)}  # fmt: skip


def test_a_linear_move_is_recovered_to_the_smallest_pull_and_explains_all():
    motion = linear_motion(NEW, NEW @ MAP, NEW_Y)
    torch.testing.assert_close(motion.matrix, MAP, rtol=0, atol=1e-7)  # 1e-9 of the mean diagonal, times what it pulls
    assert motion.facts["ratio"] == RATIOS[0] and motion.facts["unexplained"] < 1e-12 and not motion.shift.any()


@pytest.mark.parametrize("kind", KINDS)
def test_repaired_statistics_are_those_of_the_moved_images(kind):
    motion = linear_motion(NEW, NEW @ MAP, NEW_Y)
    stale, fresh = KINDS[kind](), KINDS[kind]()
    stale.add(OLD, OLD_Y)
    fresh.add(OLD @ MAP, OLD_Y)
    stale.move(motion)
    for head in (stale, fresh):
        head.add(NEW @ MAP, NEW_Y)
        head.solve()
    for name, tensor in fresh.state_dict().items():
        torch.testing.assert_close(stale.state_dict()[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_common_shift_is_repaired_by_the_mean_exactly(kind):
    shift = normal(6, seed=3)
    motion = mean_motion(NEW, NEW + shift)
    stale, fresh = KINDS[kind](), KINDS[kind]()
    stale.add(OLD, OLD_Y)
    fresh.add(OLD + shift, OLD_Y)
    stale.move(motion)
    for name in ("sums", "counts", *(["gram"] if kind != "ncm" else [])):
        torch.testing.assert_close(getattr(stale, name), getattr(fresh, name), rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["full", "shrunk", "low_rank", "diagonal"])
def test_gaussians_move_as_their_images_do(kind):
    """Full and shrunk covariances to rounding. Of the others the map cannot turn what is not stored: here it only scales."""
    matrix = MAP if kind in ("full", "shrunk") else 1.7 * torch.eye(6, dtype=torch.float64)
    motion = linear_motion(NEW, NEW @ matrix, NEW_Y)
    stale, fresh = (new_gaussians(kind, 2, 6, 2).double() for _ in range(2))
    stale.add(OLD, OLD_Y)
    fresh.add(OLD @ matrix, OLD_Y)
    stale.move(motion)
    torch.testing.assert_close(stale.means, fresh.means, rtol=0, atol=1e-6)
    for label in range(2):  # the ridge of 1e-4 is moved on the one side and added on the other
        torch.testing.assert_close(stale.covariance(label), fresh.covariance(label), rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_where_nothing_moves(kind):
    head = KINDS[kind]()
    head.add(OLD, OLD_Y)
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    for motion in (linear_motion(NEW, NEW.clone(), NEW_Y), mean_motion(NEW, NEW.clone())):
        assert motion.facts["moved"] == 0
        head.move(motion)
        assert all(torch.equal(tensor, head.state_dict()[name]) for name, tensor in before.items())


def test_noise_that_classes_do_not_share_is_not_learned():
    """Each class moves in a direction of its own: what one half of the classes says of the other is worse than nothing."""
    shifts = 0.5 * normal(5, 6, seed=5)
    motion = linear_motion(NEW, NEW + shifts[NEW_Y], NEW_Y)
    assert motion.facts["ratio"] >= 0.1
    one = linear_motion(NEW[:1], NEW[:1] + 1, NEW_Y[:1])  # one image: no half is left to choose on, so the largest pull
    assert one.facts["ratio"] == RATIOS[-1] and torch.isfinite(one.matrix).all()
