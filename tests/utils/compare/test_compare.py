"""`--compare`: which runs are found, which form a row, what the table and the page say, and how bad input is answered."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import main
from commands import compare
from tests.helpers.finished import make
from tests.helpers.pages import Checker, cells, html_of
from utils.compare import page, runs
from utils.compare import rows as compare_rows

ROOT = Path(__file__).resolve().parents[3]


def rows_in(*folders):
    found = runs.find(folders)
    rows = compare_rows.rows_of(found.runs)
    return rows, found.notes() + compare_rows.remarks(rows)


def start(*arguments):
    return main.main(["--compare", *map(str, arguments)])


# ---------------------------------------------------------------- what forms a row


def test_seeds_of_equal_settings_form_a_row_in_the_order_of_their_numbers(tmp_path):
    for seed in (10, 2, 1):
        make(tmp_path / "b" / f"seed_{seed}", seed)
        make(tmp_path / "a" / f"seed_{seed}", seed, init_lr=0.5, device="cuda")
    rows, notes = rows_in(tmp_path)
    assert [(row.label, row.name, list(row.runs)) for row in rows] == [
        ("init_lr=0.5", "a", [1, 2, 10]),
        ("init_lr=0.01", "b", [1, 2, 10]),
    ]
    assert notes == []
    assert [row.label for row in rows_in(tmp_path / "b", tmp_path / "a")[0]] == [
        "init_lr=0.01",
        "init_lr=0.5",
    ]  # as given
    (row,), _ = rows_in(tmp_path / "b" / "seed_2", tmp_path / "b")
    assert row.label == "sema" and list(row.runs) == [2, 1, 10]  # each once


def test_what_says_where_a_run_happened_makes_no_row(tmp_path):
    make(tmp_path / "a" / "seed_1", 1, device="cpu", data_root="x", about="one")
    make(tmp_path / "b" / "seed_2", 2, device="cuda", data_root="y", about="two")
    (row,), _ = rows_in(tmp_path)
    assert list(row.runs) == [1, 2] and compare_rows.differences([row]) == {}


def test_the_same_experiment_twice_is_two_rows(tmp_path):
    for name in ("old", "new"):
        for seed in (1, 2):
            make(tmp_path / name / "h" / f"seed_{seed}", seed)
    rows, _ = rows_in(tmp_path / "old", tmp_path / "new")
    assert [list(row.runs) for row in rows] == [[1, 2], [1, 2]]
    assert [str(run.folder.parent.parent.name) for row in rows for run in row.runs.values()] == [
        "old",
        "old",
        "new",
        "new",
    ]
    assert str(tmp_path / "old" / "h")[-20:] in rows[0].label and rows[0].label != rows[1].label


def test_labels_name_the_method_and_what_differs_among_its_rows(tmp_path):
    make(tmp_path / "a" / "seed_1", init_lr=0.1)
    make(tmp_path / "b" / "seed_1", init_lr=0.2)
    make(tmp_path / "c" / "seed_1", model_name="ncm", head="x\x1b[2J\ny")
    rows, _ = rows_in(tmp_path)
    assert [row.label for row in rows] == ["sema, init_lr=0.1", "sema, init_lr=0.2", "ncm"]
    assert compare_rows.differences(rows) == {
        "model_name": ["sema", "sema", "ncm"],
        "init_lr": [0.1, 0.2, 0.01],
        "head": [None, None, "x\x1b[2J\ny"],
    }
    make(tmp_path / "d" / "seed_1", model_name="ncm", head="z" * 100)
    assert [row.label for row in rows_in(tmp_path)[0]][2] == "ncm, head=x\\x1b[2J\\ny"
    assert len(rows_in(tmp_path)[0][3].label) <= compare_rows.LABEL + 6


def test_prefixes_are_the_labels_where_they_tell_all_rows_apart(tmp_path):
    make(tmp_path / "a" / "seed_1", init_lr=0.1, prefix="slow")
    make(tmp_path / "b" / "seed_1", init_lr=0.2, prefix="fast")
    assert [row.label for row in rows_in(tmp_path)[0]] == ["slow", "fast"]
    make(tmp_path / "c" / "seed_1", init_lr=0.3, prefix="fast")
    assert [row.label for row in rows_in(tmp_path)[0]] == ["init_lr=0.1", "init_lr=0.2", "init_lr=0.3"]


def test_a_sweeps_folder_stands_for_its_cells_with_their_names(tmp_path):
    for name in ("aaa", "bbb", "other"):
        make(tmp_path / name / "seed_1", init_lr=ord(name[0]) / 100)
    sweep = tmp_path / "sweep_123"
    (sweep / "cells" / "1").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"sweep_123 is a sweep without its table.*; give .* instead"):
        runs.find([sweep])
    (sweep / "table.csv").write_text('cell,settings,n\n"slow, wide",bbb,1\nfast,aaa,1\n', encoding="utf-8")
    rows, _ = rows_in(sweep)
    assert [(row.label, row.name) for row in rows] == [("slow, wide", "bbb"), ("fast", "aaa")]


def test_links_moved_runs_and_working_folders_are_left_out(tmp_path):
    make(tmp_path / "x" / "a" / "seed_1")
    make(tmp_path / "x" / "a" / "seed_1.old_1", init_lr=3)
    make(tmp_path / "x" / "a" / "seed_1" / "export" / "inner", init_lr=4)
    (tmp_path / "latest").symlink_to(tmp_path / "x" / "a" / "seed_1", target_is_directory=True)
    assert len(runs.find([tmp_path]).runs) == 1
    assert len(runs.find([tmp_path / "latest", tmp_path]).runs) == 1  # a link may be given


# ---------------------------------------------------------------- what hinders a comparison is said


def test_notes(tmp_path):
    make(tmp_path / "a" / "seed_1")
    make(tmp_path / "b" / "seed_2", 2, init_lr=1)
    assert rows_in(tmp_path)[1] == ["no seed in common with the first row, so no paired difference: init_lr=1"]
    make(tmp_path / "c" / "seed_1", dataset="glyphs", tasks=3)
    assert rows_in(tmp_path)[1][:2] == [
        "different data sets (digits, glyphs): their accuracies cannot be set against each other",
        "different tasks (2 tasks of 1+1; 3 tasks of 1+1+1): the curves have other steps",
    ]
    make(tmp_path / "d" / "x" / "seed_1", order=[1, 0])
    make(tmp_path / "d" / "y" / "seed_1", order=[0, 1], init_lr=2)
    assert rows_in(tmp_path / "d")[1] == [
        "equal seeds with different class orders: their difference is no pair on equal tasks"
    ]
    (tmp_path / "e" / "seed_9").mkdir(parents=True)
    (tmp_path / "e" / "seed_9" / "metrics.jsonl").write_text("", encoding="utf-8")
    broken = make(tmp_path / "e" / "seed_8", 8) / "results.json"
    broken.write_text("{", encoding="utf-8")
    notes = runs.find([tmp_path / "a", tmp_path / "e"]).notes()
    assert notes[0] == f"1 run is not finished and left out, the first: {tmp_path / 'e' / 'seed_9'}"
    assert notes[1].startswith(f"1 run is damaged and left out, the first: {broken} is damaged: ")


BAD = {
    "missing": (lambda run: shutil.rmtree(run), "there is no such folder"),
    "unfinished": (lambda run: (run / "results.json").rename(run / "metrics.jsonl"), "is not finished: it has no results.json"),
    "empty": (lambda run: [file.unlink() for file in run.iterdir()], "holds no finished run"),
    "no config": (lambda run: (run / "config.json").unlink(), "config.json is missing"),
    "cut": (lambda run: (run / "results.json").write_text('{"a": 1', encoding="utf-8"), "results.json is damaged"),
    "a list": (lambda run: (run / "results.json").write_text("[]", encoding="utf-8"), "results.json is damaged"),
    "deep": (lambda run: (run / "results.json").write_text("[" * 10**5, encoding="utf-8"), "results.json is damaged"),
    "twice": (lambda run: (run / "results.json").write_text('{"a": 1, "a": 2}', encoding="utf-8"), "the key is there twice"),
    "NaN": (lambda run: change(run, average_accuracy=float("nan")), "average_accuracy: nan is not a finite number"),
    "text": (lambda run: change(run, last_accuracy="90"), "'90' is no number"),
    "short": (lambda run: change(run, seconds=[]), "its lists have different lengths"),
    "matrix": (lambda run: change(run, accuracy_matrix=[["x"]] * 2), "holds no results"),
    "counts": (lambda run: change(run, wrong_task=[["a", "b"], 1]), "holds no results"),
    "seed": (lambda run: change(run, seed="1"), "'1' is no whole number"),
}  # fmt: skip


def change(run, **values):
    path = run / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


@pytest.mark.parametrize("what", BAD)
def test_bad_runs_are_one_clear_error(what, tmp_path, capsys):
    run = make(tmp_path / "seed_1")
    spoil, text = BAD[what]
    spoil(run)
    assert start(run, "--out", tmp_path / "out") == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and text in shown and shown.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_compare_goes_with_no_experiment(tmp_path, capsys):
    run = make(tmp_path / "seed_1")
    for other in (["--config", "x.json"], ["--set", "a=1"], ["--check"]):
        assert start(run, *other) == 2
        error = capsys.readouterr().err
        assert "has no effect with --compare" in error or "are two things" in error


# ---------------------------------------------------------------- the table and the page


@pytest.fixture
def three(tmp_path):
    """A row of two seeds, one of the same seeds with two right answers less, and a third method."""
    for seed in (1, 2):
        make(tmp_path / "r" / "a" / f"seed_{seed}", seed)
        make(tmp_path / "r" / "b" / f"seed_{seed}", seed, right=4 if seed == 1 else 3, init_lr=0.02, commit="def")
    make(tmp_path / "r" / "c" / "seed_1", model_name="n$cm</td>", dataset="digits")
    return tmp_path


def test_table_and_page(three, capsys):
    assert start(three / "r", "--out", three / "out") == 0
    shown = capsys.readouterr()
    assert "2: sema, init_lr=0.02" in shown.out and f"5 runs in 3 rows: {three / 'out' / 'compare.html'}" in shown.out
    line = next(line for line in shown.out.splitlines() if line.startswith("2: sema"))
    # 6 of 8 each, then 4 and 3 of 8: 75 and 50, 37.5; the differences -25 and -37.5
    assert line.split()[3:] == ["43.75", "8.84", "2", "-31.25", "[-110.66,", "+48.16]", "2"]
    html = (three / "out" / "compare.html").read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == [] and len(checker.ids) == len(set(checker.ids)) and set(checker.refs) <= set(checker.ids)
    assert (
        "http:" not in html and "https:" not in html and html.count("<svg") == 3
    )  # forgetting of one task, bias and seconds are constant
    row = html[html.index('<td data-label="row">2: sema, init_lr=0.02</td><td data-label="n">2</td>') :]
    assert row.index('<td data-label="last">43.75 ± 8.84<small>-31.25 [-110.66, +48.16]</small></td>') < 200
    assert '<td data-label="last"><b>75.00 ± 0.00</b></td>' in html and '<td data-label="parameters">1,000</td>' in row
    assert cells("init_lr", 0.01, 0.02, 0.01) in html and "<td>device</td>" in html
    # settings that are equal are folded away
    below = html[html.index("<h2>Settings that differ") :]
    assert below.index("<td>init_lr</td>") < below.index("<details>") < below.index("<td>device</td>")
    assert cells("git.commit", "abc", "def", "abc") in html and "facts that are equal in all" in html
    for text in (
        "git checkout abc",
        "git checkout def",
        "pip install -r requirements.txt",
        "--set seed=2",
        "n$cm</td>",
    ):
        assert text in checker.text, text
    # all of eight are right with the task known; two in eight of the second task are taken for the first: an older one
    assert (
        cells("1: sema, init_lr=0.01", "75.00 ± 0.00", "100.00 ± 0.00", "25.00 ± 0.00", "0.00 ± 0.00", "-100.00 ± 0.00")
        in html
    )
    assert cells("1: sema, init_lr=0.01", "2.0 ± 0.0", "2.0 ± 0.0") in html  # adapters in layer 3, and in all
    assert (
        cells("1: sema, init_lr=0.01", "4.0 ± 0.0", "0.0 ± 0.0", "0.0 ± 0.0", "5 ± 0", "1 ± 0", "10", "1,000") in html
    )


def test_settings_that_only_some_methods_have_are_folded_away(tmp_path):
    make(tmp_path / "a" / "seed_1", router="x", rate=1, limit=None)
    make(tmp_path / "b" / "seed_1", router="x", rate=2, limit=3)
    make(tmp_path / "c" / "seed_1", model_name="ncm", limit=3)
    rows, _ = rows_in(tmp_path)
    html = html_of(page.settings_table(list(enumerate(rows, start=1))))
    shown, lone, equal = html.split("<details>")
    assert cells("model_name", "sema", "sema", "ncm") in shown and cells("rate", 1, 2, "-") in shown
    assert cells("limit", "null", 3, 3) in shown and "router" not in shown
    assert "1 settings that only some of the methods have" in lone and cells("router", "x", "x", "-") in lone
    assert cells("init_lr", 0.01) in equal and "router" not in equal


def test_where_the_page_goes(three, capsys):
    assert start(three / "r", "--out", three / "new" / "mine.html") == 0
    assert (three / "new" / "mine.html").is_file()
    assert compare.place_of(Path("logs")) == Path("logs/compare.html")
    (three / "x.html").mkdir()
    assert compare.place_of(three / "x.html") == three / "x.html" / "compare.html"


def test_of_many_rows_the_best_are_drawn_and_that_is_said(tmp_path, capsys):
    for index in range(30):
        make(tmp_path / "r" / f"{index:02}" / "seed_1", right=index % 7, init_lr=1 + index)
    rows, _ = rows_in(tmp_path / "r")
    # the first, then those with six right answers, and of those with five the earliest
    assert [number for number, _ in page.chosen(rows, 6)] == [1, 6, 7, 14, 21, 28]
    compare.MOST_PRINTED, kept = 10, compare.MOST_PRINTED
    try:
        assert start(tmp_path / "r", "--out", tmp_path) == 0
    finally:
        compare.MOST_PRINTED = kept
    shown = capsys.readouterr().out
    assert "the first 10 of 30 rows; the page has all" in shown and "11: init_lr" not in shown
    html = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "Drawn are 9 of 30 rows: the first and those with the best last accuracy." in html
    assert "Settings, environments and other tables show 24 of 30 rows" in html
    results = html[html.index("<h2>Results") : html.index("<h2>Accuracy")]
    assert results.count("<tr>") == 31


def test_old_results_and_a_missing_environment_compare_too(tmp_path):
    run = make(tmp_path / "a" / "seed_1")
    path = run / "results.json"
    kept = json.loads(path.read_text(encoding="utf-8"))
    for key in ("task_oracle_curve", "task_confusion", "wrong_task", "peak_memory_by_task"):
        del kept[key]
    path.write_text(json.dumps(kept), encoding="utf-8")
    (run / "environment.json").write_text("]", encoding="utf-8")
    assert start(run, "--out", tmp_path) == 0
    html = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "# not recorded" in html and cells("1: sema", "75.00", "100.00", "25.00", "0.00", "-") in html


def test_a_run_without_tasks_or_numbers(tmp_path):
    folder = make(tmp_path / "a" / "seed_1", tasks=1)
    change(folder, top1_curve=[None], accuracy_matrix=[[None]], last_accuracy=None, average_accuracy=None,
           task_oracle_accuracy=None, task_oracle_curve=[None])  # fmt: skip
    empty = make(tmp_path / "b" / "seed_1", tasks=0, init_lr=7)
    assert start(folder, empty, "--out", tmp_path) == 0


def test_no_labels_overlap(tmp_path, overlaps):
    from utils.compare import plots

    for index in range(9):
        make(tmp_path / f"{index}" / "seed_1", right=index % 7, tasks=20, init_lr=1 + index, backbone_type="x" * 80)
    rows, _ = rows_in(tmp_path)
    for row in rows:
        row.label = "$" + row.label + "_y" * 40
    figures = plots.draw(list(enumerate(rows, start=1)))
    assert list(figures) == ["accuracy", "forgetting", "errors", "adapters"]
    for name, figure in figures.items():
        assert overlaps(figure) == [], name


def test_it_starts_without_torch(three):
    code = (
        "import sys, main; assert main.main(sys.argv[1:]) == 0; "
        "print(*(m for m in ('torch', 'timm', 'torchvision', 'sklearn') if m in sys.modules))"
    )
    line = [sys.executable, "-c", code, "--compare", str(three / "r"), "--out", str(three)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == ""


def test_the_page_names_the_classes_that_are_the_same_in_all_rows(tmp_path):
    def named(folder, seed, names, **settings):
        results = json.loads((make(folder, seed, **settings) / "results.json").read_text())
        (folder / "results.json").write_text(json.dumps(results | {"class_names": names}))

    named(tmp_path / "a" / "seed_1", 1, ["wren", "great\x1b tit"])
    named(tmp_path / "b" / "seed_1", 1, ["wren", "great\x1b tit"], init_lr=0.5)
    named(tmp_path / "a" / "seed_2", 2, ["wren", "robin"])
    named(tmp_path / "b" / "seed_2", 2, ["wren", "crow"], init_lr=0.5)
    make(tmp_path / "a" / "seed_3", 3)
    rows, _ = rows_in(tmp_path)
    ((folded),) = page.class_table(list(enumerate(rows, start=1)))
    assert folded.blocks[0].head == ["task", "seed 1"]
    assert folded.blocks[0].rows == [[1, "wren"], [2, "great\\x1b tit"]]
    rows, _ = rows_in(tmp_path / "a" / "seed_3")
    assert page.class_table([(1, rows[0])]) == []
