"""A checkpoint is whole or refused, the one before it is the fallback, and a learner comes back bit for bit."""

import json

import pytest
import torch

import models
from tests.helpers.toy import toy_stream
from utils.files import storage
from utils.run import checkpoint
from utils.run import folder as run_folder
from utils.run.checkpoint import Checkpoint, Resumed
from utils.run.log import RunLog
from utils.run.provenance import Identity

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "empty": torch.zeros(0, 4), "half": torch.ones(3, dtype=torch.float16)}


def write(folder, task, **facts):
    checkpoint.write(folder, Checkpoint(task, facts, TENSORS))


def test_the_newest_two_are_kept_in_numeric_order(tmp_path):
    for task in (0, 8, 9, 10, 999, 1000):
        write(tmp_path, task)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "task_00999.json", "task_00999.safetensors", "task_01000.json", "task_01000.safetensors",
    ]  # fmt: skip
    assert checkpoint.newest(tmp_path)[0].task == 1000


def test_no_checkpoint(tmp_path):
    assert checkpoint.newest(tmp_path / "absent") == (None, [])


@pytest.mark.parametrize("ending", ["json", "safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove"])
def test_any_damage_is_seen_and_the_one_before_is_used(ending, damage, tmp_path):
    write(tmp_path, 3, rows=7)
    write(tmp_path, 4, rows=9)
    path = tmp_path / f"task_00004.{ending}"
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"flip": flipped, "cut": content[:middle], "empty": b""}[damage])
    found, complaints = checkpoint.newest(tmp_path)
    assert found.task == 3 and found.facts == {"rows": 7}
    if (ending, damage) != ("json", "remove"):  # without its json there never was one
        assert len(complaints) == 1 and "task_00004" in complaints[0] and "trying the one before it" in complaints[0]


def test_a_crash_while_writing_leaves_the_old_one(tmp_path, monkeypatch):
    write(tmp_path, 0)

    def full(path, data, **how):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(storage, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 1)
    assert checkpoint.newest(tmp_path)[0].task == 0


def learn(learner, stream, index):
    learner.begin_task()
    task = stream.task(index, with_past=learner.uses_past)
    torch.manual_seed(index)
    learner.learn(task)
    learner.consolidate(task)


@pytest.mark.parametrize("method", models.available())
def test_a_learner_comes_back_and_goes_on_bit_for_bit(method, toy_learner, log, tmp_path):
    stream = toy_stream()
    first, second = toy_learner(method), toy_learner(method)
    for index in (0, 1):
        learn(first, stream, index)
    checkpoint.save(log.folder, 1, first, {"any": "record"}, log, Identity("hash"))
    assert checkpoint.resume(log.folder, second, log, Identity("hash")) == Resumed({"any": "record"}, None, log.rows)
    assert not second.training and not any(p.requires_grad for p in second.parameters())  # as a task's end leaves it
    for learner in (first, second):
        learn(learner, stream, 2)
        learner.eval()
    assert second.structure() == first.structure()
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    images = next(iter(stream.test(0).batches(8, augment=False, shuffle=False)))[0]
    with torch.no_grad():
        assert torch.equal(first.logits(images), second.logits(images))


def test_the_task_after_the_checkpoint_without_a_journal_starts_over(toy_learner, log):
    stream, learner = toy_stream(), toy_learner("finetune")
    learn(learner, stream, 0)
    rows = log.rows
    checkpoint.save(log.folder, 0, learner, {}, log, Identity("hash"))
    learn(learner, stream, 1)
    assert log.rows > rows
    resumed = checkpoint.resume(log.folder, toy_learner("finetune"), log, Identity("hash"))
    checkpoint.journal_of(log.folder, 1, log, Identity("hash")).open(resumed.rows)
    assert log.rows == resumed.rows == rows and not log.muted
    text = (log.folder / "run.log").read_text(encoding="utf-8")
    assert "resumed: tasks 1 to 1 are done" in text


