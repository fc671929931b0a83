"""The record of a run, results.json and the console's text."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from utils.evaluation.metrics import Score
from utils.report.console import banner, seed_table, task_table
from utils.run.record import RunRecord, results_json
from utils.text import number

ROOT = Path(__file__).resolve().parents[3]
SECONDS = {"train": 2.0, "detect": 0.5, "evaluate": 0.25}

# design.md, section 2, and the top-5 curve
FIELDS = [
    "model_name",
    "dataset",
    "seed",
    "class_order",
    "task_classes",
    "accuracy_matrix",
    "top1_curve",
    "top5_curve",
    "last_accuracy",
    "average_accuracy",
    "final_task_mean",
    "forgetting",
    "backward_transfer",
    "task_oracle_accuracy",
    "task_oracle_curve",
    "task_confusion",
    "wrong_task",
    "adapters_per_layer",
    "trainable_parameters",
    "total_parameters",
    "selection_history",
    "test_evaluations",
    "seconds",
    "images_per_second",
    "peak_memory_bytes",
    "peak_memory_by_task",
    "head_drift",
    "last_accuracy_interval",
    "learning_accuracy",
    "learning_accuracy_known",
    "ece_curve",
    "class_images",
    "class_accuracy",
    "class_accuracy_when_new",
    "class_confusion",
    "mistakes",
    "class_confusion_beyond",
    "calibration",
    "operations",
    "cpu_seconds",
    "cpu_hours",
    "gpu_hours",
]


def add(record, scores, adapters=None, **more):
    record.add_task(
        scores,
        adapters_per_layer={9: 1} if adapters is None else adapters,
        trainable_parameters=10,
        total_parameters=1000,
        seconds=SECONDS,
        images=300,
        **more,
    )


def small():
    """Two tasks of 2 and 3 classes with 10 and 30 test samples."""
    record = RunRecord("sema", "digits", 7, [4, 0, 1, 3, 2], [[4, 0], [1, 3, 2]])
    add(record, [Score(10, 9, None, 10, (10,))], peak_memory_bytes=900)
    later = {9: 2, 10: 1}
    add(
        record,
        [Score(10, 8, 10, 9, (9, 1)), Score(30, 24, 29, 27, (4, 26))],
        later,
        selections=[{"kept": np.int64(1)}],
        peak_memory_bytes=8,
    )
    return record


def many(tasks, layers=12):
    record = RunRecord("sema", "glyphs", 1, list(range(tasks)), [[t] for t in range(tasks)])
    for t in range(tasks):
        add(record, [Score(10, 10 - k % 3, None, 10) for k in range(t + 1)], dict.fromkeys(range(layers), t + 1))
    return record


# ---------------------------------------------------------------- results.json


def test_results_are_the_hand_worked_ones():
    results = results_json(small())
    assert list(results) == FIELDS
    assert results["accuracy_matrix"] == [[90.0], [80.0, 80.0]]
    assert results["top1_curve"] == [90.0, 80.0]
    assert results["top5_curve"] == [None, 100 * 39 / 40]
    assert results["last_accuracy"] == 80.0
    assert results["average_accuracy"] == pytest.approx(85.0, abs=1e-12)
    assert results["final_task_mean"] == 80.0
    assert results["forgetting"] == pytest.approx(10.0, abs=1e-12)
    assert results["backward_transfer"] == pytest.approx(-10.0, abs=1e-12)
    assert results["task_oracle_accuracy"] == 90.0
    assert results["task_oracle_curve"] == [100.0, 90.0]
    assert results["task_confusion"] == [[9, 1], [4, 26]] and results["wrong_task"] == [[0, 0], [4, 1]]
    assert results["peak_memory_by_task"] == [900, 8]
    assert results["adapters_per_layer"] == [{"9": 1}, {"9": 2, "10": 1}]
    assert results["trainable_parameters"] == [10, 10] and results["total_parameters"] == [1000, 1000]
    assert results["selection_history"] == [{"kept": 1}]
    assert results["test_evaluations"] == 2
    assert results["seconds"] == [SECONDS, SECONDS]
    assert results["images_per_second"] == 150.0
    assert results["peak_memory_bytes"] == 900
    assert results["class_order"] == [4, 0, 1, 3, 2] and results["task_classes"] == [[4, 0], [1, 3, 2]]
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_head_drift_is_kept_as_fractions_and_told_in_percent():
    record = RunRecord("sema", "digits", 7, [0, 1], [[0], [1]])
    add(record, [Score(10, 9, None, 10)])
    assert record.head_drift == results_json(record)["head_drift"] == []
    drift = {"task": 1, "stale": 0.5, "recomputed": np.float64(0.75), "cosine": 0.25}
    add(record, [Score(10, 5, None, 9), Score(10, 5, None, 9)], head_drift=drift)
    again = RunRecord.from_dict(json.loads(json.dumps(record.to_dict())))
    assert again.head_drift == [{"task": 1, "stale": 0.5, "recomputed": 0.75, "cosine": 0.25}]
    assert results_json(again)["head_drift"] == [{"task": 1, "stale": 50.0, "recomputed": 75.0, "cosine": 0.25}]


def test_results_before_any_task_and_without_samples():
    record = RunRecord("joint", "folder", 0, [0], [[0]])
    empty = results_json(record)
    assert empty["accuracy_matrix"] == [] and empty["last_accuracy"] is None and empty["images_per_second"] is None
    record.add_task(
        [Score(0, 0, None, 0)],
        adapters_per_layer={}, trainable_parameters=0, total_parameters=0, seconds={}, images=0,
    )  # fmt: skip
    nothing = results_json(record)
    assert nothing["accuracy_matrix"] == [[None]] and nothing["top1_curve"] == [None] == nothing["top5_curve"]
    assert nothing["task_oracle_accuracy"] is None and nothing["forgetting"] is None
    assert nothing["seconds"] == [{"train": 0.0, "detect": 0.0, "evaluate": 0.0}]
    json.dumps(nothing, allow_nan=False)
    assert "accuracy        -" in task_table(record)


def test_record_survives_a_checkpoint_and_does_not_share_its_lists():
    record = small()
    data = record.to_dict()
    again = RunRecord.from_dict(json.loads(json.dumps(data)))
    assert again == record and results_json(again) == results_json(record)
    twin = RunRecord.from_dict(data)
    twin.correct[0].append(5)
    assert data == record.to_dict()
    with pytest.raises(ValueError, match=r"not a run record: fields \['seed', 'sead'\]|\['sead', 'seed'\]"):
        RunRecord.from_dict({("sead" if key == "seed" else key): value for key, value in data.items()})


def test_a_record_of_an_older_version_is_read_and_its_run_goes_on():
    record = RunRecord("sema", "digits", 7, [4, 0, 1, 3, 2], [[4, 0], [1, 3, 2]])
    add(record, [Score(10, 9, None, 10, (10,))], peak_memory_bytes=900)
    before = {k: v for k, v in record.to_dict().items() if k not in ("by_image", "by_task")}
    assert RunRecord.from_dict(json.loads(json.dumps(before))) == record  # the version before
    older = {k: v for k, v in before.items() if k not in ("confusion", "wrong_task", "peak_by_task")}
    again = RunRecord.from_dict(json.loads(json.dumps(older)))
    assert (again.confusion, again.wrong_task, again.peak_by_task, again.by_task) == (None, [None], [None], [None])
    add(again, [Score(10, 8, 10, 9, (9, 1)), Score(30, 24, 29, 27, (4, 26))], peak_memory_bytes=950)
    results = results_json(again)
    assert results["task_confusion"] == [[9, 1], [4, 26]] and results["wrong_task"] == [None, [4, 1]]
    assert results["peak_memory_by_task"] == [None, 950] and results["top1_curve"] == [90.0, 80.0]
    with pytest.raises(ValueError, match=r"not a run record: fields \['confusion'\] are missing"):
        RunRecord.from_dict({k: v for k, v in record.to_dict().items() if k != "confusion"})


def test_record_refuses_what_does_not_fit():
    record = small()
    with pytest.raises(ValueError, match="task 2 of 2 needs 3 scores"):
        add(record, [Score(1, 1, None, 1)] * 3)
    record = RunRecord("sema", "digits", 7, [0, 1], [[0], [1]])
    with pytest.raises(ValueError, match="task 0 of 2 needs 1 scores, got 2"):
        add(record, [Score(1, 1, None, 1)] * 2)
    add(record, [Score(10, 1, None, 1)])
    with pytest.raises(ValueError, match="test sets changed size"):
        add(record, [Score(11, 1, None, 1), Score(10, 1, None, 1)])
    with pytest.raises(ValueError, match="unknown phases"):
        record.add_task(
            [Score(10, 1, None, 1)] * 2,
            adapters_per_layer={}, trainable_parameters=0, total_parameters=0, seconds={"test": 1}, images=0,
        )  # fmt: skip
    assert len(record.correct) == 1


# ---------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (-0.001, "0.00"), (12.345678, "12.35"), (100, "100.00"), (-4.0, "-4.00")]
)
def test_number(value, text):
    assert number(value) == text


def test_banner_names_everything():
    text = banner(
        method="sema",
        data="digits, 10 classes in 5 tasks " + "2 " * 60,
        backbone="vit_embedded",
        weights="embedded sha256:0123abcd",
        device="cpu",
        seeds=[1993, 1],
        trainable=1234,
        total=100000,
        folder=Path("logs") / "x" / ("y" * 120),
    )
    for part in ("sema", "digits", "vit_embedded", "sha256:0123abcd", "cpu", "1993 1", "1,234 of 100,000", "1.23 %"):
        assert part in text
    *lines, folder, rule = text.splitlines()
    assert folder == "run folder  " + str(Path("logs") / "x" / ("y" * 120))  # whole, to be copied
    assert max(map(len, [*lines, rule])) <= 100


def test_task_table():
    assert task_table(small()).splitlines() == [
        "after task 2/2: 3 new classes, 5 seen, 0:03",
        "  task            1      2",
        "  accuracy    80.00  80.00",
        "  last 80.00   average 85.00   forgetting 10.00",
        "  adapters  layer 9: 2, layer 10: 1",
    ]


@pytest.mark.parametrize("tasks", [1, 12, 13, 20, 100])
def test_task_table_stays_within_100_columns(tasks):
    text = task_table(many(tasks))
    assert max(map(len, text.splitlines())) <= 100
    numbers = [int(n) for line in text.splitlines() if line.startswith("  task") for n in line.split()[1:]]
    assert numbers == list(range(1, tasks + 1))
    shown = [n for line in text.splitlines() if line.startswith("  accuracy") for n in line.split()[1:]]
    assert shown == [f"{100 - 10 * (k % 3):.2f}" for k in range(tasks)]
    layers = [part for line in text.split("adapters")[1].splitlines() for part in line.strip(" ,").split(", ")]
    assert layers == [f"layer {layer}: {tasks}" for layer in range(12)]


def test_layers_without_adapters_are_not_listed():
    record = RunRecord("sema", "digits", 7, [0, 1], [[0], [1]])
    add(record, [Score(10, 9, None, 10)], {0: 0, 1: 0})
    assert "adapters" not in task_table(record)
    add(record, [Score(10, 9, None, 10)] * 2, {0: 0, 1: 3})
    assert task_table(record).splitlines()[-1] == "  adapters  layer 1: 3"
    assert results_json(record)["adapters_per_layer"][1] == {"0": 0, "1": 3}  # the data keep them


def test_seed_table():
    first, second = results_json(small()), results_json(small())
    second.update(seed=8, last_accuracy=84.0, forgetting=None)
    lines = seed_table([first, second]).splitlines()
    cells = {line.split()[0]: line.split()[1:] for line in lines}
    assert lines[0] == "sema on digits, 2 tasks (percent)"
    assert cells["7"] == ["80.00", "85.00", "80.00", "10.00", "-10.00", "90.00", "0:06"]
    assert cells["8"][0] == "84.00" and cells["8"][3] == "-"
    assert cells["mean"][0] == "82.00" and cells["std"][0] == "2.83"
    assert cells["mean"][3] == "10.00" and cells["std"][3] == "-"
    assert cells["n"] == ["2", "2", "2", "1", "2", "2"]
    report = Path("logs/run/seed_7/report.html")
    assert lines[-1].startswith("n ")  # the page of several seeds is named by the command
    assert seed_table([first], Path("logs/run")).splitlines()[-2] == f"report: {report}"
    assert max(map(len, lines)) <= 100
    assert seed_table([]) == "no finished seeds"


def test_imports_are_light():
    heavy = "{'torch', 'matplotlib', 'torchvision', 'sklearn'}"
    for module in (
        "evaluation.metrics",
        "report.console",
        "report.plots",
        "report.page",
        "compare.page",
        "run.sample_images",
    ):
        code = f"import sys, utils.{module}; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
