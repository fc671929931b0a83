"""A run folder comes back as the learner that wrote it, bit for bit, or is refused with the reason."""

import json
import shutil

import numpy as np
import pytest
import torch

import main
from commands import saved
from tests.helpers.methods import METHODS
from tests.helpers.runs import few_digits, tiny_run
from utils import data
from utils.evaluation import scores as evaluation
from utils.run.log import RunLog


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("method", METHODS)
def test_a_finished_run_of_any_method_comes_back_bit_for_bit(method, tmp_path, monkeypatch):
    folder, learner = tiny_run(method, tmp_path, monkeypatch)
    before = contents(folder)
    run = saved.load(str(folder))
    assert contents(folder) == before  # reading changes nothing
    assert (run.task, run.notes, run.learner.structure()) == (1, [], learner.structure())
    ours, theirs = run.learner.state_dict(), learner.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert not run.learner.training and not any(p.requires_grad for p in run.learner.parameters())
    scores, _ = evaluation.evaluate(run.learner, run.stream, run.task, torch.device("cpu"))
    assert [s.correct for s in scores] == run.record["correct"][-1]
    written = json.loads((folder / "results.json").read_text())
    assert written["accuracy_matrix"][-1] == pytest.approx([100 * s.correct / s.samples for s in scores])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield tiny_run("finetune", tmp_path_factory.mktemp("saved"), patch)[0]


@pytest.fixture
def folder(finished, tmp_path, monkeypatch):
    dataset = few_digits()
    monkeypatch.setattr(data, "load", lambda *args, **options: dataset)
    return shutil.copytree(finished, tmp_path / "seed_3")


def test_an_unfinished_run_comes_back_as_after_its_last_task(folder):
    (folder / "results.json").unlink()
    (folder / "checkpoints" / "task_00001.json").unlink()
    run = saved.load(str(folder))
    assert (run.task, run.learner.seen, len(run.record["correct"])) == (0, 5, 1)


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(folder):
    path = folder / "checkpoints" / "task_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    run = saved.load(str(folder))
    assert run.task == 0 and len(run.notes) == 1 and "task_00001" in run.notes[0]


def test_with_a_log_it_can_learn_on(folder, tmp_path):
    (folder / "checkpoints" / "task_00001.json").unlink()
    with RunLog(tmp_path / "other", console=False) as log:
        run = saved.load(folder, log=log)
        task = run.stream.task(1)
        run.learner.begin_task()
        run.learner.learn(task)
        run.learner.consolidate(task)
    assert run.learner.seen == 10 and log.rows > 0


def test_what_is_no_run_is_refused_with_what_is_near(folder, tmp_path):
    with pytest.raises(ValueError, match=r"seed_4 is no run folder: it has no config.json; did you mean .*seed_3'"):
        saved.load(folder.with_name("seed_4"))
    with pytest.raises(ValueError, match=r"is no run folder: .*; it holds the runs .*seed_3"):
        saved.load(tmp_path)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(ValueError, match="the run has no whole checkpoint"):
        saved.load(folder)


def changed(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values), encoding="utf-8")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 24}, r"the run has backbone weights [0-9a-f]{16}, embedded \(random\) here is [0-9a-f]{16}"),
        ({"class_order_seed": 8}, "the run had 10 classes in another order"),
        ({"ffn_num": 5}, "the saved state does not fit this models.finetune: of another shape"),
        ({"model_name": "finetun"}, "did you mean 'finetune'"),
        ({"seed": [3, 4]}, "names 2 seeds: it is an experiment file"),
    ],
)
def test_a_run_that_no_longer_fits_is_refused(folder, values, message):
    changed(folder, **values)
    with pytest.raises(ValueError, match=message):
        saved.load(folder)


