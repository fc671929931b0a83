"""Where the time goes: each second counts for one section, and nothing else changes."""

import itertools
import json
from functools import partial

import pytest
import torch

import main
from models.learner.base import Learner
from tests.helpers.runs import TINY, rows_of, timeless, tiny_experiment
from utils.config.strict_json import read_json
from utils.files import storage
from utils.process import stopwatch
from utils.process.stopwatch import SECTIONS, Profile
from utils.report import page, plots
from utils.report import profile as report_profile
from utils.run import task as run_task


class Clock:
    """Shows what it is set to, in whole seconds, so that sums are exact."""

    def __init__(self):
        self.now, self.waits = 0.0, 0

    def __call__(self):
        return self.now

    def wait(self):
        self.waits += 1


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def measured(clock, monkeypatch):
    """The profile that the marks find; its prefix ends at layer 2."""
    made = Profile(lambda: 2, clock.wait, clock)
    monkeypatch.setattr(stopwatch, "current", made)
    return made


def spent(made):
    """Parts with time, and with images, of a lap; the parts add up to it."""
    lap = made.lap()
    assert sum(lap["seconds"].values()) == lap["total"] and list(lap["seconds"]) == list(SECTIONS)
    return tuple({name: value for name, value in lap[key].items() if value} for key in ("seconds", "images"))


def test_a_second_belongs_to_the_innermost_part(measured, clock):
    clock.now += 1
    with stopwatch.section("consolidation"):
        clock.now += 2
        with stopwatch.section("data"):
            clock.now += 4
        clock.now += 8
    clock.now += 16
    assert spent(measured) == ({"rest": 17, "consolidation": 10, "data": 4}, {})
    clock.now += 3  # the next lap begins where the last one ended
    assert spent(measured) == ({"rest": 3}, {})


def test_a_pass_leaves_the_prefix_at_its_border(measured, clock):
    def one_pass():
        with stopwatch.section("prefix", 5):
            clock.now += 1  # the stem
            for layer in range(4):
                stopwatch.current.block(layer)
                clock.now += 10
        clock.now += 100  # head and loss

    with stopwatch.section("adapters", 5):
        one_pass()
    with stopwatch.section("backward", 5):
        clock.now += 1000
    assert spent(measured) == (
        {"prefix": 21, "adapters": 120, "backward": 1000},
        {"prefix": 5, "adapters": 5, "backward": 5},
    )
    with stopwatch.section("detection"):  # what it trains is its own; the prefix is told apart everywhere
        with stopwatch.section("adapters", 5):
            one_pass()
        with stopwatch.section("backward", 5):
            clock.now += 1000
    assert spent(measured) == ({"prefix": 21, "detection": 1120}, {"prefix": 5})


def test_waiting_for_batches_is_data_and_working_on_them_is_not(measured, clock):
    def load():
        clock.now += 1
        return slow()

    def slow():
        for size in (3, 2):
            clock.now += 10
            yield torch.zeros(size), torch.zeros(size), torch.zeros(size)

    for _ in stopwatch.waited(load):
        clock.now += 100
    assert spent(measured) == ({"data": 21, "rest": 200}, {"data": 5})


def test_an_error_closes_its_parts(measured, clock):
    with pytest.raises(KeyError), stopwatch.section("evaluation"), stopwatch.section("data"):
        clock.now += 1
        raise KeyError
    clock.now += 2
    assert spent(measured) == ({"data": 1, "rest": 2}, {})


def test_the_device_is_waited_for_only_where_the_part_changes(measured, clock):
    with stopwatch.section("adapters"):
        for layer in (2, 3, 4):
            with stopwatch.section("adapters"):
                stopwatch.current.block(layer)
    assert clock.waits == 2  # into adapters and out again


def test_off_a_mark_is_one_thing_that_does_nothing():
    assert stopwatch.current is None and stopwatch.section("data") is stopwatch.section("backward", 7)
    batches = iter([1, 2])
    assert stopwatch.waited(lambda: batches) is batches


def row(task, whole=True, **seconds):
    images = dict.fromkeys(SECTIONS, 0) | {"adapters": 30, "backward": 30}
    seconds = dict.fromkeys(SECTIONS, 0.0) | seconds
    total = sum(seconds.values())
    return {"kind": "profile", "task": task, "whole": whole, "total": total, "seconds": seconds, "images": images}


