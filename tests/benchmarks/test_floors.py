"""The floors: nearest mean against hand-worked cases, every choice on training images, the same for every feature."""

import numpy as np
import pytest
import torch

from benchmarks import floors
from benchmarks.floors import Choice, Samples


def blobs(seed: int, spread: float = 0.1, per_class: int = 20) -> Samples:
    """Three classes at the corners of a triangle, the first dimension in units of thousands."""
    rng = np.random.RandomState(seed)
    y = np.repeat(np.arange(3), per_class)
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    x = corners[y] + spread * rng.standard_normal((len(y), 2))
    return Samples((x * [1000, 1]).astype(np.float32), y)


def test_nearest_mean_by_hand():
    train = np.array([[0.0, 1.0], [0.0, 3.0], [4.0, 0.0], [8.0, 0.0]])
    labels = np.array([7, 7, 9, 9])  # means (0, 2) and (6, 0)
    test = np.array([[1.0, 0.0], [1.0, 2.0], [3.5, 0.5]])
    assert floors.nearest_mean(train, labels, test, "euclidean").tolist() == [7, 7, 9]
    assert floors.nearest_mean(train, labels, test, "cosine").tolist() == [9, 7, 9]  # directions (0, 1) and (1, 0)


def test_preparation_uses_the_training_part_alone():
    train, test = np.array([[0.0, 10.0], [2.0, 30.0]]), np.array([[1.0, 20.0], [4.0, 20.0]])
    assert np.allclose(floors.prepare(train, test, "standardised")[1], [[0, 0], [3, 0]])
    scale = np.sqrt((1 + 100) / 2)
    assert np.allclose(floors.prepare(train, test, "centred")[1], [[0, 0], [3 / scale, 0]])
    assert np.allclose(floors.prepare(train, test, "as they are")[1], test / scale)


def test_accuracy_is_right_where_the_answer_is_known():
    train, test = blobs(0), blobs(1)
    assert floors.accuracy(Choice("standardised", metric="euclidean"), train, test) == 1
    assert floors.accuracy(Choice("standardised", penalty=0.01), train, test) == 1
    wrong = Samples(test.x, (test.y + 1) % 3)
    assert floors.accuracy(Choice("standardised", penalty=0.01), train, wrong) == 0


def test_the_choice_is_made_on_training_samples_and_always_the_same():
    train = blobs(0, spread=0.3)
    chosen = floors.choose(train)
    assert chosen == floors.choose(train)
    assert chosen["NCM"][0].preparation == "standardised"  # a dimension a thousand times as wide hides the other one
    assert 0.7 < chosen["NCM"][1] <= 1 and chosen["probe"][0].penalty in floors.PENALTIES


def test_pixels_are_greys_between_zero_and_one():
    images = torch.tensor([0, 255, 0, 51], dtype=torch.uint8).view(1, 1, 2, 2).repeat(2, 3, 1, 1)
    images[1, 0] = 255
    assert floors.features("raw pixels", images)[0].tolist() == pytest.approx([0, 1, 0, 0.2])
    assert floors.features("raw pixels", images)[1].tolist() == pytest.approx([1 / 3, 1, 1 / 3, (1 + 0.4) / 3])


def test_the_table_has_a_row_a_feature_and_names_the_choices():
    scores = {"NCM": (0.5, Choice("centred", metric="cosine")), "probe": (0.25, Choice("centred", penalty=0.1))}
    text = floors.table({("digits", kind): scores for kind in floors.KINDS})
    assert "| embedded ViT | 50.0 | 25.0 |" in text
    assert "- raw pixels, digits: NCM centred, cosine; probe centred, penalty 0.1" in text
