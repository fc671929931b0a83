"""The embedded fractals: what is stored is what was published, disjoint from the pre-training, and always the same bytes."""

import hashlib

import numpy as np
import pytest

from utils.data import formula, fractals
from utils.data.views import Views, ViewSource


@pytest.fixture(scope="module")
def loaded():
    return fractals.load()


def test_a_hundred_classes_in_families_of_four(loaded):
    names, train, train_labels, test, test_labels = loaded
    assert len(set(names)) == 100 and names[:5] == [*(f"family 01 {k}" for k in "abcd"), "family 02 a"]
    assert train.shape == (6000, 3, 32, 32) and test.shape == (2000, 3, 32, 32)
    assert train.dtype == test.dtype == np.uint8 and train_labels.dtype == test_labels.dtype == np.int64
    assert (np.bincount(train_labels) == 60).all() and (np.bincount(test_labels) == 20).all()
    systems = fractals.read_parameters()
    families = systems.reshape(fractals.FAMILIES, fractals.SIBLINGS, -1)
    assert np.unique(systems.reshape(100, -1), axis=0).shape[0] == 100
    within = np.abs(families - families[:, :1]).max((1, 2))
    across = np.abs(families[:, None, 0] - families[None, :, 0]).max(2) + 9 * np.eye(25)
    assert within.max() < across.min()


def test_no_picture_is_in_both_parts_or_twice(loaded):
    _, train, _, test, _ = loaded
    every = {image.tobytes() for part in (train, test) for image in part}
    assert len(every) == 8000


def test_pictures_are_the_published_ones_on_every_machine(loaded):
    """The benchmark numbers are about these bytes; a change of the renderer must change this line knowingly."""
    _, train, train_labels, test, test_labels = loaded
    digest = hashlib.sha256(b"".join(a.tobytes() for a in (train, train_labels, test, test_labels))).hexdigest()
    assert digest.startswith("d7db516de5595d22")


def test_a_class_is_drawn_the_same_again_and_alone(loaded):
    _, train, _, test, _ = loaded
    label = 37
    again = fractals.draw_class(fractals.read_parameters()[label], label, 80)
    assert np.array_equal(again[:60], train[label * 60 : label * 60 + 60])
    assert np.array_equal(again[60:], test[label * 20 : label * 20 + 20])


def test_stored_parameters_are_what_the_module_makes():
    assert fractals.fingerprint(fractals.make_parameters()) == fractals.PARAMETERS_SHA256


def test_systems_contract_and_are_not_those_of_the_pre_training():
    stored = fractals.read_parameters()
    maps, _ = formula.affine_maps(stored)
    assert np.linalg.svd(maps[..., :4].reshape(-1, 2, 2), compute_uv=False).max() < 1
    views = Views(sign_families=1, sign_siblings=1)
    trained = ViewSource(views, 1).systems
    assert trained.shape == (1200, 4, 8)
    distance = np.abs(stored[:, None] - trained[None]).max((2, 3))
    siblings = np.abs(trained[0::3] - trained[1::3]).max((1, 2))
    assert distance.min() > siblings.max()  # none is even a sibling of a trained one


@pytest.mark.parametrize("damage", ["altered", "cut", "missing", "objects"])
def test_damaged_parameters_are_refused_with_their_path(damage, tmp_path):
    path = tmp_path / "fräctals.npy"
    systems = fractals.read_parameters()
    if damage == "altered":
        systems[3, 0, 0] = np.nextafter(systems[3, 0, 0], 9)  # the last bit of one number
        np.save(path, systems)
    elif damage == "cut":
        path.write_bytes(fractals.PARAMETERS.read_bytes()[:1000])
    elif damage == "objects":
        np.save(path, np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"fräctals\.npy.*fractals data set"):
        fractals.read_parameters(path)