ROWS = [row(0, data=1.0, adapters=6.0, backward=3.0), row(1, whole=False, adapters=4.0, evaluation=6.0)]


def test_table_of_the_run():
    assert report_profile.of_run([{"kind": "task"}], 3) is None
    assert report_profile.of_run([{"kind": "task"}, *ROWS], 3).split("\n") == [
        "time of 2 of 3 tasks               seconds   percent  images/s",
        "  data                                1.00       5.0         -",
        "  adapters                           10.00      50.0         6",
        "  backward                            3.00      15.0        20",
        "  evaluation                          6.00      30.0         -",
        "  all                                20.00     100.0         3",
        "  of task 2 only what was spent after the run was resumed",
    ]


@pytest.mark.parametrize("tasks", [1, 5, 60])
def test_picture_stacks_each_tasks_parts(tasks, overlaps):
    figure = plots.times([row(t, **dict.fromkeys(SECTIONS, 1.0 + t)) for t in range(tasks)])
    (axes,) = figure.axes
    tops = [max(b.get_y() + b.get_height() for bars in axes.containers for b in [bars[t]]) for t in range(tasks)]
    assert tops == [len(SECTIONS) * (1.0 + t) for t in range(tasks)]
    assert len({bars[0].get_facecolor() for bars in axes.containers}) == len(SECTIONS)
    assert not overlaps(figure)


def test_colours_stay_with_their_part():
    few, all_of_them = (plots.times([r]).axes[0].containers for r in (ROWS[1], row(0, **dict.fromkeys(SECTIONS, 1.0))))
    by_name = {bars.get_label(): bars[0].get_facecolor() for bars in all_of_them}
    assert [bars.get_label() for bars in few] == ["adapters", "evaluation"]
    assert all(by_name[bars.get_label()] == bars[0].get_facecolor() for bars in few)


# ---------------------------------------------------------------- whole runs


def folder_of(out):
    (folder,) = out.glob("*/*/seed_3")
    return folder


def weights_of(folder):
    return storage.read_state(folder / "checkpoints" / "task_00001.json")[1]


def without_profiles(folder):
    return timeless([row for row in rows_of(folder) if row["kind"] != "profile"])


@pytest.mark.parametrize("method", ["sema", "dylora_moe", "finetune", "simplecil"])
def test_a_profiled_run_is_the_same_run(method, tmp_path, monkeypatch, capsys):
    ticks = itertools.count()
    monkeypatch.setattr(stopwatch, "Profile", partial(Profile, clock=lambda: float(next(ticks))))
    run = tiny_experiment(method, tmp_path, monkeypatch, head="ncm")
    plain, profiled = (tmp_path / name for name in ("plain", "profiled"))
    assert main.main([*run, "--out", str(plain)]) == 0
    assert "time of" not in capsys.readouterr().out and not next(ticks)
    assert main.main([*run, "--profile", "--out", str(profiled)]) == 0
    printed = capsys.readouterr().out
    assert all(f"time of {what} " in printed for what in ("task 1/2", "task 2/2", "2 of 2 tasks"))
    assert stopwatch.current is None

    ours, theirs = folder_of(profiled), folder_of(plain)
    assert ours.parent.name == theirs.parent.name  # no key, hence no other settings hash
    assert timeless(read_json(ours / "results.json")[0]) == timeless(read_json(theirs / "results.json")[0])
    assert without_profiles(ours) == timeless(rows_of(theirs))
    weights, others = weights_of(ours), weights_of(theirs)
    assert weights.keys() == others.keys() and all(torch.equal(weights[k], others[k]) for k in weights)

    rows = [row for row in rows_of(ours) if row["kind"] == "profile"]
    assert [(row["task"], row["whole"]) for row in rows] == [(0, True), (1, True)]
    for row in rows:  # a clock of whole ticks: sums are exact
        assert sum(row["seconds"].values()) == row["total"] > 0
    used = {name for name, seconds in rows[1]["seconds"].items() if seconds}
    trained = set() if method == "simplecil" else {"adapters", "backward"}
    detecting = {"detection"} if method in ("sema", "dylora_moe") else set()
    assert used >= {"data", "prefix", "consolidation", "evaluation", "checkpoint", "rest"} | trained | detecting
    assert used.isdisjoint({"adapters", "backward"} - trained) and ("detection" in used) == bool(detecting)
    shown = sum(r["images"] for r in rows_of(ours) if r["kind"] == "epoch" and r["phase"][:2] != "rd")
    assert sum(row["images"]["adapters"] for row in rows) == sum(row["images"]["backward"] for row in rows) == shown
    assert [row["images"]["evaluation"] for row in rows] == [20, 40]  # four test images a class, all classes so far


