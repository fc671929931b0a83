"""The arithmetic of the benchmark scripts: the table's cells, and settings chosen without the test images."""

import numpy as np

from benchmarks.methods import cell, table
from benchmarks.tune import without_test
from tests.helpers.toy import toy_dataset


def result(last: float, adapters: int) -> dict:
    return {
        "last_accuracy": last,
        "average_accuracy": last + 1,
        "forgetting": None,
        "adapters_per_layer": [{"0": 1}, {"0": adapters, "1": 1}],
        "seconds": [{"train": 1.0, "detect": 0.5, "evaluate": 0.5}, {"train": 2.0, "detect": 0.0, "evaluate": 0.0}],
    }


def test_table_has_mean_and_sample_deviation_over_seeds():
    lines = table(
        {("digits", "sema"): [result(80.0, 2), result(82.0, 3)], ("digits", "joint"): [result(90.0, 1)]}
    ).split("\n")
    assert lines[2] == "| digits | sema | 2 | 81.0 ± 1.4 | 82.0 ± 1.4 | - | 3.5 ± 0.7 | 4.0 ± 0.0 |"
    assert lines[3] == "| digits | joint | 1 | 90.0 | 91.0 | - | 2.0 | 4.0 |"
    assert cell([]) == "-"


def test_tuning_holds_out_training_images_and_never_sees_test_images():
    whole = toy_dataset(classes=3, train=10, test=4)
    tuned = without_test(whole)
    training, held_out = (d.images.reshape(len(d), -1).numpy() for d in (tuned.train, tuned.test))
    assert len(training) == 24 and np.bincount(tuned.test.labels).tolist() == [2, 2, 2]
    rows = {row.tobytes() for row in whole.train.images.reshape(30, -1).numpy()}
    assert {r.tobytes() for r in training} | {r.tobytes() for r in held_out} == rows
    assert not {r.tobytes() for r in training} & {r.tobytes() for r in held_out}
    again = without_test(whole)
    assert np.array_equal(again.test.images.numpy(), tuned.test.images.numpy())
