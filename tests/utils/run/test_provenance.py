"""Provenance: what a run depends on is recorded, and the same command notices every kind of change to it."""

import dataclasses
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import main
from utils.files import storage
from utils.run import provenance
from utils.run.provenance import Identity, Provenance, Recorded

NOW = Provenance(
    1, "settings", ("a", "b"), (4, 2), "data", "stamp", "weights", (10, 20), {"models/mine.py": "1"}, {"torch": "2"}
)


def picture(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(value).integers(0, 40, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise + np.uint8(10 * (value % 20))).save(path)  # BMP: every file has the same size


@pytest.fixture
def experiment(tmp_path):
    """Function: the same command on class folders of pictures. It returns the exit code."""
    for c in range(4):
        for part, count in (("train", 4), ("test", 2)):
            for i in range(count):
                picture(tmp_path / "data" / part / f"c{c}" / f"{part}{i}.bmp", 5 * c + i + 100 * (part == "test"))
    values = {
        "model_name": "simplecil", "dataset": "folder", "data_path": str(tmp_path / "data"), "init_cls": 2, "increment": 2,
        "backbone_weights": "random", "image_size": 16, "seed": [1], "device": "cpu", "num_workers": 0, "shuffle": False,
    }  # fmt: skip
    file = tmp_path / "run.json"
    file.write_text(json.dumps(values))

    def run(*more):
        return main.main(["--config", str(file), "--out", str(tmp_path / "out"), *more])

    return run


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr("utils.report.page.write_report", lambda *args, **options: None)


def folder_of(tmp_path, seed=1):
    (folder,) = tmp_path.glob(f"out/run/*/seed_{seed}")
    return folder


def swap(one, other):
    """Two folders change places: names, sizes and times of the files stay the same set."""
    one.rename(one.with_name("between"))
    other.rename(one)
    one.with_name("between").rename(other)


# ---------------------------------------------------------------- finished runs


def test_a_finished_run_is_not_shown_for_other_data_classes_or_weights(experiment, tmp_path, capsys):
    train = tmp_path / "data" / "train"
    assert experiment() == 0 and experiment() == 0
    shown = capsys.readouterr()
    assert "seed 1 is finished" in shown.out and "warning" not in shown.err
    folder = folder_of(tmp_path)
    results = json.loads((folder / "results.json").read_text())
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}

    def refused(words):
        assert experiment() == 2
        shown = capsys.readouterr()
        assert words in shown.err and "--resume never" in shown.err and shown.err.count("\n") == 1, shown.err
        assert "mean" not in shown.out

    swap(train / "c0", train / "c1")
    refused("8 images ('train/c0/train0.bmp'")
    swap(train / "c0", train / "c1")
    one = train / "c1" / "train2.bmp"
    content = one.read_bytes()
    one.write_bytes(content[:-1] + b"x")  # as large as before
    refused("the data changed since: 1 image ('train/c1/train2.bmp') with other contents")
    one.write_bytes(content)
    os.utime(one, ns=(5, 5))  # another time alone: the content decides
    assert experiment() == 0 and "warning" not in capsys.readouterr().err
    (train / "c1" / "new.bmp").write_bytes(content)
    refused("1 image ('train/c1/new.bmp') added")
    (train / "c1" / "new.bmp").unlink()
    for part in ("train", "test"):
        (tmp_path / "data" / part / "c0").rename(tmp_path / "data" / part / "zz")
    refused("class 'c0' is now 'zz'")
    shutil.rmtree(tmp_path / "data")
    assert experiment() == 0 and "its data are not on this machine" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    assert results["provenance"]["data"] and len(results["provenance"]["content"]) == 16


