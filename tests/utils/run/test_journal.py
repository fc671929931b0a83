"""The journal of a task: values come back as they were, damage gives way to the entry before, another way is refused."""

import json

import pytest
import torch

import main
from tests.helpers.runs import tiny_experiment
from utils.process.seeds import rng_state, set_rng_state
from utils.run import journal, task
from utils.run.journal import Differs, Journal, pack, unpack
from utils.run.provenance import Identity


def test_nested_values_come_back_exactly():
    value = {
        "numbers": [1, 0.1, None, True, "ä"],
        "tensors": [torch.arange(3.0), torch.zeros(0, 2), torch.tensor(7), torch.eye(2).double(), torch.tensor([True])],
        "deep": {"a": [{"b": torch.ones(2, 3, dtype=torch.float16).T}], "empty": {}, "none": []},
    }
    packed, tensors = pack(value)
    assert set(tensors) == {"float32", "int64", "float64", "bool", "float16"}
    back = unpack(json.loads(json.dumps(packed)), tensors)
    assert back["numbers"] == value["numbers"] and back["deep"]["empty"] == {} and back["deep"]["none"] == []
    for own, old in zip(back["tensors"], value["tensors"], strict=True):
        assert own.dtype == old.dtype and torch.equal(own, old)
    assert torch.equal(back["deep"]["a"][0]["b"], value["deep"]["a"][0]["b"])


def test_random_state_comes_back():
    import random

    import numpy as np

    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(2).tolist()

    draw()
    state = rng_state(torch.device("cpu"))
    first = draw()
    set_rng_state(json.loads(json.dumps(state)), torch.device("cpu"))
    assert draw() == first
    older = state | {"torch": torch.tensor(state["torch"], dtype=torch.uint8)}  # as older versions saved it
    of_ranks = state | {"torch": {"bytes": state["torch"]}}
    for saved_state in (older, of_ranks):
        set_rng_state(saved_state, torch.device("cpu"))
        assert draw() == first


def saved(log, phases):
    """A journal with these (name, counts, finished), each entry's state being its count."""
    made = Journal(log.folder / "checkpoints" / "task_00000", log, Identity("hash"))
    for name, counts, finished in phases:
        assert made.recall(name) is None
        for count in range(counts):
            log.row("epoch", count=count)
            last = count == counts - 1
            made.save(name, lambda count=count: count, finished=finished and last, where=f"{name} {count}")
    return made


def reopened(log, rows=0, weight_hash="hash"):
    made = Journal(log.folder / "checkpoints" / "task_00000", log, Identity(weight_hash))
    made.open(rows)
    return made


def test_finished_phases_and_the_last_entry_come_back_and_the_log_is_mute_until_then(log):
    saved(log, [("func", 3, True), ("rd", 2, False)])
    log.row("epoch", count="after the last entry")
    again = reopened(log)
    assert log.rows == 5 and log.muted
    assert again.recall("func") == 2
    log.row("detect")
    assert log.rows == 5 and log.muted
    assert again.recall("rd") == 1
    assert not log.muted and again.last == "rd 1"
    assert again.recall("func 2") is None
    again.finish()
    assert sorted(p.name for p in again.folder.glob("*.json")) == [
        "phase_0000.000001.json", "phase_0000.000002.json", "phase_0001.000000.json", "phase_0001.000001.json",
    ]  # fmt: skip


@pytest.mark.parametrize("lost", ["flip", "rows"])
def test_a_damaged_entry_gives_way_to_the_one_before(lost, log):
    made = saved(log, [("func", 3, False)])
    if lost == "rows":
        log.truncate_rows(2)
    else:
        path = made.folder / "phase_0000.000002.json"
        path.write_bytes(path.read_bytes()[:-9])
    assert reopened(log).recall("func") == 1
    text = (log.folder / "run.log").read_text(encoding="utf-8")
    assert "phase_0000.000002.json" in text and "trying the one before it" in text


def test_another_way_is_refused(log):
    saved(log, [("func", 1, True), ("rd", 1, False)])
    again = reopened(log)
    again.recall("func")
    with pytest.raises(Differs, match="phase 2 of the task is 'func 1' now and was 'rd' before"):
        again.recall("func 1")
    again = reopened(log)
    again.recall("func")
    with pytest.raises(Differs, match="had 1 phases now and at least 2 before"):
        again.finish()
    with pytest.raises(ValueError, match="weights changed since this run began"):
        reopened(log, weight_hash="other")


def test_without_a_folder_nothing_is_computed_or_kept():
    made = Journal()
    assert made.recall("func") is None
    made.save("func", lambda: 1 / 0, finished=True, where="")
    made.finish()


def test_a_run_that_goes_another_way_learns_the_task_anew(tmp_path, monkeypatch, capsys):
    run = tiny_experiment("finetune", tmp_path, monkeypatch, epochs=2)
    folder = tmp_path / "logs"
    recall = Journal.recall

    def stop(self, phase):
        found = recall(self, phase)
        if found is not None:
            raise Differs("as on a device that computes otherwise")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(task, "score", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(
            task,
            "learn",
            lambda *args, learn=task.learn: (learn(*args), (_ for _ in ()).throw(KeyboardInterrupt)),
        )
        assert main.main([*run, "--out", str(folder)]) == 75
    monkeypatch.setattr(Journal, "recall", stop)
    assert main.main([*run, "--out", str(folder)]) == 0
    assert "is learned from its start" in capsys.readouterr().err
    (place,) = folder.glob("*/*/seed_3")
    rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    assert [r["task"] for r in rows if r["kind"] == "task"] == [0, 1]
    assert [r["epoch"] for r in rows if r["kind"] == "epoch"] == [1, 2, 1, 2]
    journal.discard(place / "checkpoints")
