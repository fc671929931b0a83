"""The arithmetic of the benchmark scripts: the table's cells."""

from benchmarks.methods import cell, table


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
