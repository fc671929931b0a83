"""The lock of a folder: by the system, and as a lease where the file system has no locks."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from utils.files import lock
from utils.files.lock import Lock, Taken, alone
from utils.run.log import RunLog

ROOT = Path(__file__).resolve().parents[3]
WITHOUT_LOCKS = (
    "import errno, fcntl, os, sys, time\nfrom pathlib import Path\nfrom utils.files import lock\n"
    "def refuse(*_): raise OSError(errno.ENOLCK, 'No locks available')\n"
    "fcntl.flock = refuse\nlock.BEAT, lock.STALE = float(sys.argv[2]), float(sys.argv[3])\n"
)


@pytest.fixture
def without_locks(monkeypatch):
    """As on a network file system that refuses flock; the folders that this process would have left."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(lock, "BEAT", 0.05)
    left = []
    monkeypatch.setattr(lock, "_leave", left.append)
    return left


def another(folder, code, beat=20.0, stale=180.0):
    """A process that holds `folder` by a lease, and then does `code`."""
    code = f"{WITHOUT_LOCKS}held = lock.Lock(Path(sys.argv[1]))\nprint('held', flush=True)\n{code}"
    line = [sys.executable, "-c", code, str(folder), str(beat), str(stale)]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n", process.stderr.read()
    return process


def until(holds, seconds=30.0):
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


def names(folder):
    return sorted(path.name for path in folder.glob(".lock*"))


# ---------------------------------------------------------------- the system's lock


def test_with_locks_nothing_is_said_and_the_holder_is_named(tmp_path, capsys):
    with RunLog(tmp_path):
        assert names(tmp_path) == [".lock", ".lock.who"]
        with pytest.raises(
            Taken, match=rf"is being written by another run \(process {os.getpid()} on .* since .*\): wait"
        ):
            Lock(tmp_path)
    assert capsys.readouterr().err == "" and (tmp_path / "run.log").read_text() == ""
    assert names(tmp_path) == [".lock"]


def test_the_lock_ends_with_its_process(tmp_path):
    code = "import os, sys, pathlib\nfrom utils.files.lock import Lock\n"
    code += "held = Lock(pathlib.Path(sys.argv[1]))\nos.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    assert done.returncode == -9 and names(tmp_path) == [".lock", ".lock.who"]
    held = Lock(tmp_path)
    assert held.notes == []  # an interrupted run is nothing special
    held.release()


def test_the_file_of_an_older_version_is_no_obstacle(tmp_path):
    (tmp_path / ".lock").write_bytes(b"process 1 on \xff since then: main.py\n")
    Lock(tmp_path).release()


