"""DualGPM by hand: energies, thresholds, the turn to what is left over, and the projector against explicit bases."""

import numpy as np
import torch

from backbone.adapters.gradient_memory import GradientMemory


def diagonal(*values):
    """A moment whose directions are the axes; its energies are the squares of these."""
    return torch.diag(torch.tensor(values, dtype=torch.float64))


def axes(memory):
    return [i for i, kept in enumerate(memory.projector.diagonal().round().tolist()) if kept]


def test_the_first_task_keeps_as_many_directions_as_the_threshold_needs():
    # energies 16, 9, 4, 1 of 30: cumulative 0.533, 0.833, 0.967, 1
    for threshold, full, short in ((0.5, 1, 1), (0.6, 2, 1), (0.84, 3, 2), (0.97, 4, 3)):
        ours, theirs = GradientMemory(10), GradientMemory(10)
        moment = diagonal(4, 3, 2, 1, 0, 0, 0, 0, 0, 0)
        ours.update(moment, threshold)
        theirs.update(moment, threshold, short_start=True)
        assert (axes(ours), axes(theirs)) == (list(range(full)), list(range(short)))
        assert not ours.retains and not theirs.retains and int(ours.dim) == full


def test_a_later_task_adds_what_is_not_explained_yet():
    memory = GradientMemory(10)
    memory.update(diagonal(4, 3, 0, 0, 0, 0, 0, 0, 0, 0), 0.9)
    assert axes(memory) == [0, 1]
    memory.update(diagonal(9, 0, 1, 0, 0, 0, 0, 0, 0, 0), 0.98)  # 81 of 82 are explained
    assert axes(memory) == [0, 1]
    memory.update(diagonal(1, 0, 3, 2, 1, 0, 0, 0, 0, 0), 0.9)  # of 15 one is; 10 and 14 with the next two
    assert axes(memory) == [0, 1, 2, 3]
    free = memory.free(diagonal(*range(1, 11)))
    expected = torch.tensor([0, 0, 0, 0, 5, 6, 7, 8, 9, 10]).double()
    torch.testing.assert_close(free.diagonal(), expected, rtol=1e-12, atol=1e-12)


def test_more_than_half_turns_to_what_is_left_over_which_then_shrinks():
    memory = GradientMemory(4)
    memory.update(diagonal(2, 2, 0, 0), 0.99)
    assert axes(memory) == [0, 1] and not memory.retains  # exactly half stays as it is
    memory.update(diagonal(0, 0, 3, 1), 0.9)
    assert axes(memory) == [3] and bool(memory.retains) and int(memory.dim) == 1
    torch.testing.assert_close(memory.free(diagonal(5, 6, 7, 8)), diagonal(0, 0, 0, 8), rtol=1e-12, atol=1e-12)
    memory.update(diagonal(1, 1, 1, 0.2), 0.9)  # little of it lies there
    assert axes(memory) == [3]
    memory.update(diagonal(0, 0, 0, 1), 0.9)
    assert axes(memory) == [] and bool(memory.retains) and int(memory.dim) == 0
    rows, values = memory.directions(diagonal(1, 2, 3, 4), 2)
    assert not rows.any() and not len(values)  # nothing is left to learn in


def test_half_or_more_at_the_start_is_mistaken_by_the_original_alone():
    for moment, dim in ((diagonal(2.2, 2.1, 2, 0), 2), (diagonal(2.3, 2.2, 2.1, 2), 3)):
        theirs, ours = GradientMemory(4), GradientMemory(4)
        theirs.update(moment, 0.99, short_start=True)
        ours.update(moment, 0.99)
        assert axes(theirs) == list(range(dim)) and bool(theirs.retains)  # the important ones, called the rest
        assert int(ours.dim) == 3 - dim and bool(ours.retains) and not set(axes(ours)) & set(axes(theirs))


def test_directions_are_orthonormal_lead_and_avoid_what_is_kept():
    rng = np.random.default_rng(0)
    memory = GradientMemory(12)
    basis = np.zeros((12, 0))
    for threshold in (0.9, 0.95, 0.97):
        x = rng.normal(size=(6, 12)) * rng.uniform(0.1, 3, size=(6, 1))
        moment = torch.from_numpy(x.T @ x / 6)
        rows, values = memory.directions(moment, 3)
        torch.testing.assert_close(rows @ rows.T, torch.eye(3).double())
        if not memory.retains:
            assert (rows @ memory.projector).abs().max() < 1e-12
        reference = np.linalg.svd(memory.free(moment).numpy())
        np.testing.assert_allclose(values, reference[1][:3])
        np.testing.assert_allclose(rows.T @ rows, reference[0][:, :3] @ reference[0][:, :3].T, atol=1e-12)
        memory.update(moment, threshold)
        basis = memory.projector
        torch.testing.assert_close(basis @ basis, basis)
        assert round(float(basis.trace())) == int(memory.dim)


def test_directions_beyond_what_is_excited_are_zero_and_no_input_changes_nothing():
    memory = GradientMemory(5)
    rows, values = memory.directions(diagonal(2, 1, 0, 0, 0), 4)
    assert rows.abs().sum(dim=1).tolist() == [1, 1, 0, 0] and values.tolist() == [2, 1]
    memory.update(diagonal(0, 0, 0, 0, 0), 0.9)
    assert not memory.projector.any() and not memory.dim
