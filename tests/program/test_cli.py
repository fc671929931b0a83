"""The program as a user meets it: run folder, re-runs, interruption and resume, exit codes, messages."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest

import main
from commands import load
from tests.helpers.runs import assert_same_run, rows_of
from utils.config.strict_json import read_json
from utils.run import task as run_task
from utils.run.log import RunLog
from utils.text import CONTROL

ROOT = Path(__file__).resolve().parents[2]
# a run of some seconds: random weights and 16 pixels are enough, since nothing here looks at how good it gets
TINY = {
    "about": "a tiny run", "model_name": "sema", "dataset": "digits", "init_cls": 4, "increment": 3, "seed": [1, 2],
    "memory_size": 0, "backbone_weights": "random", "image_size": 16, "batch_size": 256, "func_epoch": 2, "rd_epoch": 2,
    "init_lr": 0.01, "rd_lr": 0.001, "ffn_num": 4, "rd_dim": 8, "exp_threshold": 0.5, "adapt_start_layer": 4,
    "adapt_end_layer": 5, "ffn_adapter_dropout": 0.1,
}  # fmt: skip
TASKS = 3
FIELDS = {
    "model_name", "dataset", "seed", "class_order", "task_classes", "accuracy_matrix", "top1_curve", "top5_curve",
    "last_accuracy", "average_accuracy", "final_task_mean", "forgetting", "backward_transfer", "task_oracle_accuracy",
    "adapters_per_layer", "trainable_parameters", "total_parameters", "selection_history", "test_evaluations", "seconds",
    "images_per_second", "peak_memory_bytes", "peak_memory_by_task", "head_drift", "task_oracle_curve", "task_confusion",
    "wrong_task", "class_names", "provenance", "digest", "last_accuracy_interval", "learning_accuracy",
    "learning_accuracy_known", "ece_curve", "class_images", "class_accuracy", "class_accuracy_when_new", "class_confusion",
    "class_confusion_beyond", "mistakes", "calibration", "operations", "cpu_seconds", "cpu_hours", "gpu_hours",
}  # fmt: skip


def start(*arguments, **options):
    """main.py in a process of its own, one thread, no terminal."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "main.py"), *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment} | options
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, **options)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "tiny.json"
    path.write_text(json.dumps(TINY), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tiny):
    """A whole run of two seeds as a user starts it: (seed folders, what it printed, its errors)."""
    out = tiny.parent / "logs"
    process = start("--config", tiny, "--out", out, "--jobs", 1)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    (place,) = (out / "tiny").iterdir()
    return [place / "seed_1", place / "seed_2"], printed, errors


# ---------------------------------------------------------------- a whole run


def test_run_folder_has_what_is_promised(finished):
    for folder in finished[0]:
        names = {"config.json", "environment.json", "run.log", "metrics.jsonl", "results.json", "report.html"}
        names |= {"provenance.json"}
        # source/: what is in no commit, so only where this checkout has such files
        assert {p.name for p in folder.iterdir()} - {"source"} == names | {"checkpoints", "plots", "samples", ".lock"}
        assert (folder / "plots" / "accuracy_matrix.png").read_bytes().startswith(b"\x89PNG")
        assert "</html>" in (folder / "report.html").read_text(encoding="utf-8")
        assert len(list((folder / "checkpoints").glob("task_?????.json"))) == 2
    assert (finished[0][0].parent.parent.parent / "latest").resolve() == finished[0][1].resolve()
    assert re.fullmatch("[0-9a-f]{12}", finished[0][0].parent.name)


def test_results_have_every_field_and_hang_together(finished):
    for seed, folder in enumerate(finished[0], start=1):
        results, faults = read_json(folder / "results.json")
        assert set(results) == FIELDS and not faults
        assert (results["model_name"], results["dataset"], results["seed"]) == ("sema", "digits", seed)
        assert [len(c) for c in results["task_classes"]] == [4, 3, 3]
        assert list(chain(*results["task_classes"])) == results["class_order"]
        assert sorted(results["class_order"]) == list(range(10))
        assert [len(row) for row in results["accuracy_matrix"]] == [1, 2, 3]
        assert all(0 <= a <= 100 for row in results["accuracy_matrix"] for a in row)
        assert results["test_evaluations"] == TASKS
        assert results["last_accuracy"] == results["top1_curve"][-1]
        assert results["average_accuracy"] == pytest.approx(sum(results["top1_curve"]) / TASKS)
        assert results["final_task_mean"] == pytest.approx(sum(results["accuracy_matrix"][-1]) / TASKS)
        assert results["top5_curve"][0] is None and results["top5_curve"][1] is not None  # four classes, then seven
        assert results["adapters_per_layer"][0] == {str(layer): 1 for layer in range(6)}
        assert len(results["trainable_parameters"]) == len(results["total_parameters"]) == TASKS
        for trained, total, adapters in zip(
            results["trainable_parameters"], results["total_parameters"], results["adapters_per_layer"], strict=True
        ):
            assert 0 < trained < total and max(adapters.values()) <= TASKS
        assert [set(s) for s in results["seconds"]] == [{"train", "detect", "evaluate"}] * TASKS
        assert results["images_per_second"] > 0 and results["peak_memory_bytes"] > 10**8
    assert results["class_order"] != read_json(finished[0][0] / "results.json")[0]["class_order"]


