"""Bars move within a step and say the time left for the whole command."""

import io
import sys

import pytest

from utils.run import progress
from utils.run.log import RunLog


class Clock:
    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_bar_inside_moves_the_one_around_it(tmp_path, clock, capsys):
    with RunLog(tmp_path / "run") as log:
        log.later_runs = 1
        tasks = log.bar(4, "tasks")  # and four of the next seed
        epochs = log.bar(2, "epochs", level=1)
        assert tasks.seconds_left() is None
        clock.now = 6.0
        epochs.within(0.5)  # a quarter of the first of eight tasks
        assert tasks.seconds_left() == pytest.approx(6 * 7.75 / 0.25)
        assert capsys.readouterr().err == "  epochs 0/2, 0:06 left 0:18, all left 3:06\n"
        epochs.within(0.4)  # never backwards
        assert tasks.seconds_left() == pytest.approx(6 * 7.75 / 0.25)
        epochs.update(1)
        assert tasks.seconds_left() == pytest.approx(6 * 7.5 / 0.5)
        epochs.update(1)
        second = log.bar(1, "second phase", level=1)  # the task has two parts: the first was half of it
        clock.now = 12.0
        tasks.update(1)
        assert tasks.seconds_left() == pytest.approx(12 * 7)
        second.close()
        first = log.bar(1, "first phase", level=1)
        first.within(1.0)  # of two, as in the task before
        assert tasks.seconds_left() == pytest.approx(12 * 6.5 / 1.5)


def test_lines_are_rare(tmp_path, clock, capsys):
    with RunLog(tmp_path / "run") as log:
        bar = log.bar(2, "epochs", every=5.0)
        for step in range(100):
            clock.now = step / 10
            bar.within(step / 100)
    assert capsys.readouterr().err == "epochs 0/2, 0:05 left 0:15\n"


def test_a_terminal_shows_the_part_of_a_step_and_the_time_of_all(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with RunLog(tmp_path / "run") as log, log.bar(2, "tasks") as tasks, log.bar(4, "epochs", level=1) as epochs:
        epochs.within(0.5)
        epochs._tqdm.refresh()
        assert "| 0.5/4 [" in terminal.getvalue()
        epochs.update(1, loss=0.5)
        assert (epochs._tqdm.n, round(tasks._tqdm.n, 2)) == (1, 0.25)
        assert "loss=0.5" in epochs._tqdm.postfix and "left" in epochs._tqdm.postfix