@pytest.mark.parametrize("stopped_in", [(run_task, "score"), (Learner, "consolidate")], ids=["learned", "inside"])
def test_a_resumed_task_counts_what_this_process_spent(stopped_in, tmp_path, monkeypatch, capsys):
    run = [*tiny_experiment("finetune", tmp_path, monkeypatch), "--out", str(tmp_path / "logs")]

    def stop(*rest):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*stopped_in, stop)
        assert main.main([*run, "--profile"]) == 75
    assert stopwatch.current is None
    assert main.main([*run, "--profile"]) == 0
    rows = [row for row in rows_of(folder_of(tmp_path / "logs")) if row["kind"] == "profile"]
    assert [(row["task"], row["whole"]) for row in rows] == [(0, False), (1, True)]
    assert rows[0]["seconds"]["backward"] == 0 < rows[0]["seconds"]["evaluation"]
    assert "of task 1 only what was spent after the run was resumed" in capsys.readouterr().out
    assert main.main([*run, "--profile"]) == 0
    assert "--profile has nothing to measure" in capsys.readouterr().out


def test_rows_of_finished_tasks_survive_an_interruption(tmp_path, monkeypatch):
    run = [*tiny_experiment("finetune", tmp_path, monkeypatch), "--out", str(tmp_path / "logs"), "--profile"]
    learn = run_task.learn

    def stop(learner, stream, index, *rest):
        if index == 1:
            raise KeyboardInterrupt
        return learn(learner, stream, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(run_task, "learn", stop)
        assert main.main(run) == 75
    assert main.main(run) == 0
    rows = [row for row in rows_of(folder_of(tmp_path / "logs")) if row["kind"] == "profile"]
    assert [(row["task"], row["whole"]) for row in rows] == [(0, True), (1, True)]


def test_report_has_picture_and_numbers(tmp_path, monkeypatch):
    write = page.write_report
    run = [*tiny_experiment("simplecil", tmp_path, monkeypatch), "--out", str(tmp_path / "logs"), "--profile"]
    monkeypatch.setattr(page, "write_report", write)
    assert main.main(run) == 0
    folder = folder_of(tmp_path / "logs")
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "<h2>Where the time went</h2>" in text and 'aria-label="profile"' in text and SECTIONS["prefix"] in text
    assert (folder / "plots" / "profile.png").read_bytes().startswith(b"\x89PNG")
    results, settings = (read_json(folder / name)[0] for name in ("results.json", "config.json"))
    page.write_report(folder, results, settings, {}, rows=[])
    assert "Where the time went" not in (folder / "report.html").read_text(encoding="utf-8")
    assert not (folder / "plots" / "profile.png").exists()


@pytest.mark.parametrize("other", [["--check"], ["--evaluate", "x"], ["--list"]], ids=" ".join)
def test_profile_goes_with_a_run(other, tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(TINY), encoding="utf-8")
    config = ["--config", str(path)] if other[0] == "--check" else []
    assert main.main([*config, *other, "--profile"]) == 2
    assert "--profile measures a run" in capsys.readouterr().err


def test_on_a_gpu_the_run_waits_for_it(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    for name, expected in (("cpu", []), ("cuda:1", [torch.device("cuda:1")] * 2)):
        with stopwatch.running(True, lambda: 0, torch.device(name)), stopwatch.section("data"):
            pass
        assert waited == expected
    with stopwatch.running(False, lambda: 0, torch.device("cpu")):
        assert stopwatch.current is None
