"""Sweeps: their cells and faults, the table, the processes; and two whole sweeps through the command line."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import scipy.stats

import main
from commands import load as commands_load
from commands import options as command
from utils.compare import table
from utils.config.strict_json import ConfigError, read_json
from utils.engines import jobs as pool
from utils.engines import local
from utils.evaluation.metrics import paired_difference
from utils.files.lock import Lock
from utils.text import latex

ROOT = Path(__file__).resolve().parents[2]
BASE = {
    "about": "base", "model_name": "simplecil", "dataset": "digits", "init_cls": 4, "increment": 3, "seed": [1, 2],
    "backbone_weights": "random", "image_size": 16, "batch_size": 64,
}  # fmt: skip


def write(folder, spec, **changes):
    path = folder / "small.json"
    values = BASE | changes | ({} if spec is None else {"sweep": spec})
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def load(folder, spec, *options, **changes):
    return commands_load.load(
        command.parser("").parse_args(["--config", str(write(folder, spec, **changes)), *options])
    )


def alone_in(folder, **changes):
    """The settings of a file without a sweep."""
    loaded = load(folder, None, **changes)
    assert not loaded.declared
    return loaded.cells[0].resolved


def faults_of(folder, spec, *options, **changes):
    with pytest.raises(ConfigError) as caught:
        load(folder, spec, *options, **changes)
    return caught.value.faults


# ---------------------------------------------------------------- cells


def test_a_grid_has_every_combination_the_last_key_fastest(tmp_path):
    swept = load(tmp_path, {"batch_size": [8, 16], "image_size": [16, 24]})
    labels = [cell.label for cell in swept.cells]
    assert labels == [f"batch_size={b}, image_size={i}" for b in (8, 16) for i in (16, 24)]
    for cell in swept.cells:
        kept = cell.resolved.settings
        assert cell.label == f"batch_size={kept.batch_size}, image_size={kept.image_size}" and kept.seed == (1, 2)
        # the cell is what a file with these values would be: no trace of the sweep, the same run folder
        alone = alone_in(tmp_path, batch_size=kept.batch_size, image_size=kept.image_size)
        assert alone.values == cell.resolved.values and alone.hash == cell.resolved.hash
        assert cell.run_folder(tmp_path, "small", 1) == tmp_path / "small" / alone.hash / "seed_1"


def test_arms_may_change_the_method_and_leave_its_keys_behind(tmp_path):
    arms = [{}, {"prefix": "trained", "model_name": "finetune", "epochs": 3}, {"image_size": None}]
    first, second, third = load(tmp_path, arms).cells
    assert [first.label, second.label, third.label] == ["as in the file", "trained", "image_size=null"]
    assert (second.resolved.settings.model_name, second.resolved.settings.epochs) == ("finetune", 3)
    assert third.resolved.settings.image_size is None and "image_size" not in third.values  # the default
    # the other way round: what only finetune knows does not follow it, and a note says so
    away = load(tmp_path, [{}, {"model_name": "simplecil"}], model_name="finetune", epochs=3, init_lr=0.1).cells[1]
    assert away.resolved.notes == (
        "keys of finetune that simplecil does not have are left out: epochs, init_lr",
        "these keys have no effect with simplecil, which trains nothing: batch_size",
    )
    assert away.values.keys() == BASE.keys()


def test_the_name_of_a_sweep_stands_for_its_cells_whatever_the_seeds(tmp_path):
    grid = {"batch_size": [8, 16]}
    name = load(tmp_path, grid).hash
    assert (
        load(tmp_path, grid, seed=[1, 2, 3]).hash == name == load(tmp_path, [{"batch_size": b} for b in (8, 16)]).hash
    )
    assert len({name, load(tmp_path, {"batch_size": [16, 8]}).hash, load(tmp_path, grid, image_size=24).hash}) == 3


def test_without_a_sweep_there_is_one_cell(tmp_path):
    (cell,) = load(tmp_path, {"batch_size": [8]}, "--set", "sweep=null").cells
    assert cell.label == "as in the file" and cell.resolved.values == alone_in(tmp_path).values


def test_jobs_run_the_seeds_of_a_plain_file_beside_each_other(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(local, "run", lambda jobs, at_once, accuracy_of: started.extend((at_once, job) for job in jobs))
    assert main.main(["--config", str(write(tmp_path, None)), "--out", str(tmp_path), "--jobs", "2"]) == 0
    place = tmp_path / "small" / alone_in(tmp_path).hash
    for seed, (at_once, job) in zip((1, 2), started, strict=True):
        assert (at_once, job.seed, job.folder) == (2, seed, place / f"seed_{seed}")
        config = Path(job.command[job.command.index("--config") + 1])
        assert config.name == "small.json" and read_json(config)[0] == BASE and f"seed=[{seed}]" in job.command


def test_an_older_file_is_translated_in_every_cell_and_its_cells_are_no_older_files(tmp_path):
    older = {"model_name": "nested_lora", "memory_size": 0, "nb_tasks": 2}
    methods = ["pam", "concat"]
    swept = load(tmp_path, {"nested_lora_consolidation_method": methods}, **older)
    for method, cell in zip(methods, swept.cells, strict=True):
        assert cell.resolved.settings.nested_lora_consolidation_method == method
        assert alone_in(tmp_path, **cell.values).hash == cell.resolved.hash  # what the process will read


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        ({}, r"sweep: an object .* that is not empty is expected; got \{\}"),
        ([], "sweep: an object .* that is not empty is expected"),
        (3, "sweep: .*; got 3"),
        ({"batch_size": []}, "sweep: batch_size: the list is empty"),
        ({"batch_size": 8}, "sweep: batch_size: a list of values is expected; got 8"),
        ({"batch_size": [8, 4, 8]}, "sweep: batch_size: 8 is listed more than once"),
        ({"seed": [1, 2]}, 'sweep: seed: seeds are the list "seed" itself'),
        ([{"seed": 1}], "sweep: seed: "),
        ({"sweep": [1]}, "sweep: sweep: a sweep cannot contain another sweep"),
        ([{"batch_size": 8}, 8], "sweep: an object of changed keys is expected in the list; got 8"),
        ({"bath_size": [1, 2]}, "bath_size: unknown key; did you mean 'batch_size'"),
        ([{"bath_size": None}, {}], r"cell 1 \(bath_size=null\): bath_size: unknown key"),
        ({"batch_size": [0, 8]}, r"cell 1 \(batch_size=0\): batch_size: must be greater"),
        ({"num_workers": [0, 1]}, r"sweep: cells 1 \(num_workers=0\) and 2 .* are the same run"),
        ([{}, {"batch_size": 64}], "sweep: cells 1 .* and 2 .* are the same run"),
        ([{"prefix": "a"}, {"prefix": "a", "batch_size": 8}], "sweep: cells 1 and 2 are both called 'a'"),
    ],
    ids=lambda value: json.dumps(value) if not isinstance(value, str) else "",
)
def test_faults_of_a_sweep(spec, fault, tmp_path):
    (found,) = faults_of(tmp_path, spec)
    assert re.match(fault, found), found


def test_a_key_is_swept_or_set_but_not_both(tmp_path):
    taken = "is in the sweep and on the command line; keep one"
    assert faults_of(tmp_path, {"batch_size": [8, 16]}, "--set", "batch_size=8") == [f"batch_size: {taken}"]
    assert faults_of(tmp_path, [{"device": "cpu"}], "--device", "cpu") == [f"device: {taken}"]


def test_all_faults_of_all_cells_at_once_and_shared_ones_once(tmp_path):
    shared, *own = faults_of(tmp_path, {"batch_size": [0, 8], "image_size": [7, 16]}, init_cls=0)
    assert shared.startswith("init_cls: ")
    assert [fault.split(":")[0] + fault.split(":")[1] for fault in own] == [
        "cell 1 (batch_size=0, image_size=7) image_size",
        "cell 1 (batch_size=0, image_size=7) batch_size",
        "cell 2 (batch_size=0, image_size=16) batch_size",
        "cell 3 (batch_size=8, image_size=7) image_size",
    ]
    assert len(faults_of(tmp_path, {"seed": [1]}, init_cls=0)) == 2  # a broken sweep does not hide the rest


def test_check_shows_cells_and_refuses_what_does_not_fit_the_backbone(tmp_path, capsys):
    assert main.main(["--config", str(write(tmp_path, {"image_size": [16, 24]})), "--check"]) == 0
    shown = capsys.readouterr().out
    assert (
        re.search(r"^  image_size +16$", shown, re.MULTILINE) and "10 classes in 3 tasks" in shown
    )  # of the first cell
    assert re.search(r"^ +2  [0-9a-f]{12} +0  image_size=24$", shown, re.MULTILINE)
    assert "2 cells of 2 seeds: 4 runs\n" in shown and "the settings are valid" in shown
    path = write(tmp_path, {"image_size": [30, 16, 31]})
    for options in (["--check"], ["--out", str(tmp_path / "out")]):
        assert main.main(["--config", str(path), *options]) == 2
        errors = capsys.readouterr().err
        assert "cell 1 (image_size=30): image_size: 30" in errors and "cell 3 (image_size=31)" in errors
        assert "cell 2" not in errors
    assert not (tmp_path / "out").exists()


def test_missing_data_are_said_before_the_first_run(tmp_path, capsys):
    path = write(tmp_path, {"batch_size": [8, 16]}, dataset="vtab")
    options = ["--config", str(path), "--data-root", str(tmp_path / "data")]
    assert main.main([*options, "--check"]) == 0
    assert capsys.readouterr().out.count("https://") == 1  # the same for both cells
    assert main.main([*options, "--out", str(tmp_path / "out")]) == 2
    assert "https://" in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the table


def test_paired_difference_is_students():
    ours, theirs = {1: 71.5, 2: 70.0, 3: 75.25, 4: 68.0}, {4: 66.5, 3: 74.0, 2: 70.5, 1: 69.0}
    found = paired_difference(ours, theirs)
    test = scipy.stats.ttest_rel([ours[s] for s in sorted(ours)], [theirs[s] for s in sorted(theirs)])
    low, high = test.confidence_interval(0.95)
    assert found.n == 4 and found.mean == (2.5 - 0.5 + 1.25 + 1.5) / 4
    assert (found.low, found.high) == (pytest.approx(low, rel=1e-12), pytest.approx(high, rel=1e-12))
    low, high = test.confidence_interval(0.5)
    assert paired_difference(ours, theirs, 0.5)[1:3] == (pytest.approx(low, rel=1e-12), pytest.approx(high, rel=1e-12))


def test_paired_difference_leaves_out_what_has_no_partner():
    assert paired_difference({1: 5.0, 2: 7.0, 3: None, 4: 1.0}, {1: 4.0, 3: 2.0, 4: None}) == (1.0, None, None, 1)
    assert paired_difference({1: 5.0}, {2: 4.0}) == (None, None, None, 0)
    assert paired_difference({1: 5.0, 2: 3.0}, {1: 4.0, 2: 2.0}) == (1.0, 1.0, 1.0, 2)


def results(last, forgetting=1.0):
    return {"last_accuracy": last, "average_accuracy": last + 1, "forgetting": forgetting}


ROWS = table.compare(
    [
        ("a_1 & 50%", "0" * 12, {1: results(70.0), 2: results(72.0)}),
        ("b|c", "1" * 12, {1: results(71.0, None), 2: results(74.5, None), 3: results(90.0, None)}),
        ("one", "2" * 12, {2: results(72.123456789)}),
        ("none", "3" * 12, {}),
    ]
)


def test_a_row_that_selected_on_test_data_says_so():
    honest, peeked = (
        {**results(70.0), "selection_history": [{"split": split}, {"task": 1}]} for split in ("held-out", "test")
    )
    rows = table.compare([("a", "0" * 12, {1: honest, 2: honest}), ("b", "1" * 12, {1: honest, 2: peeked})])
    assert [row.shown for row in rows] == ["a", "b (selected on TEST data)"]
    assert "| b (selected on TEST data) |" in table.as_markdown(rows)
    assert "b (selected" in table.as_text(rows) and "b (selected" in table.as_latex(rows)
    lines = list(csv.DictReader(io.StringIO(table.as_csv(rows))))  # names as they are: --compare reads them again
    assert [(line["cell"], line["selected_on_test"]) for line in lines] == [("a", "no"), ("b", "yes")]


def test_csv_has_every_number_in_full():
    lines = list(csv.DictReader(io.StringIO(table.as_csv(ROWS))))
    assert [line["cell"] for line in lines] == ["a_1 & 50%", "b|c", "one", "none"]
    second, third, fourth = lines[1:]
    assert (second["settings"], second["last_accuracy_n"], second["last_accuracy_pairs"]) == ("1" * 12, "3", "2")
    gap = paired_difference({1: 71.0, 2: 74.5}, {1: 70.0, 2: 72.0})
    assert [float(second[f"last_accuracy_{x}"]) for x in ("difference", "low", "high")] == list(gap[:3])
    assert float(third["last_accuracy_mean"]) == 72.123456789
    assert (third["last_accuracy_std"], third["last_accuracy_low"], lines[0]["last_accuracy_difference"]) == (
        "",
        "",
        "",
    )
    assert second["forgetting_mean"] == "" and fourth["last_accuracy_mean"] == ""


def test_text_has_a_dash_where_nothing_is_defined():
    first, second, third, fourth = table.as_text(ROWS).splitlines()[1:5]
    assert first.split()[3:] == ["71.00", "1.41", "2", "-", "-", "-"]
    # differences 1 and 2.5: mean 1.75, std 1.0607, t(0.975, 1) = 12.706
    assert second.split() == ["b|c", "78.50", "10.11", "3", "+1.75", "[-7.78,", "+11.28]", "2"]
    assert third.split() == ["one", "72.12", "-", "1", "+0.12", "-", "1"]
    assert fourth.split() == ["none", "-", "-", "0", "-", "-", "0"]


def test_markdown_and_latex_are_escaped():
    lines = table.as_markdown(ROWS).splitlines()
    assert lines[2].startswith("| a_1 & 50% | 2 | - | 71.00 ± 1.41 | - | 72.00 ± 1.41 | - |")
    assert lines[3].startswith("| b\\|c | 3 | 2 | **78.50** ± 10.11 | +1.75 [-7.78, +11.28] |")
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines[:6]}) == 1
    assert (
        lines[4] == "| one | 1 | 1 | 72.12 | +0.12 | 73.12 | +0.12 | 1.00 | +0.00 |"
    )  # no deviation, no interval of one
    text = table.as_latex(ROWS)
    assert r"one & $1$ & $1$ & $72.12$ & $+0.12$ &" in text
    assert r"a\_1 \& 50\% & $2$ & - & $71.00 \pm 1.41$ & - &" in text
    assert len({len(re.findall(r"(?<!\\)&", line)) for line in text.splitlines() if line.endswith(r"\\")}) == 1
    assert latex(r"\^~{#$") == r"\textbackslash{}\textasciicircum{}\textasciitilde{}\{\#\$"


# ---------------------------------------------------------------- processes


def job(folder, code, name="x", seed=1, state="waiting"):
    command = [sys.executable, "-c", code]
    return pool.Job(name, seed, command, folder / f"{name}_{seed}", folder / "console" / f"{name}_{seed}.txt", state)


def test_failures_are_collected_and_stop_none_of_the_others(tmp_path, capsys):
    jobs = [
        job(tmp_path, "raise SystemExit(3)", "silent"),
        job(tmp_path, "print('error: \\x1b[31mno such thing'); print('more'); raise SystemExit(2)", "said"),
        job(tmp_path, "raise SystemExit(75)", "stopped"),
        job(tmp_path, "import os; print(os.environ['OMP_NUM_THREADS'])", "good"),
        job(tmp_path, "raise RuntimeError('was finished before')", "old", state="done"),
    ]
    local.run(jobs, 2, lambda folder: 87.125)
    assert [j.state for j in jobs] == ["failed", "failed", "failed", "done", "done"]
    assert jobs[0].reason.startswith("exit 3: it printed nothing")
    assert jobs[1].reason.startswith("exit 2: error: no such thing") and str(jobs[1].console) in jobs[1].reason
    assert jobs[2].reason.startswith("interrupted, resumable")
    assert jobs[3].accuracy == 87.125 and jobs[3].console.read_text().strip() == os.environ.get(
        "OMP_NUM_THREADS", str(local.threads(2))
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all("\x1b" not in line for line in lines)
    assert sum(bool(re.match(r"\[\d/5\] good, seed 1: done after 0:0\d, last accuracy 87.12$", x)) for x in lines) == 1


def test_no_more_run_at_a_time_than_asked(tmp_path):
    code = f"""
