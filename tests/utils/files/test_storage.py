"""Files are whole or not there, and a saved state that is not as it was written is told."""

import json
import os
from pathlib import Path

import pytest
import torch

from utils.files import storage
from utils.files.storage import read_state, write_json, write_state

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "empty": torch.zeros(0, 4), "half": torch.ones(3, dtype=torch.float16)}


def test_write_json_is_strict_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"a": torch.tensor([1, 2]), "b": None, "c": "ü"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [1, 2], "b": None, "c": "ü"}
    with pytest.raises(ValueError, match=r"results\.json: field 'a\.b\[1\]' is nan"):
        write_json(path, {"a": {"b": [0.0, float("nan")]}})
    assert json.loads(path.read_text(encoding="utf-8"))["c"] == "ü"
    assert os.listdir(tmp_path) == ["results.json"]


def test_write_replaces_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_json(path, {"old": 1})

    def fail(source, target):
        assert json.loads(Path(source).read_text()) == {"new": 1}  # complete before it takes the name
        raise OSError("disk gone")

    monkeypatch.setattr(storage.os, "replace", fail)
    with pytest.raises(OSError, match="disk gone"):
        write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["results.json"]


def test_a_rename_that_fails_names_the_file_itself(tmp_path):
    (tmp_path / "results.json" / "inside").mkdir(parents=True)
    with pytest.raises(OSError) as error:
        write_json(tmp_path / "results.json", {})
    assert error.value.filename == str(tmp_path / "results.json")
    assert os.listdir(tmp_path) == ["results.json"]


def test_a_state_comes_back_exactly(tmp_path):
    tensors = TENSORS | {"view": TENSORS["a"].T, "same": TENSORS["a"]}  # not contiguous, and shared
    facts = {"rows": 3, "nested": {"list": [1, None, 0.1, "ä"]}}
    write_state(tmp_path / "new" / "x.json", facts, tensors)
    back, found = read_state(tmp_path / "new" / "x.json")
    assert back == facts and found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_every_bit_of_both_files_counts(tmp_path):
    write_state(tmp_path / "x.json", {"rows": 3}, TENSORS)
    for path in sorted(tmp_path.iterdir()):
        content = path.read_bytes()
        for place in range(0, len(content), 7):
            path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            with pytest.raises(storage.Damaged, match="cannot be used"):
                read_state(tmp_path / "x.json")
        path.write_bytes(content)
    read_state(tmp_path / "x.json")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'{"sha256": "0", "body": 1}', b"\x80\x04K\x01.", b"PK\x03\x04" * 9]
)
def test_what_is_no_state_is_refused_in_a_line(content, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(storage.Damaged, match=r"^checkpoint \S+x\.json cannot be used: [^\n]+$"):
        read_state(tmp_path / "x.json")
    with pytest.raises(storage.Damaged, match=r"cannot be used: y\.safetensors is missing"):
        read_state(tmp_path / "y.json")


def test_a_state_of_another_version_is_no_damage(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "FORMAT", 99)
    write_state(tmp_path / "x.json", {}, TENSORS)
    monkeypatch.undo()
    with pytest.raises(storage.OtherFormat, match="has format 99, this program reads format 2: run the version"):
        read_state(tmp_path / "x.json")


def test_shared_tensors_are_written_once_and_anew_when_they_differ(tmp_path):
    share = tmp_path / "t.safetensors"
    write_state(tmp_path / "a.json", {"n": 1}, TENSORS, share=share)
    before = share.stat().st_mtime_ns, share.stat().st_ino
    write_state(tmp_path / "b.json", {"n": 2}, TENSORS, share=share)
    assert (share.stat().st_mtime_ns, share.stat().st_ino) == before
    assert [read_state(tmp_path / f"{n}.json")[0]["n"] for n in "ab"] == [1, 2]
    write_state(tmp_path / "c.json", {}, {"a": torch.zeros(1)}, share=share)
    assert torch.equal(read_state(tmp_path / "c.json")[1]["a"], torch.zeros(1))
    with pytest.raises(storage.Damaged, match=r"the checksum of t\.safetensors does not match"):
        read_state(tmp_path / "a.json")


def test_temporary_files_of_a_killed_process_are_cleared(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    stale = [tmp_path / ".results.json.7.tmp", tmp_path / "checkpoints" / ".task_00000.json.7.tmp"]
    for path in (*stale, tmp_path / "notes.tmp"):
        path.write_bytes(b"half")
    storage.clear_temporary(tmp_path)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["notes.tmp"]
