"""--check: what passes it, runs; every fault at once; classes, counts and names of a folder of images."""

import json

import pytest
from PIL import Image

import main
from commands.check_tables import split_table
from utils import data
from utils.data import images


@pytest.fixture
def checked(tmp_path, capsys):
    """Function: (exit code, output, errors) of --check on six classes of class folders, with more flags."""
    for k in range(24):
        path = tmp_path / "data" / ("train", "test")[k % 4 == 0] / "abcdef"[k % 6] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (10 * k, k, 0)).save(path)
    for k, name in enumerate("bdf"):
        path = tmp_path / "data" / "test" / name / "x.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (0, k, 200)).save(path)
    values = {"model_name": "simplecil", "dataset": "folder", "data_path": str(tmp_path / "data"), "device": "cpu"}
    (tmp_path / "run.json").write_text(json.dumps(values | {"init_cls": 2, "increment": 2, "image_size": 32}))

    def run(*more):
        code = main.main(["--config", str(tmp_path / "run.json"), *more])
        return (code, *capsys.readouterr())

    return run


def test_classes_counts_and_names(checked, tmp_path):
    code, shown, errors = checked("--check")
    assert (code, errors) == (0, "") and shown.rstrip().endswith("the settings are valid")
    assert f"data (6 classes in {tmp_path / 'data'}, the header of every image read)" in shown
    assert "  training images        18   a class 2 (a) to 4, median 3" in shown
    assert "  test images             9   a class 1 (b) to 2, median 2" in shown
    assert "  classes         a, b, c, d, e, f\n" in shown
    assert "\n    1:   2 classes  0 a, 2 c\n" in shown


def test_every_fault_at_once(checked, tmp_path):
    (tmp_path / "data" / "train" / "z").mkdir()
    (tmp_path / "data" / "test" / "z").mkdir()
    whole = (tmp_path / "data" / "train" / "b" / "1.png").read_bytes()
    (tmp_path / "data" / "train" / "b" / "1.png").write_bytes(whole[:40])
    (tmp_path / "data" / "test" / "b" / "x.png").write_bytes(b"<html>404")
    words = (
        "train/z: is a class folder without images",
        "test/z: is a",
        "b/1.png: is not a readable image",
        "a web page",
    )
    more = (
        "--set",
        "backbone_type=vit_tiny_patch16_224",
        "--set",
        "backbone_weights=gone.pth",
        "--set",
        "device=cuda:99",
    )
    code, shown, errors = checked("--check", *more, "--set", "image_size=224")
    assert "note: skip_broken=true leaves such files out" in shown
    assert code == 2 and all(word in errors for word in (*words, "gone.pth", "'cuda:99'"))
    assert errors.startswith("error: ") and errors.count("\n  - ") == 6
    code, _, errors = checked()  # the run refuses the same
    assert code == 2 and all(word in errors for word in words)


def test_full_decodes_every_image(checked, monkeypatch):
    decoded = []
    monkeypatch.setattr("utils.data.inspection.decode", lambda path: decoded.append(path) or images.decode(path))
    assert checked("--check")[0] == 0 and not decoded
    code, shown, _ = checked("--check", "full")
    assert code == 0 and len(decoded) == 27 and "every image decoded)" in shown
    with pytest.raises(SystemExit):
        checked("--check", "most")


def test_what_is_not_here_is_no_fault_but_a_misspelt_path_is(checked, tmp_path):
    code, shown, _ = checked(
        "--check", "--set", "dataset=vtab", "--set", "data_path=null", "--data-root", str(tmp_path)
    )
    assert code == 0 and "what is missing on this machine is listed above" in shown
    code, _, errors = checked("--check", "--set", f"data_path={tmp_path}/dta")
    assert code == 2 and f"no folder {tmp_path}/dta" in errors


def test_short_shows_what_is_not_default_and_the_ends_of_many_tasks(checked, tmp_path):
    more = ("--set", "init_cls=1", "--set", "increment=1", "--set", "head=ncm", "--set", "shuffle=false")
    code, shown, _ = checked("--check", *more)
    assert code == 0
    settings, rest = shown.split("\ndata        folder in ")
    keys = {line.split()[0]: line.split(maxsplit=1)[1] for line in settings.splitlines()[1:]}
    assert keys.pop("data_path").startswith('"') and keys == {
        "model_name": '"simplecil"', "dataset": '"folder"', "init_cls": "1", "increment": "1", "device": '"cpu"',
        "image_size": "32", "shuffle": "false",
    }  # fmt: skip
    assert f"({len(keys) + 1} of " in settings.splitlines()[0]  # head ncm is simplecil's default
    assert rest.splitlines()[0] == str(tmp_path / "data")
    assert "weights     embedded, pretrained" in rest and "(default)" not in shown
    assert checked("--check", "headers")[1].count("(default)") > 20


def test_many_tasks_are_cut_to_the_first_and_the_last():
    sizes = [2] * 9
    lines = split_table(sizes, list(range(18)), "source", most=6).splitlines()
    assert lines[0] == "tasks (18 classes in 9 tasks, source)"
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["1", "2", "3", "4", "5", "... 3 more", "9"]
    assert lines[-1].split() == ["9:", "2", "classes", "16", "17"]
    assert len(split_table(sizes, list(range(18)), "source").splitlines()) == 10
    assert len(split_table([2] * 6, list(range(12)), "source", most=6).splitlines()) == 7


@pytest.mark.parametrize("name", ["icons", "fashion"])
def test_names_of_shipped_sets_are_those_of_a_run(name):
    assert list(data.shipped_names(name)) == data.load(name).class_names and data.shipped_names("digits") == ()
