"""The first and last moments of the process: closed streams, and signals that come again and again."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils.process import interrupt

ROOT = Path(__file__).resolve().parents[3]

STREAMS = """
import os, sys
from utils.process import startup
startup.prepare()
print("out"); print("err", file=sys.stderr); sys.stdout.flush()
with open(sys.argv[1], "w") as file:
    assert file.fileno() > 2, file.fileno()
    os.write(1, b"from torch"); os.write(2, b"from torch")
    file.write("whole")
startup.leave(7)
"""


@pytest.mark.parametrize("closed", ["", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_file_of_the_run(closed, tmp_path):
    line = f'"$0" -c "$1" "$2" {closed}'
    done = subprocess.run(
        ["bash", "-c", line, sys.executable, STREAMS, tmp_path / "file"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 7 and (tmp_path / "file").read_text() == "whole"
    assert "Traceback" not in done.stderr


SLOW_TO_SAVE = """
import signal, sys, time
from commands import failures
from utils.process import interrupt, startup
for notice in interrupt.NOTICES:
    signal.signal(notice, interrupt.raise_once)
with failures.as_exit_code() as outcome:
    try:
        print("ready", flush=True)
        time.sleep(30)
    finally:
        time.sleep(0.3)
        print("saved", flush=True)
startup.leave(outcome.code)
"""


def test_fifty_signals_end_as_one():
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_TO_SAVE], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    for number in range(50):
        if process.poll() is None:
            process.send_signal(signal.SIGINT if number % 5 else signal.SIGTERM)
        time.sleep(0.01)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (75, "saved\n")
    assert "Traceback" not in err and err.count("the same command goes on from there") == 1


def test_a_signal_after_a_while_interrupts_again(monkeypatch):
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            interrupt.raise_once(signal.SIGINT, None)
        interrupt.raise_once(signal.SIGINT, None)
        monkeypatch.setattr(interrupt, "_raised", interrupt._raised - interrupt.PATIENCE)