def test_another_data_root_is_used(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(data, "load", lambda *args, **options: asked.append(options["root"]) or few_digits())
    saved.load(folder, data_root="elsewhere")
    assert [str(root) for root in asked] == ["elsewhere"]


# main.py --evaluate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sema", "dylora_moe", "simplecil"])
def test_a_saved_run_is_scored_again_with_the_same_numbers(method, tmp_path, monkeypatch, capsys):
    folder, _ = tiny_run(method, tmp_path, monkeypatch)
    before = contents(folder)
    capsys.readouterr()
    assert main.main(["--evaluate", str(folder), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    results = json.loads((folder / "results.json").read_text())
    assert lines[0].endswith(f"{method} on digits after task 2/2") and lines[-1] == "every number is as recorded"
    assert [line.split()[0] for line in lines[1:-1]] == ["task", "1", "2", "all"]
    assert [float(line.split()[4]) for line in lines[2:4]] == pytest.approx(results["accuracy_matrix"][1])
    assert contents(folder) == before


def test_predictions_of_every_test_image_in_a_file(tmp_path, monkeypatch, capsys):
    """Those that the run writes and those of --evaluate are the same, and the results follow from them."""
    folder, _ = tiny_run("finetune", tmp_path, monkeypatch, predictions="tasks")
    results = json.loads((folder / "results.json").read_text())
    files = sorted(path.name for path in (folder / "predictions").iterdir())
    assert files == ["task_1.npz", "task_2.npz"] and not (folder / "predictions.npz").exists()
    with np.load(folder / "predictions" / "task_2.npz", allow_pickle=False) as file:
        run = dict(file)
    assert run["scores"].shape == (40, 10) and run["scores"].dtype == np.float32
    assert run["predictions"].tolist() == run["scores"].argmax(axis=1).tolist()
    assert 100 * (run["predictions"] == run["labels"]).mean() == pytest.approx(results["last_accuracy"])
    assert run["classes"].tolist() == results["class_order"] and run["class_tasks"].tolist() == [0] * 5 + [1] * 5
    assert run["class_names"].tolist() == [results["class_names"][c] for c in results["class_order"]]
    assert sorted(run["rows"].tolist()) == list(range(40)) and run["images"][0] == f"row {run['rows'][0]}"
    assert few_digits().test.labels[run["rows"]].tolist() == run["classes"][run["labels"]].tolist()
    worst = results["mistakes"][0]
    (place,) = np.flatnonzero(run["rows"] == worst["row"])
    scores = run["scores"][place].astype(float)
    assert scores.max() - scores[run["labels"][place]] == pytest.approx(worst["margin"])

    capsys.readouterr()
    again = tmp_path / "again.npz"
    assert main.main(["--evaluate", str(folder), "--device", "cpu", "--out", str(again)]) == 0
    with np.load(again, allow_pickle=False) as file:
        for name in run:
            same = np.testing.assert_allclose if name == "scores" else np.testing.assert_array_equal
            same(file[name], run[name], **({"atol": 1e-5} if name == "scores" else {}))
    assert main.main(["--evaluate", str(folder), "--out", str(tmp_path / "x.csv")]) == 2
    assert "a file FILE.npz is expected" in capsys.readouterr().err

    # the same command with the other value: nothing is computed again, and that no file was written is said
    values = json.loads((tmp_path / "finetune.json").read_text()) | {"predictions": "last"}
    (tmp_path / "finetune.json").write_text(json.dumps(values))
    assert main.main(["--config", str(tmp_path / "finetune.json"), "--out", str(tmp_path / "logs")]) == 0
    assert "it wrote no predictions: --evaluate" in capsys.readouterr().out


def test_other_numbers_are_told_with_exit_code_1(tmp_path, monkeypatch, capsys):
    folder, _ = tiny_run("simplecil", tmp_path, monkeypatch)
    monkeypatch.setattr(evaluation, "evaluate", lambda *args: ([evaluation.metrics.Score(20, 0, 0, 0)] * 2, []))
    capsys.readouterr()
    assert main.main(["--evaluate", str(folder), "--device", "cpu"]) == 1
    told = capsys.readouterr()
    assert told.out.count("differs") == 2 and told.err.startswith("numbers differ from those recorded")


def test_what_cannot_be_evaluated_is_one_line(tmp_path, capsys):
    assert main.main(["--evaluate", str(tmp_path / "nothing")]) == 2
    assert "is no run folder" in capsys.readouterr().err
    assert main.main(["--evaluate", str(tmp_path), "--set", "seed=1"]) == 2
    assert capsys.readouterr().err == (
        "error: --evaluate RUN takes the settings of that run: --config and --set do not go with it\n"
    )