def test_metrics_have_every_epoch_and_task(finished):
    for folder in finished[0]:
        rows = rows_of(folder)
        epochs = {}
        for row in rows:
            if row["kind"] == "epoch":
                epochs.setdefault((row["task"], row["phase"]), []).append(row["epoch"])
                assert row["loss"] >= 0 and row["images"] > 0 and row["lr"] > 0
        assert {("func", 0), ("rd", 0)} <= {(phase, task) for task, phase in epochs}
        assert {task for task, _ in epochs} == set(range(TASKS))
        assert all(numbers == [1, 2] for numbers in epochs.values())
        matrix = read_json(folder / "results.json")[0]["accuracy_matrix"]
        tasks = [row for row in rows if row["kind"] == "task"]
        assert [row["task"] for row in tasks] == list(range(TASKS))
        assert [[100 * a for a in row["accuracy"]] for row in tasks] == [pytest.approx(row) for row in matrix]


def test_config_and_environment_say_how_to_repeat_it(finished, tmp_path, capsys):
    folder = finished[0][1]
    values, _ = read_json(folder / "config.json")
    assert values["seed"] == [2] and values["detect_batch_size"] == 128 and "memory_size" not in values
    assert (
        main.main(["--config", str(folder / "config.json"), "--check", "headers"]) == 0
    )  # it is an experiment file itself
    assert "(default)" not in capsys.readouterr().out
    facts, _ = read_json(folder / "environment.json")
    assert facts["command"].startswith("python ") and "--config" in facts["command"] and facts["device"] == "cpu"
    assert {"torch", "timm", "numpy"} <= set(facts["versions"])
    assert facts["backbone"]["tag"] == "embedded" and re.fullmatch("[0-9a-f]{16}", facts["backbone"]["weight_hash"])


def test_logs_are_separate_and_free_of_control_codes(finished):
    folders, printed, errors = finished
    for own, other in (folders, folders[::-1]):
        text = (own / "run.log").read_bytes().decode("utf-8")
        assert own.name in text and other.name not in text
        assert not CONTROL.search(text)
        assert (
            "after task 3/3" in text
            and text.count("these keys have no effect for sema and are ignored: memory_size") == 1
        )
    assert not CONTROL.search(printed) and not CONTROL.search(errors)


def test_console_shows_banner_tables_progress_and_summary(finished):
    folders, printed, errors = finished
    for word in (
        "method",
        "backbone",
        "device",
        "seeds",
        "parameters",
        "run folder",
        "after task 1/3",
        "forgetting",
        "layer 5",
    ):
        assert word in printed
    assert re.search(r"seed 1, tasks [12]/3, \S+ left \S+", errors) and re.search(r"task 1 func [12]/2", errors)
    values = [read_json(f / "results.json")[0]["last_accuracy"] for f in folders]
    assert re.search(rf"^mean +{sum(values) / 2:.2f} ", printed, re.MULTILINE)
    assert re.search(rf"^std +{abs(values[0] - values[1]) / 2**0.5:.2f} ", printed, re.MULTILINE)
    assert printed.rstrip().endswith(f"run folder: {folders[0].parent}")


def test_the_same_command_again_prints_the_result_and_writes_nothing(finished, tiny, capsys):
    folders, printed, _ = finished
    before = {p: p.stat().st_mtime_ns for folder in folders for p in folder.rglob("*")}
    assert main.main(["--config", str(tiny), "--out", str(tiny.parent / "logs")]) == 0
    again = capsys.readouterr().out
    assert "seed 1 is finished" in again and again.rstrip().endswith(
        printed[printed.index("sema on digits") :].rstrip()
    )
    assert {p: p.stat().st_mtime_ns for folder in folders for p in folder.rglob("*")} == before


# ---------------------------------------------------------------- interruption and resume


