"""Seeds, devices, environment facts, and the log files of a run."""

import importlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from utils import runtime
from utils.runtime import RunLog, SetupError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def log(tmp_path):
    with RunLog(tmp_path / "run", console=False) as log:
        yield log


def rows(log):
    return [json.loads(line) for line in (log.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------- seeds


def test_named_seed_is_fixed_for_all_time():
    # Written down once: a change here would silently change every published run.
    assert runtime.named_seed(1, "train", 0, 3) == 1543297849601607153
    assert runtime.named_seed() == 5460801731388113703


def test_named_seed_depends_on_every_part_and_its_type():
    cases = [(1, 2), (2, 1), (12,), ("1", 2), (1.0, 2), ((1, 2),), (1,), (True, 2), (None, 2), (b"1", 2)]
    assert len({runtime.named_seed(*case) for case in cases}) == len(cases)
    assert all(0 <= runtime.named_seed(i) < 2**63 for i in range(100))


def test_named_seed_takes_numpy_scalars_and_refuses_objects():
    assert runtime.named_seed(np.int64(7), np.str_("a"), torch.tensor(3)) == runtime.named_seed(7, "a", 3)
    with pytest.raises(TypeError, match="not object"):
        runtime.named_seed(object())


def test_generators_and_global_seeds():
    import random

    first, again, other = (torch.rand(3, generator=runtime.named_generator("x", i)) for i in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    runtime.seed_everything(5)
    drawn = random.random(), np.random.rand(), torch.rand(1).item()
    runtime.seed_everything(5)
    assert drawn == (random.random(), np.random.rand(), torch.rand(1).item())
    assert len(set(drawn)) == 3


def test_named_seed_and_runlog_need_no_torch():
    code = "import sys, utils.runtime as r; r.named_seed('a'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---------------------------------------------------------------- machine


def test_pick_device_falls_back_with_one_warning(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime.pick_device("auto") == (torch.device("cpu"), None)
    assert runtime.pick_device("cpu") == (torch.device("cpu"), None)
    device, warning = runtime.pick_device("cuda:1")
    assert device == torch.device("cpu") and "'cuda:1'" in warning and "using the CPU" in warning


def test_pick_device_with_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert runtime.pick_device("auto") == (torch.device("cuda:0"), None)
    assert runtime.pick_device("cuda:1") == (torch.device("cuda:1"), None)
    device, warning = runtime.pick_device("cuda:2")
    assert device == torch.device("cuda:0") and "2 GPUs" in warning


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "", "cuda:0 "])
def test_pick_device_refuses_unknown_names(name):
    with pytest.raises(ValueError, match="auto, cpu, cuda or cuda:N"):
        runtime.pick_device(name)


def broken_import(error):
    def load(name):
        assert name == "torchvision"
        raise error

    return load


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("operator torchvision::nms does not exist\nmore"),
        ImportError("libcudart.so.13: cannot open shared object file"),
    ],
)
@pytest.mark.parametrize(("cuda", "build"), [(None, "CPU-only"), ("13.2", "CUDA 13.2")])
def test_torchvision_of_another_build_gives_two_lines(monkeypatch, error, cuda, build):
    monkeypatch.setattr(importlib, "import_module", broken_import(error))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(SetupError) as caught:
        runtime.check_torchvision()
    wrong, fix = str(caught.value).split("\n")
    assert "different builds" in wrong and str(error).splitlines()[0] in wrong and build in wrong
    assert fix == "Fix: pip uninstall -y torch torchvision && pip install torch torchvision"
    assert isinstance(caught.value, ValueError)


def test_torchvision_missing(monkeypatch):
    monkeypatch.setattr(importlib, "import_module", broken_import(ModuleNotFoundError("no", name="torchvision")))
    with pytest.raises(SetupError, match=r"torchvision is not installed\.\nFix: pip install -r requirements\.txt"):
        runtime.check_torchvision()


def test_torchvision_here_is_fine():
    runtime.check_torchvision()


def test_environment_is_strict_json_without_names(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "--set", "about=two words"])
    facts = runtime.environment(torch.device("cpu"))
    assert facts["command"] == "python main.py --set 'about=two words'"
    assert facts["versions"]["torch"] == torch.__version__ or facts["versions"]["torch"] in torch.__version__
    text = json.dumps(facts, allow_nan=False)
    assert str(Path.home()) not in text and str(ROOT) not in text
    assert facts["device"] == "cpu" and facts["cpu_count"] >= 1 and facts["threads"] >= 1


def test_git_facts_outside_a_repository(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    assert runtime._git() is None
    monkeypatch.setattr(runtime, "ROOT", ROOT / "utils")  # inside a repository, but not its root: not our commit
    assert runtime._git() is None


def test_peak_memory_is_in_bytes():
    assert 50e6 < runtime.peak_memory() < 1e12  # an interpreter with torch: more than 50 MB, less than a terabyte


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
    with pytest.raises(ValueError, match="has 3 rows, but 4 are to be kept"):
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
    with pytest.raises(ValueError, match="is being written by another run"):
        RunLog(log.folder, console=False)
    log.close()
    RunLog(log.folder, console=False).close()


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
    monkeypatch.setattr(runtime.time, "monotonic", lambda: now[0])
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
    monkeypatch.setattr(runtime.time, "monotonic", lambda: now[0])
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
    assert runtime.clock(seconds) == text


def test_what_stopped_a_run_stands_in_its_log(tmp_path):
    with pytest.raises(RuntimeError), RunLog(tmp_path, console=False) as log:
        log.info("so far")
        log.sync()
        raise RuntimeError("the reason")
    text = (tmp_path / "run.log").read_text(encoding="utf-8")
    assert " STOP  Traceback" in text and text.endswith("RuntimeError: the reason\n")