def test_other_seeds_form_no_row_with_a_run_on_other_data(experiment, tmp_path, capsys):
    assert experiment() == 0
    picture(tmp_path / "data" / "test" / "c0" / "test0.bmp", 77)
    assert experiment("--set", "seed=[1,2]") == 2
    assert "seed 1 is finished, but the data changed" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/run/*/seed_2"))
    assert experiment("--set", "seed=[2]") == 0  # alone it is a result of its data
    assert experiment("--set", "seed=[1,2]", "--jobs", "2") == 2
    assert "seed 1 is finished, but the data changed" in capsys.readouterr().err
    assert main.main(["--compare", str(tmp_path / "out"), "--out", str(tmp_path)]) == 2
    assert "seed 1 and seed 2 ran with different images, so no mean" in capsys.readouterr().err


def test_changed_results_are_written_again_and_never_shown(experiment, tmp_path, capsys):
    assert experiment() == 0
    path = folder_of(tmp_path) / "results.json"
    whole = path.read_text()
    values = json.loads(whole)
    for content in (
        json.dumps(values | {"last_accuracy": 99.0}),
        whole[: len(whole) // 2],
        json.dumps({**values, "digest": "0"}),
    ):
        path.write_text(content)
        assert main.main(["--compare", str(path.parent), "--out", str(tmp_path)]) == 2
        assert f"{path} is " in capsys.readouterr().err
        assert experiment() == 0
        assert "finished anew" in capsys.readouterr().err and json.loads(path.read_text()) == values
    path.write_text(json.dumps(values, indent=4, sort_keys=True))  # another layout is no other result
    assert experiment() == 0 and "warning" not in capsys.readouterr().err
    shutil.rmtree(path.parent / "checkpoints")
    path.write_text(json.dumps(values | {"last_accuracy": 99.0}))
    assert experiment() == 2
    assert "no checkpoint from which it could be written again" in capsys.readouterr().err


# ---------------------------------------------------------------- stopped runs


def test_a_stopped_run_goes_on_with_a_repaired_image_and_refuses_changed_ones(experiment, tmp_path, capsys):
    train = tmp_path / "data" / "train"
    late, early = train / "c3" / "train1.bmp", train / "c0" / "train1.bmp"
    good, used = late.read_bytes(), early.read_bytes()
    late.write_bytes(good[:100])  # its header is whole: the run finds out when it decodes it
    assert experiment() == 2 and "is not a readable image" in capsys.readouterr().err
    folder = folder_of(tmp_path)
    assert (folder / "checkpoints" / "task_00000.json").is_file()
    late.write_bytes(good)  # the run had not read it: no number depends on what it was
    for change, undo, words in (
        (lambda: early.write_bytes(used[:-3] + b"abc"), lambda: early.write_bytes(used), "with other contents"),
        (
            lambda: early.rename(early.with_name("x.bmp")),
            lambda: early.with_name("x.bmp").rename(early),
            "added and 1 image",
        ),
        (lambda: swap(train / "c0", train / "c3"), lambda: swap(train / "c0", train / "c3"), "with other contents"),
    ):
        change()
        assert experiment() == 2
        said = capsys.readouterr().err
        assert "the data changed since this run began" in said and words in said and "--resume never" in said
        undo()
    assert experiment() == 0
    shown = capsys.readouterr()
    assert "resumed" in shown.out and "1 image (train/c3/train1.bmp) written again before this run read it" in shown.err
    fresh = json.loads((folder / "results.json").read_text())
    assert experiment("--resume", "never") == 0
    again = json.loads((folder_of(tmp_path) / "results.json").read_text())
    assert fresh["accuracy_matrix"] == again["accuracy_matrix"] and fresh["provenance"] == again["provenance"]


def test_states_of_another_seed_are_refused_and_code_that_changed_is_said(experiment, tmp_path, capsys, monkeypatch):
    late = tmp_path / "data" / "train" / "c3" / "train1.bmp"
    good = late.read_bytes()
    late.write_bytes(good[:100])  # its header is whole: the run finds out when it decodes it
    assert experiment("--set", "seed=[1,2]") == 2
    late.write_bytes(good)
    folder = folder_of(tmp_path)
    other = folder.with_name("seed_2")
    other.mkdir()
    shutil.copytree(folder / "checkpoints", other / "checkpoints")
    assert experiment("--set", "seed=[2]") == 2
    assert "is the saved state of another run (seed 1 there, 2 here)" in capsys.readouterr().err
    record = provenance.read(folder)
    edited = dataclasses.replace(record.now, sources={**record.now.sources, "models/simplecil.py": "0"})
    provenance.write(folder, dataclasses.replace(record, now=edited))
    assert experiment() == 0
    words = "source files of the method changed: models/simplecil.py; the run goes on with them"
    assert words in capsys.readouterr().err
    assert json.loads((folder / "results.json").read_text())["provenance"]["changes"] == [words]
    (folder / provenance.FILE).unlink()
    assert experiment() == 0
    assert "seed 1: recorded no provenance" in capsys.readouterr().err
    provenance.write(folder, Recorded(edited))
    text = (folder / provenance.FILE).read_text().replace('"weights": "', '"weights": "0')
    (folder / provenance.FILE).write_text(text)
    assert experiment() == 2 and "provenance.json is damaged" in capsys.readouterr().err


# ---------------------------------------------------------------- parts


def test_the_record_comes_back(tmp_path):
    for recorded in (Recorded(NOW), Recorded(dataclasses.replace(NOW, weight_file=None), ("a",), ("b\udce9",))):
        provenance.write(tmp_path, recorded)
        assert provenance.read(tmp_path) == recorded
    assert provenance.read(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 2}, "seed 2 there, 1 here"),
        ({"settings": "x"}, "settings x there, settings here"),
        ({"data": "x"}, "computed from other data"),
        ({"weights": "x"}, "weights changed since this run began"),
    ],
)
def test_a_saved_state_names_its_run(changes, words, tmp_path):
    here = NOW.identity()
    here.refuse_others(here.facts(), tmp_path)
    here.refuse_others({"weight_hash": "weights"}, tmp_path)  # a state of an older version
    with pytest.raises(ValueError, match=words):
        here.refuse_others(dataclasses.replace(here, **changes).facts(), tmp_path)
    with pytest.raises(ValueError, match="seed 3 there"):
        here.refuse_others({"weight_hash": "weights", "record": {"seed": 3}}, tmp_path)
    Identity("weights").refuse_others(here.facts(), tmp_path)


def test_a_stopped_run_names_both_weights_and_both_seeds(tmp_path):
    """Before a saved state is read: the record of the run is compared."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "task_00000.json").write_text("{}")
    provenance.write(tmp_path, Recorded(NOW))
    same = SimpleNamespace(stamp=NOW.stamp, digest=NOW.data)
    assert provenance._against_before(tmp_path, NOW, same) == (True, [], [], [], [])
    now = dataclasses.replace(NOW, weights="other", seed=NOW.seed + 1)
    _, faults, *_ = provenance._against_before(tmp_path, now, same)
    assert faults == [
        f"provenance.json is of another run (seed {NOW.seed}, settings {NOW.settings})",
        f"the backbone's weights changed since this run began ({NOW.weights} then, other now)",
    ]


def test_seeds_that_mix(tmp_path):
    def results(**changes):
        whole = {"data": "d", "content": "c", "weights": "w", "sources": "s", "versions": {"torch": "2"}}
        return {"provenance": whole | changes}

    same = {1: results(), 2: results(), 3: {}}
    assert provenance.mixed(same) == ([], [])
    assert provenance.mixed({**same, 4: results(weights="x")})[0] == [
        "seeds 1, 2 and seed 4 ran with different backbone weights"
    ]
    assert provenance.mixed({**same, 4: results(versions={})}) == (
        [],
        ["seeds 1, 2 and seed 4 ran with different versions"],
    )


def test_what_differs_in_code():
    assert provenance.code_differs(NOW, NOW.sources, NOW.versions) == []
    texts = provenance.code_differs(NOW, {"models/mine.py": "2", "models/more.py": "1"}, {"torch": "3"})
    assert texts == [
        "source files of the method changed: models/mine.py, models/more.py",
        "versions changed: torch 2 then, 3 now",
    ]


def test_a_digest_covers_every_value_and_no_layout():
    values = storage.with_digest({"b": [1, 0.1, None], "a": {"x": "ä"}})
    assert (
        list(values) == ["b", "a", "digest"] and storage.digest_of(json.loads(json.dumps(values))) == values["digest"]
    )
    assert storage.digest_of({**values, "b": [1, 0.2, None]}) != values["digest"]
