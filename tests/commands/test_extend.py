"""An extended run equals one that knew of all classes from the start; what cannot be extended is refused in a line."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

import main
import models
from commands import extend, saved
from tests.helpers.methods import run
from tests.helpers.runs import TINY, few_digits
from tests.helpers.toy import toy_backbone, toy_dataset, toy_stream
from utils.config.strict_json import read_json
from utils.data.images import ImageArray
from utils.evaluation import scores
from utils.report import page
from utils.run import provenance

REFUSED = {"coda_prompt": "divides its components", "inflora": "depends on the number of all tasks"}


def first_classes(dataset, count):
    """The data set of the first `count` classes, whose rows are the same as in the whole."""

    def cut(images):
        rows = images.labels < count
        return ImageArray(images.images[torch.from_numpy(rows)], images.labels[rows])

    names = dataset.class_names[:count]
    return replace(dataset, class_names=names, train=cut(dataset.train), test=cut(dataset.test))


@pytest.mark.parametrize("method", ["finetune", "simplecil", "ranpac", "nested_lora", "slca"])
def test_what_a_method_learns_further_is_what_it_learns_in_one_go(method, toy_learner):
    whole, order = toy_dataset(classes=8), [3, 0, 5, 2, 4, 1]
    before = toy_stream(first_classes(whole, 6), class_order=order)
    stream = toy_stream(whole, class_order=[*order, 7, 6])
    keys = {"weight_decay": 0.0, "decay_other_rows": False}  # decay shrinks the rows of classes that are not there yet
    in_one_go, short, further = (
        toy_learner(method, num_classes=count, backbone=toy_backbone().double(), **keys) for count in (8, 6, 8)
    )
    run(in_one_go, stream)
    run(short, before)
    further.restore(short.structure())
    further.load_own_state(extend.widened(further.own_state(), short.own_state(), 6, 8, method))
    run(further, stream, first=3)
    ours, theirs = further.own_state(), in_one_go.own_state()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, theirs[name], rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )
    counts = [scores.evaluate(one, stream, 3, torch.device("cpu"))[0] for one in (further, in_one_go)]
    ours_right, theirs_right = ([s.correct for s in of_one] for of_one in counts)
    assert ours_right == theirs_right


def write_digits(folder, classes):
    """Class folders of digits, in train/ and test/."""
    dataset = few_digits()
    for part, images in (("train", dataset.train), ("test", dataset.test)):
        for k, label in enumerate(images.labels.tolist()):
            if label in classes:
                (folder / part / f"digit {label}").mkdir(parents=True, exist_ok=True)
                pixels = images.images[k].permute(1, 2, 0).numpy()
                Image.fromarray(pixels).save(folder / part / f"digit {label}" / f"{k}.png")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder of a finished run on the digits 0 to 4 in tasks of 3 and 2, the place of everything)."""
    place = tmp_path_factory.mktemp("extend")
    write_digits(place / "old", range(5))
    write_digits(place / "new", range(5, 10))
    values = {k: TINY[k] for k in ("seed", "backbone_weights", "image_size", "device")}
    values |= {"model_name": "simplecil", "dataset": "folder", "data_path": str(place / "old"), "num_workers": 0}
    (place / "digits.json").write_text(json.dumps(values | {"init_cls": 3, "increment": 2}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "write_report", lambda *args, **options: None)
        assert main.main(["--config", str(place / "digits.json"), "--out", str(place / "logs")]) == 0
    (folder,) = (place / "logs" / "digits").glob("*/seed_3")
    return folder, place


def test_a_run_goes_on_in_a_folder_of_its_own_and_ends_as_in_one_go(finished, tmp_path, monkeypatch, capsys):
    folder, place = finished
    monkeypatch.setattr(page, "write_report", lambda *args, **options: None)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    flags = ["--set", f"data_path={place / 'new'}", "--set", "increment=[3,2]", "--out", str(tmp_path)]
    command = ["--extend", str(folder.parent), *flags]
    assert main.main(command) == 0
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    (further,) = (tmp_path / "digits_extended").glob("*/seed_3")
    values, results = (read_json(further / name)[0] for name in ("config.json", "results.json"))
    digest = read_json(folder / "results.json")[0]["digest"]
    assert provenance.read(further).now.parent == results["provenance"]["parent"] == digest
    assert values["increment"] == [2, 3, 2] and [sorted(c) for c in (values["class_order"][:5],)] == [[0, 1, 2, 3, 4]]
    assert values["data_path"] == [str(place / "old"), str(place / "new")]
    assert f"begins with the 5 classes of {folder}" in (further / "run.log").read_text()

    (tmp_path / "one.json").write_text(json.dumps(values))
    assert main.main(["--config", str(tmp_path / "one.json"), "--out", str(tmp_path)]) == 0
    (one,) = (tmp_path / "one").glob("*/seed_3")
    in_one_go = read_json(one / "results.json")[0]
    for key in ("accuracy_matrix", "top1_curve", "task_confusion", "class_order", "task_classes", "class_names"):
        assert results[key] == in_one_go[key], key
    ours, theirs = (saved.load(path).learner.state_dict() for path in (further, one))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-7)

    capsys.readouterr()
    assert main.main(command) == 0 and "seed 3 is finished" in capsys.readouterr().out
    other = shutil.copytree(folder, tmp_path / "logs" / "digits" / "hash" / "seed_3")
    changed = provenance.storage.with_digest(read_json(other / "results.json")[0] | {"forgetting": 1.0})
    (other / "results.json").write_text(json.dumps(changed))
    assert main.main(["--extend", str(other), *flags]) == 2
    assert "began from other results than those of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["data_path={new}", "init_cls=2"], "init_cls: RUN has learned with another value"),
        (["increment=2"], "data_path: must name the folder of the new classes"),
        (["data_path={new}x"], "did you mean"),
        (["data_path={old}"], "class digit 0 is in"),
        (["data_path={new}", "increment=[2,2]"], "make 4 classes, but there are 5"),
        (["data_path={new}", "increment=two"], "a whole number or a list of them is expected, got 'two'"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(flags, message, finished, tmp_path, capsys):
    folder, place = finished
    sets = [part for flag in flags for part in ("--set", flag.format(new=place / "new", old=place / "old"))]
    assert main.main(["--extend", str(folder), *sets, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not (tmp_path / "out").exists()


def test_methods_that_plan_for_all_tasks_are_refused():
    for method, reason in REFUSED.items():
        assert reason in models.learner_of(method).cannot_go_on(None)
    with pytest.raises(ValueError, match="x cannot be extended: its state does not grow by classes alone: a, b"):
        extend.widened(
            {"a": torch.zeros(9), "c": torch.zeros(8)},
            {"a": torch.zeros(6), "b": torch.zeros(6), "c": torch.zeros(6)},
            6,
            8,
            "x",
        )