@pytest.mark.parametrize("name", [".lock", ".lock.who"])
def test_a_folder_in_place_of_a_file_is_an_error_with_its_path(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(OSError, match=r"\.lock") as raised:
        Lock(tmp_path)
    assert raised.value.filename == str(tmp_path / name)
    (tmp_path / name).rmdir()
    Lock(tmp_path).release()


@pytest.mark.parametrize("locks", [True, False])
def test_a_second_one_waits_for_the_first(locks, tmp_path, request):
    if not locks:
        request.getfixturevalue("without_locks")
    order = []

    def second():
        with alone(tmp_path / "new"):
            order.append("second")

    with alone(tmp_path / "new"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join(timeout=30)
    assert order == ["first", "second"]


@pytest.mark.parametrize("locks", [True, False])
def test_a_forked_worker_neither_holds_nor_frees(locks, tmp_path, request):
    if not locks:
        request.getfixturevalue("without_locks")
    held = Lock(tmp_path)
    if not (child := os.fork()):
        held.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / ".lock.who").exists()
    with pytest.raises(Taken):
        Lock(tmp_path)
    held.release()
    Lock(tmp_path).release()


# ---------------------------------------------------------------- the lease


def test_the_log_says_that_there_are_no_locks_and_the_folder_is_guarded_all_the_same(without_locks, tmp_path, capsys):
    with RunLog(tmp_path) as log:
        said = "has no locks (No locks available): the folder is guarded by .lock.lease, touched every"
        assert said in capsys.readouterr().err and said in (tmp_path / "run.log").read_text()
        with pytest.raises(
            ValueError, match=rf"is being written by another run \(process {os.getpid()} on .*sign of life is 0 s old"
        ):
            RunLog(tmp_path)
        log.row("a")
    assert names(tmp_path) == [".lock"]  # free again
    RunLog(tmp_path).close()


def test_the_lease_is_touched_and_ends_with_the_holder(without_locks, tmp_path):
    held = Lock(tmp_path)
    path = tmp_path / ".lock.lease"
    os.utime(path, (1, 1))
    assert until(lambda: path.stat().st_mtime > 1)
    held.release()
    held.release()
    assert not path.exists() and not any("lease" in thread.name for thread in threading.enumerate())


def test_a_dead_process_of_this_machine_is_taken_over_at_once(without_locks, tmp_path):
    process = another(tmp_path, "os.kill(os.getpid(), 9)")
    assert process.wait() == -9 and (tmp_path / ".lock.lease").exists()
    held = Lock(tmp_path)
    assert "ended without releasing it; it is taken over: process " in held.notes[-1]
    held.release()


def test_a_holder_that_is_alive_is_believed_until_its_lease_is_old(without_locks, tmp_path, monkeypatch, capsys):
    """A suspended process stands for another machine: it is there, and touches nothing."""
    monkeypatch.setattr(lock, "BEAT", 0.5)
    monkeypatch.setattr(lock, "STALE", 2.0)
    process = another(tmp_path, "time.sleep(600)", beat=0.5, stale=2.0)
    try:
        os.kill(process.pid, 19)
        with pytest.raises(Taken, match=rf"process {process.pid} on .*; its last sign of life is \d s old"):
            Lock(tmp_path)
        assert until(lambda: time.time() - (tmp_path / ".lock.lease").stat().st_mtime > 2.2)
        held = Lock(tmp_path)
        assert f"it is taken over: process {process.pid}" in held.notes[-1]
        assert "is taken over if that stays so for 2 s" in capsys.readouterr().out
        # the suspended one ends when it is woken, and neither frees nor writes anything
        os.kill(process.pid, 18)
        said = process.communicate(timeout=30)[1]
        assert process.returncode == 75 and f"{tmp_path} was taken over by another run" in said
        assert (tmp_path / ".lock.lease").exists() and f"process {os.getpid()} " in (tmp_path / ".lock.who").read_text()
        held.release()
    finally:
        process.kill()
        process.wait()


def test_a_lease_that_somebody_removed_is_created_again(without_locks, tmp_path):
    held = Lock(tmp_path)
    path = tmp_path / ".lock.lease"
    path.unlink()
    assert until(path.exists) and without_locks == []
    with pytest.raises(Taken):
        Lock(tmp_path)
    time.sleep(0.3)
    assert path.exists()
    held.release()
    assert names(tmp_path) == [".lock"] and without_locks == []


def test_who_was_taken_over_does_not_free_the_new_holder(without_locks, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 60.0)  # too slow to notice
    first = Lock(tmp_path)
    (tmp_path / ".lock.lease").unlink()
    process = another(tmp_path, "time.sleep(600)")
    first.release()
    assert (tmp_path / ".lock.lease").exists()
    with pytest.raises(Taken, match=f"process {process.pid} on"):
        Lock(tmp_path)
    process.kill()
    process.wait()


def test_what_is_no_lease_is_named(without_locks, tmp_path):
    path = tmp_path / ".lock.lease"
    path.write_bytes(b"\xff\xfe foreign")
    with pytest.raises(Taken, match=r"unknown, see \.lock\.lease"):
        Lock(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises((OSError, Taken), match=r"\.lock\.lease"):
        Lock(tmp_path)


def test_leaving_ends_the_process_at_once():
    code = "import pathlib, atexit; from utils.files import lock; atexit.register(print, 1); lock._leave(pathlib.Path('x'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (75, "") and "x was taken over by another run" in done.stderr


def test_of_many_that_take_over_one_wins(without_locks, tmp_path):
    another(tmp_path, "os.kill(os.getpid(), 9)").wait()
    won, lost, gate = [], [], threading.Barrier(8)

    def take():
        gate.wait()
        try:
            won.append(Lock(tmp_path))
        except ValueError as error:
            lost.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 7), lost
    won[0].release()
