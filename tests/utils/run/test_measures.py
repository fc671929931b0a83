"""What results.json has of classes, images and cost: from a record worked by hand, and the names of image files."""

import os
from types import SimpleNamespace

import pytest

from utils.evaluation.metrics import Score
from utils.run import measures
from utils.run.record import RunRecord, results_json

COMMON = {"adapters_per_layer": {}, "trainable_parameters": 1, "total_parameters": 1, "seconds": {}, "images": 1}


def of_task(new, known, ece, operations):
    return {"new_correct": new, "new_known": known, "ece": ece, "operations": operations, "cpu_seconds": 1800.0,
            "gpu_seconds": 900.0}  # fmt: skip


def record(first_counted=True):
    """Classes arrive as 2, 0, 1 in two tasks; the second's pass has 4, 6 and 10 test images of them."""
    whole = RunRecord("finetune", "digits", 1, [2, 0, 1], [[2, 0], [1]])
    whole.add_task(
        [Score(10, 9, None, 10)], by_task=of_task([4, 5], 10, 0.25, 1000) if first_counted else None, **COMMON
    )
    by_image = {
        "images": [4, 6, 10], "correct": [1, 3, 8], "pairs": [[1, 2, 3], [0, 2, 3], [2, -1, 2]], "pairs_beyond": 0,
        "mistakes": [[7, 1, 2, 2.5], [3, 2, -1, None]], "names": ["a.png", "b.png"], "bins": None,
    }  # fmt: skip
    whole.add_task([Score(10, 4, None, 8), Score(10, 8, None, 9)], by_image=by_image, by_task=of_task([8], 9, None, 3000),
                   **COMMON)  # fmt: skip
    return whole


def test_classes_are_numbered_as_the_data_set_does():
    results = results_json(record())
    assert results["class_images"] == [6, 10, 4]
    assert results["class_accuracy"] == [50.0, 80.0, 25.0]
    assert results["class_accuracy_when_new"] == [pytest.approx(500 / 6), 80.0, 100.0]
    assert results["class_confusion"] == [[0, 1, 3], [2, 1, 3], [1, None, 2]]
    assert results["mistakes"] == [
        {"row": 7, "image": "a.png", "true": 0, "predicted": 1, "margin": 2.5},
        {"row": 3, "image": "b.png", "true": 1, "predicted": None, "margin": None},
    ]


def test_learning_accuracy_interval_and_cost():
    results = results_json(record())
    assert results["learning_accuracy"] == pytest.approx((90 + 80) / 2)
    assert results["learning_accuracy_known"] == pytest.approx((100 + 90) / 2)
    assert results["ece_curve"] == [25.0, None] and results["calibration"]["ece"] is None
    low, high = results["last_accuracy_interval"]
    assert (low, high) == (pytest.approx(38.6582, abs=1e-4), pytest.approx(78.1193, abs=1e-4))  # 12 of 20
    assert (results["operations"], results["cpu_hours"], results["gpu_hours"]) == ([1000, 3000], 1.0, 0.5)


def test_what_an_older_version_did_not_count_is_null():
    results = results_json(record(first_counted=False))
    assert results["class_accuracy_when_new"] == [None, 80.0, None] and results["operations"] == [None, 3000]
    assert results["learning_accuracy"] == pytest.approx(85) and results["learning_accuracy_known"] is None
    assert results["cpu_hours"] is None


def test_names_of_image_files_begin_below_their_common_folder():
    paths = [
        os.path.join("data", "birds", "test", *rest) for rest in (("owl", "1.png"), ("owl", "2.png"), ("jay", "1.png"))
    ]
    assert measures.image_names(SimpleNamespace(paths=paths)) == [
        os.path.join("owl", "1.png"), os.path.join("owl", "2.png"), os.path.join("jay", "1.png")
    ]  # fmt: skip
    assert measures.image_names(SimpleNamespace(paths=[b"x/\xe9.png".decode("utf-8", "surrogateescape")])) == [
        "\\xe9.png"
    ]
    assert measures.image_names(SimpleNamespace(images=None)) is None
