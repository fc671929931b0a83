"""--tune: scores on held-out training images of the first tasks, opens no test image, and writes a file that loads and runs."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import main
import models
from backbone import weights
from benchmarks import tune as benchmark
from models.learner.start_values import SeededInit
from tests.helpers.runs import few_digits, tiny_experiment
from tests.helpers.toy import toy_dataset
from utils import data
from utils.config import tuning
from utils.config.strict_json import read_json
from utils.data import digits, held_out, images
from utils.data.tasks import TaskStream
from utils.process.seeds import seed_everything
from utils.run.log import RunLog

SPACE = {"init_lr": [1e-9, 0.05], "epochs": [1, 2]}


class Untouchable:
    """A test set: whoever asks it for anything reads test data."""

    def __getattr__(self, name):
        raise AssertionError(f"test data were asked for {name}")

    __len__ = __iter__ = __getitem__ = lambda self, *_: self.__getattr__("items")


def plain_score(values, dataset, seed, tasks, place) -> tuple[float, float]:
    """(average, last accuracy in percent) of a run by a loop of its own: image by image, over the classes seen."""
    cfg = models.settings_of("finetune")(**values)
    backbone, facts = weights.build(cfg)
    stream = TaskStream.of(cfg, dataset, seed, facts.image_size)
    curve = []
    with RunLog(place, console=False) as log:
        learner = models.learner_of("finetune")(cfg, backbone, 10, SeededInit(seed), log)
        for index in range(tasks):
            seed_everything(seed, "task", index)
            learner.begin_task()
            task = stream.task(index)
            learner.learn(task)
            learner.consolidate(task)
            learner.eval()
            right = []
            for earlier in range(index + 1):
                for image, label, *_ in stream.test(earlier).batches(1, augment=False, shuffle=False):
                    with torch.inference_mode():
                        right.append(bool(learner.logits(image).argmax() == label))
            curve.append(100 * sum(right) / len(right))
    return sum(curve) / len(curve), curve[-1]


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """(arguments of a tiny run of fine-tuning, its training images); its test images cannot be touched."""
    run = tiny_experiment("finetune", tmp_path, monkeypatch, init_cls=4, increment=3, seed=[3, 4])
    whole = few_digits()
    monkeypatch.setattr(data, "load", lambda *args, **options: replace(whole, test=Untouchable()))
    return [*run, "--out", str(tmp_path / "logs")], whole


def test_the_best_setting_on_held_out_images_becomes_a_file_that_runs(experiment, tmp_path, monkeypatch, capsys):
    run, whole = experiment
    declared = json.dumps({"space": SPACE, "tasks": 2, "seeds": [3, 5], "held_out": 0.25})
    assert main.main([*run, "--set", f"tune={declared}", "--tune"]) == 0
    shown = capsys.readouterr().out
    assert "4 settings of 2 seeds, 2 tasks of each, scored on 20 held-out training images of the set" in shown
    (path,) = tmp_path.glob("logs/finetune/tune_*/finetune_tuned.json")
    values, faults = read_json(path)
    tuned = values["tuned"]
    assert not faults and tuned["space"] == SPACE and (tuned["tasks"], tuned["seeds"]) == (2, [3, 5])
    parted, facts = held_out.split(replace(whole, test=Untouchable()), 0.25)
    assert tuned["held_out"] == facts and facts["images"] == 20

    # every score is that of a plain loop over the held-out images; the first of the best is chosen
    settings = {k: v for k, v in values.items() if k not in ("tuned", "about", "init_lr", "epochs")}
    for row, seed in ((tuned["scores"][0], 3), (tuned["scores"][3], 5)):
        plain = plain_score(settings | row["setting"], parted, seed, 2, tmp_path / f"plain {seed}")
        assert (row["average"][str(seed)], row["last"][str(seed)]) == pytest.approx(plain, abs=1e-3)
    means = [sum(row["average"].values()) / 2 for row in tuned["scores"]]
    assert tuned["chosen"] == tuned["scores"][means.index(max(means))]["setting"]
    assert len(set(means)) > 1
    assert (values["init_lr"], values["epochs"]) == tuple(tuned["chosen"].values())

    # it loads and runs, on the real test set; its folder is that of the same settings written by hand
    monkeypatch.setattr(data, "load", lambda *args, **options: whole)
    assert main.main(["--config", str(path), "--out", str(tmp_path / "again"), "--set", "seed=3"]) == 0
    (folder,) = (tmp_path / "again").glob("finetune_tuned/*/seed_3")
    assert read_json(folder / "config.json")[0]["tuned"] == tuned
    by_hand = tmp_path / "by_hand.json"
    by_hand.write_text(json.dumps({k: v for k, v in values.items() if k != "tuned"}), encoding="utf-8")
    from commands import load

    args = SimpleNamespace(config=by_hand, set=[], data_root=None, device=None)
    assert load.load(args).cells[0].resolved.hash == folder.parent.name


def test_the_flag_has_its_own_space_and_the_first_seed_and_task_are_the_default(experiment, tmp_path, capsys):
    run, _ = experiment
    assert main.main([*run, "--tune", "rank=[2,4]"]) == 0
    assert "2 settings of 1 seed, 1 task of each" in capsys.readouterr().out
    (path,) = tmp_path.glob("logs/finetune/tune_*/finetune_tuned.json")
    tuned = read_json(path)[0]["tuned"]
    assert (tuned["space"], tuned["seeds"], tuned["tasks"]) == ({"rank": [2, 4]}, [3], 1)
    assert read_json(path)[0]["ffn_num"] == tuned["chosen"]["rank"]


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        (["--tune"], "tune: a space is needed"),
        (["--tune", "init_lr"], "--tune init_lr: key=value is expected"),
        (["--tune", "init_lr=0.1"], "tune: space.init_lr: a list is expected; got 0.1"),
        (["--tune", "init_lr=[0.1,-1]"], "init_lr: must be greater than 0; got -1"),
        (["--tune", "init_lrr=[0.1]"], "did you mean 'init_lr'"),
        (["--tune", "increment=[1,2]"], "tune: increment: decides data, tasks or seeds and cannot be tuned"),
        (
            ["--tune", "ffn_num=[2]", "--set", 'sweep={"epochs":[1]}'],
            "sweep: --tune has its space in the place of a sweep",
        ),
        (["--set", 'tune={"task":1}'], "tune: task: unknown; known are space, tasks, seeds, held_out"),
        (["--set", 'tune={"seeds":[1,1]}'], "tune: seeds: different seeds in 0..4294967295 are expected; got [1, 1]"),
        (["--set", "tune=3", "--check"], "tune: an object such as"),
    ],
)
def test_what_is_wrong_with_a_space_is_said_before_any_work(experiment, more, fault, capsys):
    assert main.main([*experiment[0], *more]) == 2
    shown = capsys.readouterr().err
    assert fault in shown and "Traceback" not in shown


def test_a_class_of_one_image_has_none_to_hold_out_and_a_setting_that_selects_on_test_data_is_refused(
    experiment, tmp_path, monkeypatch, capsys
):
    run, whole = experiment
    keep = np.flatnonzero((whole.train.labels != 8) | (np.arange(80) == 64))  # class 8 has one image left
    few = replace(whole, train=whole.train.at(keep), test=Untouchable())
    assert held_out.without_held_out(few) == {8}
    monkeypatch.setattr(data, "load", lambda *args, **options: few)
    fixed = ["--set", "class_order=[8,0,1,2,3,4,5,6,7,9]"]
    assert main.main([*run, *fixed, "--tune", "ffn_num=[2]"]) == 2
    assert "8: a class of one training image has none to hold out" in capsys.readouterr().err
    later = ["--set", "class_order=[0,1,2,3,4,5,6,7,9,8]"]
    assert main.main([*run, *later, "--tune", "ffn_num=[2]"]) == 0  # in the first task all classes have eight
    monkeypatch.setattr(models.learner_of("finetune"), "uses_test", True)
    assert main.main([*run, *later, "--tune", "ffn_num=[2]"]) == 2
    assert "ffn_num=2: this setting selects on test data, and --tune reads none" in capsys.readouterr().err


def test_the_parts_are_disjoint_and_a_share_of_each_class():
    whole = toy_dataset(classes=3, train=10, test=4)
    parted, facts = held_out.split(replace(whole, test=Untouchable()), 0.2)
    training, held = (d.images.reshape(len(d), -1).numpy() for d in (parted.train, parted.test))
    assert len(training) == 24 and np.bincount(parted.test.labels).tolist() == [2, 2, 2] and facts["images"] == 6
    rows = {row.tobytes() for row in whole.train.images.reshape(30, -1).numpy()}
    assert {r.tobytes() for r in training} | {r.tobytes() for r in held} == rows
    assert not {r.tobytes() for r in training} & {r.tobytes() for r in held}
    assert held_out.split(whole, 0.2)[1] == facts
    assert held_out.split(whole, 0.01)[1]["images"] == 3 and held_out.split(whole, 0.99)[1]["images"] == 27


def test_loading_the_training_part_opens_no_test_image(tmp_path, monkeypatch):
    names, train, labels, *_ = digits.load()
    monkeypatch.setattr(digits, "load", lambda: (names, train, labels, Untouchable(), Untouchable()))
    embedded = data.load("digits", training_only=True)
    assert len(embedded.train) == len(labels) and len(embedded.test) == 0

    from PIL import Image

    for part in ("train", "test"):
        for name in "ab":
            for k in range(5):
                path = tmp_path / part / name / f"{k}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (k, 0, 0)).save(path)
    split = data.load("folder", path=tmp_path / "train")  # a share of each class is the test set
    opened = []
    real = images.formats.open_image
    monkeypatch.setattr(images.formats, "open_image", lambda path, *more: opened.append(str(path)) or real(path, *more))
    alone = data.load("folder", path=tmp_path / "train", training_only=True)
    assert alone.train.paths == split.train.paths and len(alone.test) == 0
    assert not set(opened) & set(split.test.paths)
    for path in (tmp_path / "test").rglob("*.png"):
        path.write_bytes(b"no image")
    parted = data.load("folder", path=tmp_path, training_only=True)  # a run refuses these test images
    assert len(parted.train) == 10 and len(parted.test) == 0
    with pytest.raises(ValueError, match="is not a readable image"):
        data.load("folder", path=tmp_path)
    with pytest.raises(ValueError, match="skip_broken: dataset folder has no test set"):
        data.load("folder", path=tmp_path / "train", training_only=True, skip_broken=True)


def test_the_benchmark_asks_the_command(tmp_path):
    flags = benchmark.flags(tmp_path / "x.json", ["init_lr=0.1,0.2", "optimizer=sgd,adam"], [7], tmp_path)
    assert flags[flags.index("--tune") + 1 :] == ["init_lr=[0.1, 0.2]", 'optimizer=["sgd", "adam"]']
    spec, faults = tuning.declared(json.loads(flags[3].removeprefix("tune=")), flags[flags.index("--tune") + 1 :])
    assert not faults and (spec.tasks, spec.seeds, spec.held_out) == (None, [7], 0.2)
