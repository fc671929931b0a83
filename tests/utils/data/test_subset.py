"""shots, imbalance, imbalance_order and subset_seed: which training images stay, and where it shows."""

import json

import numpy as np
import pytest
import torch

import main
from tests.helpers.toy import toy_dataset
from utils import data
from utils.config.hashing import settings_hash
from utils.config.schema import Experiment
from utils.data import manifest, subset
from utils.data.dataset import Dataset
from utils.data.images import ImageArray, ImageFiles


def counts(dataset):
    return np.bincount(dataset.train.labels, minlength=len(dataset.class_names)).tolist()


def test_the_long_tail_of_cifar_is_the_authors():
    """CIFAR-10 and CIFAR-100 with imbalance 100: the numbers of images in Cao et al.'s own lists."""
    ten = subset.long_tail([5000] * 10, 100, range(10))
    assert ten == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    hundred = subset.long_tail([500] * 100, 100, range(100))
    assert (hundred[0], hundred[-1], sum(hundred)) == (500, 5, 10_847)
    assert subset.long_tail([500] * 100, 1, range(100)) == [500] * 100
    assert subset.long_tail([9, 9, 9], 9, [2, 0, 1]) == [1, 9, 3]
    assert subset.long_tail([2, 10], 100, [1, 0]) == [1, 6] and subset.long_tail([7], 100, [0]) == [7]


def test_shots_keeps_so_many_of_each_class_and_every_test_image():
    whole = toy_dataset(classes=3, train=10)
    few = subset.reduced(whole, 4, None, "index", 0)
    assert counts(few) == [4, 4, 4] and few.test is whole.test
    assert few.notes == ("shots: 4 training images of each class; 12 of 30 stay (subset_seed 0)",)
    places = [(whole.train.images == image).flatten(1).all(1).nonzero().item() for image in few.train.images]
    assert places == sorted(places) and whole.train.labels[places].tolist() == few.train.labels.tolist()
    again, other = (subset.reduced(whole, 4, None, "index", seed) for seed in (0, 1))
    assert torch.equal(again.train.images, few.train.images) and not torch.equal(other.train.images, few.train.images)
    digests = {manifest.of(each).digest for each in (whole, few, again, other)}
    assert len(digests) == 3
    larger = subset.reduced(whole, 12, None, "index", 0)
    assert counts(larger) == [10] * 3 and "3 classes with fewer keep all: class 0, class 1, class 2" in larger.notes[0]


def test_more_shots_keep_the_images_of_fewer():
    whole = toy_dataset(classes=2, train=10)
    few, more = (
        {tuple(image.flatten().tolist()) for image in subset.reduced(whole, n, None, "index", 3).train.images}
        for n in (3, 7)
    )
    assert len(few) == 6 and few < more


def test_a_tail_in_shuffled_order_has_the_same_numbers_for_other_classes():
    whole = toy_dataset(classes=6, train=33)
    plain, shuffled = (subset.reduced(whole, None, 32, order, 1) for order in ("index", "shuffled"))
    assert counts(plain) == [33, 16, 8, 4, 2, 1]
    assert sorted(counts(shuffled)) == sorted(counts(plain)) and counts(shuffled) != counts(plain)
    assert plain.notes == ("imbalance: from 33 to 1 training images of a class; 64 of 198 stay (subset_seed 1)",)


def test_files_stay_files():
    names = [f"{k}.png" for k in range(6)]
    whole = Dataset("x", ["a", "b"], ImageFiles(names, [0, 0, 0, 1, 1, 1], 12), ImageFiles(["t"], [0]), "imagenet")
    few = subset.reduced(whole, 2, None, "index", 0).train
    assert (
        few.grey_bits == 12
        and len(few) == 4
        and all(names.index(p) // 3 == k for p, k in zip(few.paths, few.labels, strict=True))
    )
    assert isinstance(toy_dataset().train, ImageArray)


def experiment(**settings):
    return Experiment(model_name="simplecil", dataset="fashion", init_cls=2, increment=2, **settings)


def test_the_keys_are_in_the_hash_only_where_they_are_set():
    plain = experiment().model_dump(mode="json")
    older = {k: v for k, v in plain.items() if k not in ("shots", "imbalance", "imbalance_order", "subset_seed")}
    assert settings_hash(plain) == settings_hash(older)
    changes = (
        {"shots": 5},
        {"imbalance": 5.0},
        {"shots": 5, "subset_seed": 1},
        {"imbalance": 5.0, "imbalance_order": "shuffled"},
    )
    assert len({settings_hash(plain | change) for change in ({}, *changes)}) == 5
    for change in changes:
        assert not list(experiment(**change).cross_checks())


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"shots": 5, "imbalance": 2.0}, "imbalance: shots sets the number of images of every class; leave one out"),
        ({"imbalance_order": "shuffled"}, "imbalance_order: has no effect without imbalance; leave it out"),
        ({"subset_seed": 3}, "subset_seed: has no effect without shots or imbalance; leave it out"),
    ],
)
def test_keys_without_an_effect_are_refused(settings, fault):
    assert [text for _, text in experiment(**settings).cross_checks()] == [fault]


def test_check_shows_what_stays(tmp_path, capsys):
    path = tmp_path / "x.json"
    settings = {"model_name": "simplecil", "dataset": "fashion", "init_cls": 2, "increment": 2, "imbalance": 10}
    path.write_text(json.dumps(settings))
    assert main.main(["--config", str(path), "--check"]) == 0
    shown = capsys.readouterr().out
    assert "data (10 classes in this program)" in shown
    assert (
        "note: imbalance: from 300 to 30 training images of a class; 1,222 of 3,000 stay (subset_seed 0)"
        in " ".join(shown.split())
    )
    cfg = experiment(imbalance=10.0)
    loaded = data.load("fashion", **data.places(cfg), **data.reading(cfg))
    assert len(loaded.train) == 1222 and len(loaded.test) == 1000
