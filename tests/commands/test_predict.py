"""`--predict`: the scores are those of the run's model for its test images, and what cannot be predicted is said at once."""

import csv
import io
import shutil

import pytest
import torch
from PIL import Image

import main
from commands import export, predict, saved
from tests.helpers.runs import few_digits, tiny_run
from utils import data


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two tasks on digits, its export, and a folder of test images with names that must be made harmless."""
    place = tmp_path_factory.mktemp("predict")
    with pytest.MonkeyPatch.context() as patch:
        folder, _ = tiny_run("simplecil", place, patch)
        export.export(folder, place / "export")
    test = few_digits().test
    (place / "images" / "=more").mkdir(parents=True)
    for k, name in enumerate(("b.png", "a\x1b.png", "=more/c.PNG")):
        Image.fromarray(test.images[9 * k].permute(1, 2, 0).numpy()).save(place / "images" / name, format="PNG")
    return folder, place


def rows_of(text):
    return list(csv.reader(io.StringIO(text)))


def test_the_table_has_the_scores_of_the_model_without_its_data(finished, monkeypatch, capsys):
    folder, place = finished
    monkeypatch.setattr(data, "load", lambda *args, **options: few_digits())
    learner, stream = (run := saved.load(folder)).learner, run.stream
    monkeypatch.setattr(data, "load", lambda *args, **options: pytest.fail("the data are not needed"))
    monkeypatch.chdir(place / "images")
    (place / "images" / "notes.txt").touch()
    settings_folder = folder.parent.parent
    assert main.main(["--predict", str(settings_folder), "=more", ".", "notes.txt", "b.png", "--top-k", "10"]) == 0
    captured = capsys.readouterr()
    assert "2 files skipped, since the name is not that of an image: 2 .txt" in captured.err
    header, *rows = rows_of(captured.out)
    assert header == ["path", *(f"{what}_{k}" for k in range(1, 11) for what in ("class", "score"))]
    assert [row[0] for row in rows] == ["'=more/c.PNG", "./=more/c.PNG", "./a\\x1b.png", "./b.png", "b.png"]
    images = few_digits().test.images[[18, 18, 9, 0, 0]].float() / 255
    images = torch.nn.functional.interpolate(images, size=(16, 16), mode="bilinear", antialias=True)
    for row, scores in zip(rows, learner.logits(images), strict=True):
        by_class = dict(zip(row[1::2], map(float, row[2::2]), strict=True))
        assert [by_class[name] for name in stream.class_names] == pytest.approx(scores.tolist(), abs=1e-5)
        assert [float(value) for value in row[2::2]] == sorted(map(float, row[2::2]), reverse=True)


def test_an_export_predicts_the_same_into_a_file_and_in_batches(finished, monkeypatch, tmp_path, capsys):
    folder, place = finished
    out, images = tmp_path / "table.csv", str(place / "images")
    assert main.main(["--predict", str(folder), images]) == 0
    printed = capsys.readouterr().out
    monkeypatch.setattr(predict.saved.Learner, "eval_batch_size", 2)
    assert main.main(["--predict", str(place / "export"), images, "--out", str(out)]) == 0
    assert out.read_text() == printed and len(rows_of(printed)) == 4
    assert capsys.readouterr().out == f"{out}: 3 images\n"


def test_everything_that_cannot_be_read_is_named_at_once(finished, tmp_path, capsys):
    folder, place = finished
    shutil.copytree(place / "images", tmp_path / "images")
    content = (tmp_path / "images" / "b.png").read_bytes()
    (tmp_path / "images" / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "images" / "text.jpg").write_text("no image")
    (tmp_path / "empty").mkdir()
    paths = [str(tmp_path / name) for name in ("images", "gone.png", "empty")]
    assert main.main(["--predict", str(folder), *paths]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "the images: 4 faults" in captured.err
    for name in ("gone.png: no such file", "empty: is a folder without images", "cut.png: is not", "text.jpg: is not"):
        assert name in captured.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["{run}"], "name the images or folders of images behind the run"),
        (["{run}", "{images}", "--top-k", "11"], "--top-k 11: the model knows 10 classes"),
        (["{run}", "{images}", "--out", "{images}"], "is a folder: name the CSV file"),
        (["{run}", "{images}", "--set", "seed=1"], "--predict RUN takes the settings of that run"),
        (["{images}", "{images}"], "is no run folder"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(flags, message, finished, capsys):
    places = {"run": finished[0], "images": finished[1] / "images"}
    assert main.main(["--predict", *(flag.format(**places) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert main.main(["--list", "--top-k", "2"]) == 2


def test_several_finished_runs_are_named(tmp_path):
    for seed in (1, 2):
        (tmp_path / f"seed_{seed}").mkdir()
        (tmp_path / f"seed_{seed}" / "results.json").touch()
    with pytest.raises(ValueError, match=r"holds 2 finished runs: name one, such as .*seed_1, .*seed_2"):
        saved.seed_folder(tmp_path)
