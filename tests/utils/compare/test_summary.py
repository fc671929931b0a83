"""The table and the sentence of several runs: exact texts for rows whose numbers are set by hand."""

import math
from pathlib import Path

from utils.compare import summary
from utils.compare.rows import Arm
from utils.compare.runs import Run


def row(label, *last, model="nested_lora", head="ridge", trains=100, tested=400, dataset="toy", peeked=False):
    """A row with seeds 1, 2, ... of these last accuracies."""
    settings, arm = {"model_name": model, "head": head}, Arm({"model_name": model, "head": head}, "0" * 12, label)
    for seed, value in enumerate(last, start=1):
        results = {
            "last_accuracy": value, "average_accuracy": value + 1, "forgetting": 2.0, "trained_in_last_task": trains,
            "adapters_at_end": 3, "seconds_in_all": 61.0, "trainable_parameters": [trains], "tested": tested,
            "selection_history": [{"split": "test"}] * peeked, "dataset": dataset, "sizes": (2, 2),
        }  # fmt: skip
        arm.runs[seed] = Run(Path(f"seed_{seed}"), seed, settings, results)
    return arm


def nearest(*last):
    return row("means", *last, model="simplecil", head="ncm", trains=0)


def ridge(*last):
    return row("ridge", *last, model="simplecil", trains=0)


def test_one_seed_says_what_the_images_leave_open():
    rows = [nearest(70.0), ridge(80.0), row("lora", 81.0), row("joint", 75.5, model="joint", head="linear")]
    margin = 100 * 1.96 * math.sqrt(0.81 * 0.19 / 400)
    assert summary.sentence(rows) == (
        "The highest last accuracy is 81.00 (lora), 11.00 above the nearest mean and 5.50 above joint training; adapters add "
        f"nothing measurable to the ridge head (lora 81.00, ridge without training 80.00); one seed has no interval, and 400 "
        f"test images alone leave ±{margin:.1f} points open."
    )
    strong, weak = ([ridge(80.0), row("lora", last)] for last in (90.0, 60.0))
    assert "adapters add 10.00 to the ridge head (lora 90.00" in summary.sentence(strong)
    assert "adapters take 20.00 from the ridge head (lora 60.00" in summary.sentence(weak)


def test_several_seeds_have_paired_intervals():
    rows = [nearest(70.0, 71.0, 72.0), ridge(80.0, 81.0, 82.0), row("lora", 82.0, 82.5, 84.5)]
    # differences to the nearest mean 12, 11.5, 12.5: mean 12, std 0.5, t(0.975, 2) = 4.3027
    half = 4.302653 * 0.5 / math.sqrt(3)
    said = summary.sentence(rows)
    assert f"83.00 (lora), 12.00 [{12 - half:+.2f}, {12 + half:+.2f}] above the nearest mean;" in said
    assert (
        "adapters add 2.00 to the ridge head" in said and "one seed" not in said
    )  # 2, 1.5, 2.5: the interval is above 0
    noisy = [ridge(80.0, 81.0, 82.0), row("lora", 84.0, 80.0, 82.6)]
    assert "adapters add nothing measurable to the ridge head" in summary.sentence(noisy)
    two = [ridge(80.0, 81.0), row("lora", 84.0, 82.0)]
    assert summary.sentence(two).endswith("; two seeds say little about others.")


def test_what_cannot_be_compared_is_not():
    assert summary.sentence([]) == "" == summary.sentence([row("nothing")])
    assert "different data sets" in summary.sentence([row("a", 1.0), row("b", 2.0, dataset="other")])
    chosen_on_test = [row("a", 50.0), row("b", 90.0, peeked=True)]
    assert summary.sentence(chosen_on_test).startswith(
        "The highest last accuracy is 50.00 (a), 40.00 below the next (b);"
    )
    of_one_method = [nearest(70.0), nearest(60.0)]
    of_one_method[1].label = "other means"
    assert "10.00 above the next (other means)" in summary.sentence(of_one_method)


def test_the_seeds_of_one_experiment():
    said = summary.sentence([row("sema", 58.0, 74.0)])
    assert (
        said
        == "sema ends at 66.00 on average over 2 seeds, between 58.00 and 74.00; two seeds say little about others."
    )
    half = 4.302653 * 1.0 / math.sqrt(3)
    assert f"(95 % interval of the mean {66 - half:.2f} to {66 + half:.2f})" in summary.sentence(
        [row("a", 65.0, 66.0, 67.0)]
    )


def test_the_table_marks_the_best_and_adds_the_times_of_seeds():
    lines = summary.table([nearest(70.0, 72.0), row("a\x1b[2J", 80.0, 80.0)]).splitlines()
    assert lines[0] == "toy, 2 tasks of 2+2 classes, 2 seeds (percent, * the best)"
    assert lines[1].split() == ["last", "average", "forgetting", "trained", "adapters", "time"]
    assert lines[2].split() == [
        "means",
        "71.00",
        "±",
        "1.41",
        "72.00",
        "±",
        "1.41",
        "2.00",
        "±",
        "0.00",
        "0",
        "3.0",
        "2:02",
    ]
    assert lines[3].split()[:4] == ["a\\x1b[2J", "80.00", "±", "0.00*"] and "\x1b" not in lines[3]