@pytest.mark.slow
@pytest.mark.parametrize(("notice", "code"), [(signal.SIGTERM, 75), (signal.SIGKILL, -9)], ids=["term", "kill"])
def test_stopped_at_any_moment_the_same_command_ends_the_same(notice, code, finished, tiny, tmp_path, capsys):
    out, folder = tmp_path / "logs", tmp_path / "logs" / "tiny" / finished[0][0].parent.name / "seed_1"
    process = start("--config", tiny, "--out", out, "--set", "seed=[1]")
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "task_00000.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(notice)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and not (folder / "results.json").exists()
    if code == 75:
        words = r"interrupted( after task \d.*, which is saved|: what is finished is saved), the same command goes on"
        assert re.search(words, errors.rstrip())
        assert "Traceback" not in errors
    assert main.main(["--config", str(tiny), "--out", str(out), "--set", "seed=[1]"]) == 0
    assert re.search(r"resumed: tasks 1 to [12] are done", capsys.readouterr().out)
    assert_same_run(folder, finished[0][0])


@pytest.fixture
def interrupted(tiny, tmp_path, monkeypatch, finished):
    """A run of seed 1 that stopped in its third task: (arguments to run it again, its folder)."""
    arguments = ["--config", str(tiny), "--out", str(tmp_path / "logs"), "--set", "seed=[1]"]
    whole = run_task.learn

    def stop(learner, stream, index, *rest):
        if index == 2:
            learner.log.row("epoch", task=2, phase="half", epoch=1, loss=1.0)
            raise KeyboardInterrupt
        return whole(learner, stream, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(run_task, "learn", stop)
        assert main.main(arguments) == 75
    return arguments, tmp_path / "logs" / "tiny" / finished[0][0].parent.name / "seed_1"


def test_a_damaged_checkpoint_gives_way_to_the_one_before(interrupted, finished, capsys):
    arguments, folder = interrupted
    newest = folder / "checkpoints" / "task_00001.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    assert main.main(arguments) == 0
    text = (folder / "run.log").read_text(encoding="utf-8")
    assert "the checksum of task_00001.safetensors does not match" in text and "tasks 1 to 1 are done" in text
    assert_same_run(folder, finished[0][0])


def test_resume_never_starts_afresh_and_keeps_the_old_folder(interrupted, finished, capsys):
    arguments, folder = interrupted
    old = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    assert main.main([*arguments, "--resume", "never"]) == 0
    assert "resumed" not in capsys.readouterr().out
    kept = folder.with_name("seed_1.old_1")
    assert {name: (kept / name).read_bytes() for name in old} == old
    assert_same_run(folder, finished[0][0])


def test_two_runs_cannot_share_a_folder(interrupted, capsys):
    arguments, folder = interrupted
    with RunLog(folder, console=False):
        assert main.main(arguments) == 2
    assert "being written by another run" in capsys.readouterr().err


# ---------------------------------------------------------------- messages and exit codes


def test_alone_it_prints_help_with_five_commands(capsys):
    assert main.main([]) == 0
    shown = capsys.readouterr().out
    commands = [line.strip() for line in shown.splitlines() if line.startswith("  python main.py")]
    assert len(commands) == 5
    for command in commands:
        config = re.search(r"--config (\S+)", command)
        assert config is None or (ROOT / config[1]).is_file()


@pytest.mark.parametrize("arguments", [["--chek"], ["--resume", "maybe"], ["--set"], ["--jobs", "0"]])
def test_wrong_options_end_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main.main(arguments)
    assert caught.value.code == 2 and "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--check"], "--config FILE is needed beside --check"),
        (["--set", "a=1"], "--config FILE is needed beside --set"),
        (["--list", "--check"], "ask for one at a time"),
        (["--explain", "logs", "--compare", "logs"], "ask for one at a time"),
        (["--evaluate", "logs", "--set", "a=1"], "takes the settings of that run"),
        (["--profile"], "--profile measures a run"),
        (["--verify", "logs", "--jobs", "2"], "--jobs has no effect with --verify: leave it out"),
        (["--compare", "logs", "--data-root", "data"], "--data-root has no effect with --compare: leave it out"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(arguments, words, capsys):
    assert main.main(arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and words in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("batch_size=0", "batch_size"),
        ("adapt_end_layer=6", "adapt_end_layer"),
        ("image_size=7", "image_size"),
        ('backbone_weights="nowhere.safetensors"', "nowhere.safetensors"),
        ("dataset=imagenetr", "imagenet-r"),
        ("init_lr=100.0", "loss"),
    ],
)
def test_a_users_mistake_ends_with_2_and_no_traceback(change, words, tiny, tmp_path, capsys):
    arguments = ["--config", str(tiny), "--out", str(tmp_path), "--data-root", str(tmp_path / "data"), "--set", change]
    assert main.main([*arguments, "--set", "optimizer=adam"] if "lr" in change else arguments) == 2
    shown = capsys.readouterr().err
    assert words in shown and "Traceback" not in shown and "error: " in shown


