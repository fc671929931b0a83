"""The lock of a run folder where the file system has none: a file with a pulse."""

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from utils.files import lock
from utils.files.lock import Lock
from utils.run.log import RunLog

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def without_locks(monkeypatch):
    """As on a network file system that refuses flock."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    monkeypatch.setattr(lock, "BEAT", 0.05)
    left = []
    monkeypatch.setattr(lock, "_leave", left.append)
    return left


def held_by(folder, host, number, age=0.0):
    path = folder / ".lock.pulse"
    path.write_text(f"{host}\n{number}\nabc\nprocess {number} on {host} since then: main.py\n")
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_the_log_says_that_there_are_no_locks_and_the_folder_is_guarded_all_the_same(without_locks, tmp_path, capsys):
    with RunLog(tmp_path) as log:
        told = "has no locks (No locks available): the folder is guarded by .lock.pulse"
        assert told in capsys.readouterr().err and told in (tmp_path / "run.log").read_text()
        with pytest.raises(
            ValueError, match=rf"is being written by another run \(process {os.getpid()} on .*sign of life"
        ):
            RunLog(tmp_path)
        log.row("a")
    assert sorted(p.name for p in tmp_path.glob(".lock*")) == [".lock"]  # free again
    RunLog(tmp_path).close()


def test_with_locks_nothing_is_said(tmp_path, capsys):
    with RunLog(tmp_path):
        assert not (tmp_path / ".lock.pulse").exists()
    assert capsys.readouterr().err == "" and (tmp_path / "run.log").read_text() == ""


def test_the_pulse_goes_on_and_stops_with_the_holder(without_locks, tmp_path):
    held = Lock(tmp_path)
    path = tmp_path / ".lock.pulse"
    os.utime(path, (1, 1))
    until = time.monotonic() + 10
    while path.stat().st_mtime == 1 and time.monotonic() < until:
        time.sleep(0.01)
    assert path.stat().st_mtime > 1
    held.release()
    held.release()
    assert not path.exists() and not any(thread.name == "lock" for thread in threading.enumerate())


def test_a_dead_process_of_this_machine_is_taken_over_at_once(without_locks, tmp_path):
    code = (
        "import errno, os, sys\nfrom pathlib import Path\nfrom utils.files import lock\n"
        "def refuse(*_): raise OSError(errno.ENOLCK, 'No locks available')\n"
        "lock.fcntl.flock = refuse\nlock.Lock(Path(sys.argv[1]))\nos.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    assert done.returncode == -9 and (tmp_path / ".lock.pulse").exists()
    held = Lock(tmp_path)
    assert "its process is gone" in held.notes[-1] and "is taken over: process " in held.notes[-1]
    held.release()


def test_another_machine_is_believed_until_its_pulse_is_old(without_locks, tmp_path):
    held_by(tmp_path, "elsewhere", 1, age=lock.STALE - 60)
    with pytest.raises(
        ValueError, match=r"process 1 on elsewhere since then: main.py; its last sign of life is 1[12]\d s"
    ):
        Lock(tmp_path)
    held_by(tmp_path, "elsewhere", 1, age=lock.STALE + 60)
    held = Lock(tmp_path)
    assert "no sign of life for 24" in held.notes[-1]
    held.release()


def test_who_was_taken_over_does_not_free_the_new_holder(without_locks, tmp_path):
    first = Lock(tmp_path)
    path = held_by(tmp_path, "elsewhere", 1)
    first.release()
    assert path.read_text().startswith("elsewhere")


def test_a_holder_that_was_suspended_and_taken_over_leaves(without_locks, tmp_path):
    held = Lock(tmp_path)
    held_by(tmp_path, "elsewhere", 1)
    held._pulse._thread.join(timeout=20)
    assert without_locks == [tmp_path]
    held.release()
    assert (tmp_path / ".lock.pulse").read_text().startswith("elsewhere")


def test_a_pulse_that_somebody_removed_is_made_again(without_locks, tmp_path):
    held = Lock(tmp_path)
    path = tmp_path / ".lock.pulse"
    path.unlink()
    until = time.monotonic() + 20
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert path.read_text() == held._pulse.text and without_locks == []
    held.release()
    assert not path.exists()


def test_leaving_ends_the_process_at_once():
    code = (
        "import pathlib, atexit; from utils.files import lock; atexit.register(print, 'more'); lock._leave(pathlib.Path('x'))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (75, "") and "x was taken over by another run" in done.stderr


@pytest.mark.parametrize("links", [True, False])
def test_a_late_taker_puts_a_new_holders_file_back_but_over_nobodys(links, without_locks, tmp_path, monkeypatch):
    held = Lock(tmp_path)
    path, aside = tmp_path / ".lock.pulse", tmp_path / "aside"
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    held._pulse._ended.set()
    os.rename(path, aside)
    held._pulse._put_back(aside)
    assert path.read_text() == held._pulse.text and not aside.exists()
    if links:
        os.rename(path, aside)
        path.write_text("a third one's")
        held._pulse._put_back(aside)
        assert path.read_text() == "a third one's" and not aside.exists()


def test_a_forked_worker_neither_holds_nor_frees(without_locks, tmp_path):
    held = Lock(tmp_path)
    if not (child := os.fork()):
        for other in list(lock._HELD):
            other.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / ".lock.pulse").exists()
    held.release()


def test_of_many_that_take_over_one_wins(without_locks, tmp_path):
    held_by(tmp_path, "elsewhere", 1, age=10_000)
    won, lost, gate = [], [], threading.Barrier(8)

    def take():
        gate.wait()
        try:
            won.append(lock.Pulse(tmp_path, "a thread"))
        except ValueError as error:
            lost.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 7), lost
    won[0].stop()
