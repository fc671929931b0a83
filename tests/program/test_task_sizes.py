"""A list of task sizes, from the file to the report: checks, class order, a stopped run that goes on, hash, results."""

import pytest

import main
from tests.helpers.runs import assert_same_run, stopped_again_and_again, tiny_experiment
from utils.config.strict_json import read_json
from utils.data.tasks import drawn_order, task_sizes
from utils.report import page

SIZES = [2, 3, 3, 2]


def test_sizes_of_tasks():
    assert task_sizes(10, 2, [3, 3, 2]) == SIZES
    assert task_sizes(10, 10, []) == [10]
    assert task_sizes(10, 4, 3) == [4, 3, 3] and task_sizes(10, 2, 3) == [2, 3, 3, 2]
    with pytest.raises(ValueError, match=r"init_cls 2 and increment \[3, 3\] make 8 classes, but there are 10"):
        task_sizes(10, 2, [3, 3])
    with pytest.raises(ValueError, match="must be at least 1"):
        task_sizes(10, 2, [8, 0])


def test_a_run_with_listed_tasks(tmp_path, monkeypatch, capsys):
    write_report = page.write_report
    run = tiny_experiment("finetune", tmp_path, monkeypatch, init_cls=2, increment=[3, 3, 2])
    assert main.main([*run, "--check"]) == 0
    shown = capsys.readouterr().out
    assert "(10 classes in 4 tasks, class order of seed 3)" in shown and "(the rest)" not in shown
    assert "    2:   3 classes" in shown and "    4:   2 classes" in shown
    assert main.main([*run, "--set", "increment=[3,3]", "--check"]) == 2
    assert "increment: init_cls 2 and [3, 3] make 8 classes, digits has 10" in capsys.readouterr().err
    assert main.main([*run, "--set", "increment=[3,0]", "--check"]) == 2
    assert "increment: a whole number of at least 1 is expected, or a list of one" in capsys.readouterr().err

    monkeypatch.setattr(page, "write_report", write_report)  # this run has its report
    assert main.main([*run, "--out", str(tmp_path / "whole")]) == 0
    monkeypatch.setattr(page, "write_report", lambda *args, **options: None)
    assert stopped_again_and_again(run, tmp_path / "stopped", monkeypatch)[0] == 0
    (whole,), (stopped,) = ((tmp_path / name).glob("*/*/seed_3") for name in ("whole", "stopped"))
    assert_same_run(whole, stopped)
    results = read_json(whole / "results.json")[0]
    assert [len(row) for row in results["accuracy_matrix"]] == [1, 2, 3, 4]
    assert results["class_order"] == drawn_order(10, 3)
    assert read_json(whole / "config.json")[0]["increment"] == [3, 3, 2]
    report = (whole / "report.html").read_text(encoding="utf-8")
    assert "[3, 3, 2]" in report