def test_missing_data_say_where_they_were_looked_for(tiny, tmp_path, capsys):
    assert (
        main.main(
            ["--config", str(tiny), "--set", "dataset=vtab", "--data-root", str(tmp_path), "--out", str(tmp_path)]
        )
        == 2
    )
    shown = capsys.readouterr().err
    assert str(tmp_path / "vtab") in shown and "https://" in shown


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("a reason"), 2, "error: a reason"),
        (FileNotFoundError("no images in x"), 2, "error: no images in x"),
        (PermissionError(13, "Permission denied", "logs/x"), 2, "error: logs/x: Permission denied"),
        (
            OSError(28, "No space left on device", "logs/x"),
            1,
            "error: logs/x: No space left on device; free space there or give another --out",
        ),
        (MemoryError(), 1, "lower batch_size"),
        (RuntimeError("shapes differ\nmore"), 1, "error: RuntimeError: shapes differ (a fault of the program"),
    ],
)
def test_exit_codes_of_errors(error, code, words, tiny, monkeypatch, capsys):
    def fail(args):
        raise error

    monkeypatch.setattr(load, "load", fail)
    assert main.main(["--config", str(tiny)]) == code
    shown = capsys.readouterr().err
    assert words in shown and len(shown.splitlines()) == 1
    assert main.main(["--config", str(tiny), "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_an_unexpected_error_leaves_its_traceback_in_the_log(tiny, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("deep inside")

    monkeypatch.setattr(run_task, "learn", fail)
    assert main.main(["--config", str(tiny), "--out", str(tmp_path)]) == 1
    assert "--debug shows where" in capsys.readouterr().err
    assert "in fail" in (tmp_path / "latest" / "run.log").read_text(encoding="utf-8")


def test_out_that_is_a_file(tiny, tmp_path, capsys):
    (tmp_path / "logs").write_text("")
    assert main.main(["--config", str(tiny), "--out", str(tmp_path / "logs")]) == 2
    assert str(tmp_path / "logs") in capsys.readouterr().err


def test_a_gpu_that_is_not_here_is_an_error_before_anything_is_written(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for flags in (["--set", 'device=["0"]'], ["--device", "cuda"]):
        assert main.main(["--config", str(tiny), "--out", str(tmp_path / "out"), *flags]) == 2
        assert "auto takes the CPU where there is no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_warnings_come_once_for_all_seeds_but_stand_in_each_log(finished):
    folders, printed, errors = finished
    assert (printed + errors).count("memory_size") == 1  # TINY has two seeds and one key that never acted
    assert all("memory_size" in (folder / "run.log").read_text(encoding="utf-8") for folder in folders)


@pytest.mark.parametrize("change", ["adapt_end_layer=40", "image_size=30", "backbone_weights=nowhere.pth"])
def test_what_does_not_fit_the_backbone_is_refused_before_there_is_a_run_folder(change, tiny, tmp_path, capsys):
    assert main.main(["--config", str(tiny), "--out", str(tmp_path / "out"), "--set", change]) == 2
    assert change.partition("=")[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_minimal_settings_fit_the_default_backbone(tmp_path, capsys):
    path = tmp_path / "minimal.json"
    path.write_text('{"model_name": "sema", "dataset": "digits", "init_cls": 2, "increment": 2}', encoding="utf-8")
    assert main.main(["--config", str(path), "--check"]) == 0
    assert "each added adapter" in capsys.readouterr().out


def test_damaged_results_are_made_anew_from_the_last_checkpoint(finished, tiny, tmp_path, capsys):
    out = tmp_path / "logs"
    shutil.copytree(finished[0][0].parent.parent.parent, out, symlinks=True)
    damaged = out / finished[0][0].relative_to(finished[0][0].parent.parent.parent) / "results.json"
    damaged.write_bytes(b"")
    assert main.main(["--config", str(tiny), "--out", str(out)]) == 0
    assert "results.json" in capsys.readouterr().err
    assert_same_run(damaged.parent, finished[0][0])


def test_check_shows_defaults_tasks_and_parameters(tiny, capsys):
    changes = ["--set", "class_order_seed=1993", "--set", "batch_size=16"]
    assert main.main(["--config", str(tiny), "--check", "headers", *changes]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^  batch_size +16$", shown, re.MULTILINE)
    assert re.search(r"^  eval_batch_size +256   \(default\)$", shown, re.MULTILINE)
    assert "10 classes in 3 tasks, class order of seed 1993" in shown
    assert re.search(r"^    1:   4 classes  4 2 7 6$", shown, re.MULTILINE)
    assert re.search(r"[\d,]+  task 1: one adapter a layer", shown)
    assert "note: these keys have no effect for sema and are ignored: memory_size" in shown


def test_output_into_a_closed_pipe_is_no_error():
    process = start("--list")
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=60) == 1
