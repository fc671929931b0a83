"""A full or read-only disk, too many files, no memory: one line that says what to do, and the same command goes on."""

import errno
import os
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch

import main
from commands import failures
from tests.helpers.runs import assert_same_run, tiny_experiment
from utils.run import log, task

SETTINGS = SimpleNamespace(batch_size=48, eval_batch_size=256, image_size=None)  # of a method without detection


@pytest.mark.parametrize(
    ("error", "code", "words", "not_words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "logs/x"), 1, ["logs/x", "free space", "the same command"], []),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "logs/x"), 1, ["free space", "--out"], []),
        (OSError(errno.EMFILE, "Too many open files", "a.png"), 1, ["a.png", "num_workers", "ulimit -n"], []),
        (OSError(errno.ENFILE, "Too many open files in system"), 1, ["num_workers", "--jobs"], []),
        (OSError(errno.EIO, "Input/output error", "a.png"), 1, ["a.png: Input/output error; what is finished"], []),
        (OSError(errno.EROFS, "Read-only file system", "logs"), 2, ["logs", "--out", "data_root"], ["finished"]),
        (OSError(errno.EACCES, "Permission denied", "logs"), 2, ["logs: Permission denied"], ["finished"]),
        (OSError(errno.ENAMETOOLONG, "File name too long", "yy"), 2, ["yy: File name too long"], ["finished"]),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 1, ["batch_size (now 48)", "the memory is full"], ["space"]),
        (MemoryError(), 1, ["batch_size (now 48)", "eval_batch_size (now 256)", "image_size"], ["detect", "now None"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0"), 1, ["2.50 GiB", "batch_size"], []),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 80 bytes."), 1,
         ["the memory is full (80 bytes were asked for): lower batch_size (now 48)"], ["fault of the program"]),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), 1, ["the memory is full"], []),
        (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>"), 1, ["lower num_workers"], ["batch_size"]),
        (RuntimeError("received 0 items of ancdata"), 1, ["lower num_workers"], ["batch_size"]),
        (ValueError("shared memory is no matter here"), 2, ["shared memory is no matter here"], ["num_workers"]),
        (RuntimeError("shapes differ"), 1, ["a fault of the program"], ["memory"]),
        (ValueError("\x1b[31mred\u202e"), 2, ["\\x1b[31mred\\u202e"], ["\x1b", "\u202e"]),
    ],
)  # fmt: skip
def test_the_verdict_says_what_to_do(error, code, words, not_words):
    found, text = failures.verdict(error, SETTINGS)
    assert found == code and "\n" not in text
    assert all(word in text for word in words), text
    assert not any(word in text for word in not_words), text


def test_without_settings_all_keys_of_memory_are_named():
    assert all(key in failures.verdict(MemoryError())[1] for key in failures.MEMORY_KEYS)


def test_a_run_names_its_own_values_when_memory_is_out(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")

    monkeypatch.setattr(task, "learn", full)
    assert main.main([*tiny_experiment("finetune", tmp_path, monkeypatch), "--out", str(tmp_path / "logs")]) == 1
    assert "lower batch_size (now 32), eval_batch_size (now 256)" in capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------- disks


@pytest.fixture
def disk(tmp_path):
    """Function: a file system of its own, of so many bytes; skipped where mounting is not allowed."""
    mounted = []

    def mount(size):
        place = tmp_path / f"disk {len(mounted)}"
        place.mkdir()
        call = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        try:
            done = subprocess.run(call, capture_output=True, text=True)
        except OSError as error:
            pytest.skip(f"there is no mount command: {error}")
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


def resize(place, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def folder_of(out):
    (folder,) = out.glob("*/*/seed_3")
    return folder


def last_line(capsys):
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return [line for line in said.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sema", "simplecil"])
def test_a_disk_that_fills_up_costs_nothing(method, disk, tmp_path, monkeypatch, capsys):
    """Given a little more room each time, the run dies at one write after the other, and still ends as an undisturbed one."""
    run = tiny_experiment(method, tmp_path, monkeypatch)
    assert main.main([*run, "--out", str(tmp_path / "whole")]) == 0
    needed = sum(p.stat().st_size for p in (tmp_path / "whole").rglob("*") if p.is_file())
    place = disk("8k")
    room, step, stops, kept = 8192, -(-needed // 12 // 4096) * 4096, 0, set()
    capsys.readouterr()
    while (code := main.main([*run, "--out", str(place / "logs")])) == 1:
        (line,) = last_line(capsys)
        assert f"error: {place}" in line and "No space left on device; free space there or give another --out" in line
        stops += 1
        kept |= {p.name for p in place.rglob("task_*.json")}
        assert not list(place.rglob("results.json")) and not list(place.rglob(".*.tmp"))
        room += step
        resize(place, f"size={room}")
        assert room < 20 * needed + 10**6
    assert code == 0, last_line(capsys)
    assert stops > 3 and "task_00000.json" in kept
    assert_same_run(folder_of(place / "logs"), folder_of(tmp_path / "whole"))
    log.RunLog(folder_of(place / "logs"), console=False).close()  # nobody holds it any more


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_whole(disk, tmp_path, monkeypatch, capsys):
    run = tiny_experiment("simplecil", tmp_path, monkeypatch)
    assert main.main([*run, "--out", str(tmp_path / "whole")]) == 0
    place = disk("64m")
    learn = task.learn

    def fill(learner, stream, index, *rest):
        if index == 1:
            kept.update({p: p.read_bytes() for p in place.rglob("task_00000.*")})
            free = shutil.disk_usage(place).free
            (place / "other").write_bytes(bytes(free // 4096 * 4096))
        return learn(learner, stream, index, *rest)

    kept = {}
    monkeypatch.setattr(task, "learn", fill)
    assert main.main([*run, "--out", str(place / "logs")]) == 1
    (line,) = last_line(capsys)
    assert "No space left on device; free space there" in line and "the same command goes on from there" in line
    assert kept and {p: p.read_bytes() for p in kept} == kept
    monkeypatch.setattr(task, "learn", learn)
    (place / "other").unlink()
    assert main.main([*run, "--out", str(place / "logs")]) == 0
    assert "resumed: tasks 1 to 1 are done" in capsys.readouterr().out
    assert_same_run(folder_of(place / "logs"), folder_of(tmp_path / "whole"))


def test_a_read_only_disk_is_bad_input(disk, tmp_path, monkeypatch, capsys):
    run, place = tiny_experiment("simplecil", tmp_path, monkeypatch), disk("1m")
    resize(place, "ro")
    assert main.main([*run, "--out", str(place / "logs")]) == 2
    (line,) = last_line(capsys)
    assert str(place) in line and "Read-only file system; give an --out" in line


def test_a_folder_without_permission_is_bad_input(tmp_path, monkeypatch, capsys):
    (tmp_path / "logs").mkdir(mode=0o500)
    if os.access(tmp_path / "logs", os.W_OK):
        pytest.skip("this user may write everywhere")
    assert main.main([*tiny_experiment("simplecil", tmp_path, monkeypatch), "--out", str(tmp_path / "logs")]) == 2
    assert "Permission denied" in last_line(capsys)[0]