def test_a_learned_task_is_kept_before_its_evaluation_with_the_same_tensors(toy_learner, log):
    stream, learner = toy_stream(), toy_learner("finetune")
    learn(learner, stream, 0)
    folder = log.folder / "checkpoints"
    checkpoint.save(log.folder, 0, learner, {}, log, Identity("hash"), {"images": 5})
    assert checkpoint.resume(log.folder, toy_learner("finetune"), log, Identity("hash")).measured == {"images": 5}
    assert checkpoint.newest(folder, learned=False) == (None, [])  # nobody scored it yet
    log.row("task")
    checkpoint.save(log.folder, 0, learner, {"scored": 1}, log, Identity("hash"))
    names = ["task_00000.json", "task_00000.learned.json", "task_00000.safetensors"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert checkpoint.resume(log.folder, toy_learner("finetune"), log, Identity("hash")) == Resumed(
        {"scored": 1}, None, log.rows
    )
    (folder / "task_00000.json").write_bytes(b"damaged")  # then the task is only evaluated again
    assert checkpoint.resume(log.folder, toy_learner("finetune"), log, Identity("hash")).measured == {"images": 5}


def test_resume_with_other_weights_or_another_shape_is_refused(toy_learner, log):
    learner = toy_learner("finetune")
    learn(learner, toy_stream(), 0)
    checkpoint.save(log.folder, 0, learner, {}, log, Identity("hash"))
    with pytest.raises(ValueError, match="weights changed since this run began"):
        checkpoint.resume(log.folder, toy_learner("finetune"), log, Identity("other"))
    with pytest.raises(ValueError, match=r"of another shape: head\.bias, head\.weight"):
        checkpoint.resume(log.folder, toy_learner("finetune", num_classes=7), log, Identity("hash"))


def test_without_a_whole_checkpoint_the_rows_are_kept_aside(toy_learner, log):
    learner = toy_learner("finetune")
    learn(learner, toy_stream(), 0)
    checkpoint.save(log.folder, 0, learner, {}, log, Identity("hash"))
    rows = (log.folder / "metrics.jsonl").read_bytes()
    (log.folder / "checkpoints" / "task_00000.safetensors").write_bytes(b"")
    assert checkpoint.resume(log.folder, toy_learner("finetune"), log, Identity("hash")) is None
    checkpoint.journal_of(log.folder, 0, log, Identity("hash")).open(0)
    assert log.rows == 0 and (log.folder / "metrics.old_1.jsonl").read_bytes() == rows
    assert "every checkpoint is damaged" in (log.folder / "run.log").read_text(encoding="utf-8")


def test_move_aside_keeps_everything(tmp_path):
    folder = tmp_path / "seed_1"
    assert run_folder.move_aside(folder) is None
    for number in (1, 2):
        with RunLog(folder, console=False) as log:
            log.row("epoch", loss=number)
        assert run_folder.move_aside(folder) == tmp_path / f"seed_1.old_{number}"
    losses = [json.loads((tmp_path / f"seed_1.old_{n}" / "metrics.jsonl").read_text())["loss"] for n in (1, 2)]
    assert losses == [1, 2] and not folder.exists()


def test_a_folder_in_use_is_not_moved(tmp_path):
    with RunLog(tmp_path / "seed_1", console=False), pytest.raises(ValueError, match="being written by another run"):
        run_folder.move_aside(tmp_path / "seed_1")
    assert (tmp_path / "seed_1").is_dir()


def test_latest_is_a_relative_link_and_gives_way_to_a_real_folder(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "seed_1").mkdir(parents=True)
        run_folder.point_latest(tmp_path / "latest", tmp_path / name / "seed_1")
        assert (tmp_path / "latest").readlink().as_posix() == f"{name}/seed_1"
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()
    run_folder.point_latest(tmp_path / "latest", tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "latest"] and not (tmp_path / "latest").is_symlink()
