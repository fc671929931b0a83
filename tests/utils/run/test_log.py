"""The log files and bars of a run."""

import io
import json
import os
import re
import shutil
import signal
import struct
import sys
import time

import numpy as np
import pytest
import torch

from utils.run import journal, progress
from utils.run import log as runlog
from utils.run.journal import Journal
from utils.run.log import RunLog
from utils.text import clock


@pytest.fixture
def log(tmp_path):
    with RunLog(tmp_path / "run", console=False) as log:
        yield log


def rows(log):
    return [json.loads(line) for line in (log.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------- the folder


@pytest.mark.parametrize("fate", ["deleted", "moved", "replaced"])
def test_a_folder_that_is_gone_ends_the_run_at_the_next_write_or_step(fate, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with pytest.raises(runlog.FolderGone, match=r"deleted or moved while the run was going on"), RunLog(folder) as log:
        entries = Journal(folder / "checkpoints" / "task_00000", log)
        log.row("epoch", loss=1.0)
        if fate == "deleted":
            shutil.rmtree(folder)
        else:
            folder.rename(tmp_path / "elsewhere")
        if fate == "replaced":
            RunLog(folder, console=False).close()
        entries.check_folder()  # it looks only now and then
        for write in (
            lambda: log.row("epoch"),
            lambda: log.info("x"),
            lambda: entries.save("a", dict, finished=True, where=""),
        ):
            with pytest.raises(runlog.FolderGone):
                write()
        assert fate == "replaced" or not folder.exists()
        monkeypatch.setattr(journal, "LOOK", -1.0)
        entries.check_folder()


# ---------------------------------------------------------------- rows


def test_row_converts_scalars_and_counts(log):
    log.row("epoch", loss=torch.tensor(0.5), hits=np.int64(3), scores=np.array([1.5, 2.0]), by={3: (1, None)}, ok=True)
    (row,) = rows(log)
    assert row.pop("time") >= 0
    assert row == {"kind": "epoch", "loss": 0.5, "hits": 3, "scores": [1.5, 2.0], "by": {"3": [1, None]}, "ok": True}
    assert log.rows == 1


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (float("nan"), "'loss' is nan"),
        (np.float32("inf"), "'loss' is inf"),
        (torch.tensor([0.0, float("nan")]), r"'loss\[1\]' is nan"),
        ({"a": [-float("inf")]}, r"'loss.a\[0\]' is -inf"),
    ],
)
def test_row_refuses_what_json_cannot_hold(log, value, where):
    with pytest.raises(ValueError, match=rf"metrics row 'epoch': field {where}"):
        log.row("epoch", task=1, loss=value)
    with pytest.raises(TypeError, match="field 'x': object cannot be written"):
        log.row("epoch", x=object())
    with pytest.raises(ValueError, match="'time' is set by the log"):
        log.row("epoch", time=1)
    assert log.rows == 0 and rows(log) == []


def test_reopening_appends_drops_a_torn_row_and_continues_the_time(tmp_path):
    table = tmp_path / "metrics.jsonl"
    with RunLog(tmp_path, console=False) as log:
        log.info("first")
        log.row("a")
    table.write_bytes(b'{"kind": "a", "time": 100.0}\n{"kind": "b", "ti')
    with RunLog(tmp_path, console=False) as log:
        assert log.rows == 1
        log.info("second")
        assert log.row("c")["time"] >= 100.0
        assert [row["kind"] for row in rows(log)] == ["a", "c"]
    assert [line.split()[-1] for line in (tmp_path / "run.log").read_text().splitlines()] == ["first", "second"]


def test_truncate_rows(log):
    for i in range(5):
        log.row("epoch", i=i, text="ä\u2028b")
    log.truncate_rows(2)
    assert log.rows == 2
    log.row("epoch", i=9)
    assert [json.loads(line)["i"] for line in (log.folder / "metrics.jsonl").read_bytes().splitlines()] == [0, 1, 9]
    with pytest.raises(ValueError, match="has 3 rows, fewer than the 4 of the checkpoint"):
        log.truncate_rows(4)
    log.truncate_rows(0)
    assert rows(log) == [] and log.rows == 0


# ---------------------------------------------------------------- text


def test_log_file_has_no_control_codes(log):
    log.info("\x1b[31mred\x1b[0m \x1b]0;title\x07a\r\x1b[2K\tb\nsecond line")
    log.warn("beware")
    text = (log.folder / "run.log").read_text(encoding="utf-8")
    first, second, third = text.splitlines()
    assert first.endswith("INFO  red a\tb") and third.endswith("WARN  beware")
    assert second == " " * first.index("red") + "second line"
    assert "\x1b" not in text and "\r" not in text


def test_console_streams(tmp_path, capsys):
    with RunLog(tmp_path) as log:
        log.info("table")
        log.warn("odd")
    out, err = capsys.readouterr()
    assert out == "table\n" and err == "warning: odd\n"


def test_quiet_log_prints_nothing(log, capfd):
    log.info("table")
    log.warn("odd")
    list(log.bar(3, "tasks"))
    assert capfd.readouterr() == ("", "")


def test_two_logs_never_share_a_folder(log):
    pytest.importorskip("fcntl")
    with pytest.raises(
        ValueError, match=rf"is being written by another run \(process {os.getpid()} on .* since .*\): wait"
    ):
        RunLog(log.folder, console=False)
    log.close()
    RunLog(log.folder, console=False).close()


def test_a_lock_dies_with_its_process_though_a_worker_lives_on(tmp_path):
    pytest.importorskip("fcntl")
    ready, worker = tmp_path / "ready", tmp_path / "worker"
    child = os.fork()
    if not child:  # a run whose data worker survives it
        log = RunLog(tmp_path / "run", console=False)
        if child_of_child := os.fork():
            worker.write_text(str(child_of_child))
            ready.touch()
        time.sleep(30)
        os._exit(log.rows)
    while not ready.exists():
        time.sleep(0.01)
    with pytest.raises(ValueError, match=f"another run .process {child} on"):
        RunLog(tmp_path / "run", console=False)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    RunLog(tmp_path / "run", console=False).close()
    os.kill(int(worker.read_text()), signal.SIGKILL)


def test_what_is_muted_is_neither_written_nor_shown(tmp_path, capfd):
    with RunLog(tmp_path / "run") as log:
        log.row("first")
        log.muted = True
        assert log.row("second", a=1)["a"] == 1
        log.info("said")
        log.warn("odd")
        log.muted = False
        assert log.rows == 1
    assert "said" not in (tmp_path / "run" / "run.log").read_text() and capfd.readouterr() == ("", "")


def test_two_logs_keep_apart(tmp_path):
    with RunLog(tmp_path / "a", console=False) as a, RunLog(tmp_path / "b", console=False) as b:
        a.info("for a")
        b.info("for b")
        a.row("x")
    assert "for b" not in (tmp_path / "a/run.log").read_text()
    assert (tmp_path / "b/metrics.jsonl").read_text() == ""


# ---------------------------------------------------------------- bars


def test_plain_bar_prints_first_and_last(tmp_path, capsys):
    with RunLog(tmp_path) as log:
        with log.bar(4, "epochs", level=1) as bar:
            for i in range(4):
                bar.update(1, loss=0.123456, phase="train", i=i)
        assert list(log.bar(1, "tasks")) == [0]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["  epochs 1/4", "  epochs 4/4", "tasks 1/1"]
    assert lines[0].endswith("left 0:00 loss=0.1235 phase=train i=0")
    assert (tmp_path / "run.log").read_text() == ""


def test_plain_bar_interval_and_eta(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: now[0])
    with RunLog(tmp_path) as log:
        for _ in log.bar(12, "tasks", every=5.0):
            now[0] += 2.0
    assert capsys.readouterr().err.splitlines() == [
        "tasks 1/12, 0:02 left 0:22",
        "tasks 4/12, 0:08 left 0:16",
        "tasks 7/12, 0:14 left 0:10",
        "tasks 10/12, 0:20 left 0:04",
        "tasks 12/12, took 0:24",
    ]


def test_resumed_bar_counts_only_its_own_steps_for_the_time_left(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: now[0])
    with RunLog(tmp_path) as log:
        steps = []
        for step in log.bar(5, "tasks", done=2, every=0.0):
            steps.append(step)
            now[0] += 10.0
        log.bar(5, "more").update(0)  # nothing done, nothing to say
    assert steps == [2, 3, 4]
    assert capsys.readouterr().err.splitlines() == [
        "tasks 3/5, 0:10 left 0:20",
        "tasks 4/5, 0:20 left 0:10",
        "tasks 5/5, took 0:30",
    ]


def test_terminal_bars_stay_off_the_log_and_text_does_not_tear(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    with RunLog(tmp_path) as log, log.bar(2, "tasks") as tasks:
        with log.bar(3, "epochs", level=1) as epochs:
            epochs.update(3, loss=0.5)
            log.info("a table")
        tasks.update()
    shown = screen.getvalue()
    assert "epochs: 100%" in shown and "loss=0.5" in shown
    assert re.search(r"\r +\r\n\r +\r\x1b\[Aa table\n\r", shown)  # both bars wiped, then the text at a line start
    text = (tmp_path / "run.log").read_text()
    assert text.endswith("a table\n") and "\x1b" not in text and "epochs" not in text


def test_console_without_utf8(tmp_path, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with RunLog(tmp_path) as log:
        log.info("85 ± 2")
    assert raw.getvalue() == b"85 ? 2\n"
    assert "85 ± 2" in (tmp_path / "run.log").read_text(encoding="utf-8")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_what_stopped_a_run_stands_in_its_log(tmp_path):
    with pytest.raises(RuntimeError), RunLog(tmp_path, console=False) as log:
        log.info("so far")
        log.sync()
        raise RuntimeError("the reason")
    text = (tmp_path / "run.log").read_text(encoding="utf-8")
    assert " STOP  Traceback" in text and text.endswith("RuntimeError: the reason\n")


def test_a_terminal_without_a_size_is_told_from_one_with():
    pty = pytest.importorskip("pty")
    termios, fcntl = pytest.importorskip("termios"), pytest.importorskip("fcntl")
    master, slave = pty.openpty()
    try:
        with open(slave, "w", closefd=False) as stream:
            for lines, columns, known in ((0, 0, False), (0, 100, False), (24, 80, True)):
                fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
                assert progress._has_size(stream) is known
    finally:
        os.close(master)
        os.close(slave)
    assert not progress._has_size(io.StringIO())