import os, time, pathlib
mine = pathlib.Path({str(tmp_path)!r}) / f"running_{{os.getpid()}}"
mine.write_text("")
time.sleep(0.4)
print(len(list(mine.parent.glob("running_*"))))
mine.unlink()
"""
    jobs = [job(tmp_path, code, seed=seed) for seed in range(5)]
    local.run(jobs, 2, lambda folder: 1.0)
    counts = [int(j.console.read_text()) for j in jobs]
    assert max(counts) == 2 and all(j.state == "done" for j in jobs)


def test_runs_of_a_killed_sweep_are_waited_for(tmp_path, monkeypatch, capsys):
    """One ends with a result, one unfinished, and one locks its folder only after the second command has started it."""
    monkeypatch.setattr(local, "LOOK", 0.1)
    late = "import time; time.sleep({}); raise SystemExit(2)"
    jobs = [
        job(tmp_path, "raise SystemExit(9)", "done"),
        job(tmp_path, "", "left"),
        job(tmp_path, late.format(0.5), "late"),
    ]
    orphans = {}
    for one in jobs[:2]:
        orphans[one.cell] = lock_of(one.folder)
    board = pool.Board.line
    results = dict.fromkeys(["done_1", "late_1"], 50.0)
    known = set()

    def line(self, text):
        board(self, text)
        if "late" in text and "waits" in text:
            known.update(results)
            for orphan in orphans.values():
                orphan.release()

    monkeypatch.setattr(pool.Board, "line", line)
    started = local._start

    def start(one, environment):
        process = started(one, environment)
        if one.cell == "late":
            orphans["late"] = lock_of(one.folder)
        return process

    monkeypatch.setattr(local, "_start", start)
    local.run(
        jobs,
        3,
        lambda folder: 50.0 if folder.name in known or (folder.name == "left_1" and jobs[1].console.exists()) else None,
    )
    assert [j.state for j in jobs] == ["done"] * 3 and [j.accuracy for j in jobs] == [50.0] * 3
    said = capsys.readouterr().out
    assert said.count("runs already, this command waits for it (process") == 3 and "failed" not in said
    assert not jobs[0].console.exists() and jobs[1].console.exists()  # only what was unfinished is started


def lock_of(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return Lock(folder)


def test_threads_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert [local.threads(jobs) for jobs in (1, 2, 3, 8, 9)] == [8, 4, 2, 1, 1]


class Terminal(io.StringIO):
    encoding = "ascii"

    def isatty(self):
        return True


def screen(text):
    """What a terminal shows after this text: cursor up, clear below, and plain lines."""
    lines = [""]
    for part in re.split(r"(\x1b\[\d+F\x1b\[J|\n)", text):
        if part == "\n":
            lines.append("")
        elif part.startswith("\x1b"):
            lines = [*lines[: len(lines) - 1 - int(re.search(r"\d+", part)[0])], ""]
        else:
            lines[-1] += part
    return lines[:-1]


def test_the_live_table_is_redrawn_in_place(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((60, 10)))
    board = pool.Board(terminal := Terminal())
    jobs = [job(tmp_path, "", name=f"cell {i} ±", seed=seed) for seed in (1, 2) for i in range(3)]
    board.show(pool.table(jobs, 0, 60))
    jobs[0].state, jobs[0].accuracy = "done", 80.0
    jobs[3].state, jobs[3].accuracy = "done", 81.0
    jobs[1].state, jobs[2].state = "failed", "running"
    board.line("something happened")
    board.show(pool.table(jobs, 61, 60))
    shown = screen(terminal.getvalue())
    assert [line.split()[-4:] for line in shown[2:5]] == [
        ["2/2", "0", "0", "80.50"],
        ["0/2", "0", "1", "-"],
        ["0/2", "1", "0", "-"],
    ]
    assert shown[0] == "something happened" and shown[-1] == "3 of 6 runs ended, 1:01" and len(shown) == 6
    board.show(
        pool.table(
            [job(tmp_path, "", name=f"a long name of the cell, its end tells: {i:02}") for i in range(30)], 0, 60
        )
    )
    shown = screen(terminal.getvalue())
    assert len(shown) == 1 + 8 and all(len(line) < 60 for line in shown)
    assert shown[2].startswith("..") and shown[2].split()[-5:] == ["00", "0/1", "0", "0", "-"]
    assert shown[-2:] == ["... 25 more rows", "0 of 30 runs ended, 0:00"]


# ---------------------------------------------------------------- whole sweeps


def start(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    command = [sys.executable, str(ROOT / "main.py"), *map(str, arguments)]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.slow
def test_a_sweep_from_start_to_table(tmp_path, capsys):
    path, out = write(tmp_path, {"image_size": [16, 24]}, seed=[1]), tmp_path / "logs"
    process = start("--config", path, "--out", out, "--jobs", 2)
    printed, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    swept = load(tmp_path, {"image_size": [16, 24]}, seed=[1])
    folders = [cell.run_folder(out, "small", 1) for cell in swept.cells]
    found = [read_json(folder / "results.json")[0] for folder in folders]
    for folder, size in zip(folders, (16, 24), strict=True):
        settings = read_json(folder / "config.json")[0]
        assert settings["image_size"] == size and "sweep" not in settings and settings["about"] == "base"
    place = out / "small" / f"sweep_{swept.hash}"
    assert {p.name for p in place.iterdir()} >= {"table.txt", "table.csv", "table.md", "table.tex"}
    assert "simplecil" not in printed and re.search(r"^image_size=24 +[\d.]+\*? ", printed, re.MULTILINE)
    page = (place / "report.html").read_text(encoding="utf-8")
    for folder in folders:  # the page names what was run and leads to each report
        assert f'href="../{folder.parent.name}/seed_1/report.html"' in page
    assert f"page: {place / 'report.html'}\n" in printed and re.search(
        r"The highest last accuracy is .*, [\d.]+ above the next \(image_size=\d+\); one seed", page
    )
    lines = list(csv.DictReader((place / "table.csv").open(encoding="utf-8")))
    assert [float(line["last_accuracy_mean"]) for line in lines] == [r["last_accuracy"] for r in found]
    # again: nothing is run, the same table; and a run that is lost is the only one to be made anew
    before = {p: p.stat().st_mtime_ns for folder in folders for p in folder.rglob("*")}
    assert main.main(["--config", str(path), "--out", str(out)]) == 0
    told, again = capsys.readouterr().out.split("\n", 1)
    assert told == "all 2 runs of 2 cells are finished"
    assert again.strip() == printed[printed.index("digits, 3 tasks") :].strip()
    for flags in (["--config", str(path), "--out", str(out)], ["--report", str(place)]):
        (place / "report.html").unlink()  # a page that is lost is written again
        assert main.main(flags) == 0
        assert "The highest last accuracy is " in (place / "report.html").read_text(encoding="utf-8")
    capsys.readouterr()
    assert {p: p.stat().st_mtime_ns for folder in folders for p in folder.rglob("*")} == before
    (folders[0].parent / "seed_9").mkdir()
    (folders[0].parent / "seed_9" / "results.json").write_text("{}")
    assert main.main(["--config", str(path), "--out", str(out)]) == 0
    assert "not in the table, since not asked for: finished runs of seed 9" in capsys.readouterr().out


@pytest.mark.slow
def test_a_notice_reaches_the_runs_and_the_same_command_goes_on(tmp_path):
    changes = {"model_name": "finetune", "epochs": 200, "seed": [1]}
    path, out = write(tmp_path, {"init_lr": [0.01, 0.02]}, **changes), tmp_path / "logs"
    process = start("--config", path, "--out", out, "--jobs", 2)
    deadline = time.monotonic() + 100
    while len(list(out.glob("small/*/seed_1/metrics.jsonl"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 75 and "Traceback" not in errors, errors
    assert errors.rstrip().endswith("the same command goes on from there")
    assert printed.count("interrupted, resumable") == 2
    for log in out.glob("small/*/seed_1/run.log"):
        assert "Interrupted: task" in log.read_text(encoding="utf-8")  # it ended in its own time
