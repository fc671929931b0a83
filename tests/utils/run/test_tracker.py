"""The mirror has every number of metrics.jsonl at its row's number, and forgets what a resumed run cut away."""

import importlib.util
import json

import pytest

import main
from tests.helpers.runs import rows_of, tiny_experiment
from utils.run import tracker
from utils.run.log import RunLog
from utils.run.mirror import About, scalars

pytest.importorskip("tensorboard", reason="pip install tensorboard: the tracker's package is optional")


def mirrored(folder):
    """{tag: [(step, value)]} as TensorBoard reads it, what was purged left out."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_scalars_of_a_row():
    row = {"kind": "merge", "time": 3.0, "task": 1, "layer": 2, "phase": None, "loss": 0.5, "name": "x", "ok": True}
    row |= {"list": [1, None, 3.0], "inner": {"a": 2}, "long": [0] * 65}
    expected = [("loss", 0.5), ("ok", 1.0), ("list/1", 1.0), ("list/3", 3.0), ("inner/a", 2.0)]
    assert list(scalars(row)) == [(f"merge/layer_2/{tag}", value) for tag, value in expected]
    assert list(scalars({"kind": "epoch", "phase": "rd 1", "epoch": 4, "loss": 2})) == [("epoch/rd 1/loss", 2.0)]


def test_rows_that_were_cut_away_are_purged(tmp_path):
    for values, kept in (((1.0, 2.0, 3.0), None), ((20.0, 30.0, 40.0), 1)):
        with RunLog(tmp_path, console=False) as log:
            log.mirror = tracker.of("tensorboard", About(tmp_path, {}, {}), log.rows, log.warn)
            if kept is not None:
                log.truncate_rows(kept)
            for value in values:
                log.row("epoch", loss=value)
    assert mirrored(tmp_path)["epoch/loss"] == [(0, 1.0), (1, 20.0), (2, 30.0), (3, 40.0)]


def test_a_run_mirrors_all_its_rows(tmp_path, monkeypatch):
    out = tmp_path / "logs"
    assert (
        main.main([*tiny_experiment("finetune", tmp_path, monkeypatch, tracker="tensorboard"), "--out", str(out)]) == 0
    )
    (folder,) = out.glob("finetune/*/seed_3")
    found, rows = mirrored(folder), rows_of(folder)
    final = {tag: found.pop(tag) for tag in list(found) if tag.startswith("final/")}
    results = json.loads((folder / "results.json").read_text())
    assert final["final/last_accuracy"] == [(len(rows) - 1, pytest.approx(results["last_accuracy"], rel=1e-6))]
    assert sum(map(len, found.values())) == sum(len(list(scalars(row))) for row in rows) > 10
    for number, row in enumerate(rows):
        for tag, value in scalars(row):
            assert (number, pytest.approx(value, rel=1e-6)) in found[tag]


def test_without_the_package_nothing_starts(tmp_path, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "tensorboard" else real(name, *a))
    out = tmp_path / "logs"
    run = tiny_experiment("finetune", tmp_path, monkeypatch, tracker="tensorboard")
    assert main.main([*run, "--out", str(out)]) == 2
    assert "pip install tensorboard" in capsys.readouterr().err and not out.exists()
    assert main.main([*run, "--check"]) == 2  # what --check passes, runs
    assert "tracker: " in capsys.readouterr().err
