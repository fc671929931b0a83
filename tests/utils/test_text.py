"""Texts from files and folders where they are shown: nothing in them acts on a terminal, a page, a table or a shell."""

import csv
import io
import re
import subprocess

import pytest

from utils import text
from utils.compare import table
from utils.config import sweep
from utils.engines import jobs
from utils.report import html
from utils.run import progress

NASTY = [
    "=cmd|' /C calc'!A0",
    "<script>alert(3)</script>|\\ | x",
    "line1\nline2 \\\\ \\hline & $x$ _ # \n\n",
    "\x1b[31mred\x9b31m \u202egnp",
    "+SUM(A1:A9)",
    "[click](javascript:alert(1)) `code` ![i](http://127.0.0.1/x.png) www.example.org",
    "@x\t-2+3",
    "_hidden $\\frac{1}{$",
    "'quoted",
    "caf\udce9",
    "[3pt] *",
    "a; rm -rf b $(c) `d` 'e' \"f\"\r",
]
ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.mark.parametrize("nasty", NASTY)
def test_a_text_does_not_act_on_a_terminal(nasty):
    assert not ACTS.search(text.printable(nasty)) and text.printable(nasty).count("\n") == nasty.count("\n")
    line = text.one_line(nasty)
    assert not ACTS.search(line) and "\n" not in line and "\t" not in line
    assert text.printable("plain text, 猫 ü\n\tnext") == "plain text, 猫 ü\n\tnext"


@pytest.mark.parametrize("nasty", NASTY)
def test_a_text_is_no_formula_in_csv(nasty):
    cell = text.csv_cell(text.one_line(nasty))
    assert cell.lstrip()[:1] not in tuple("=+-@") and text.csv_text(cell) == text.one_line(nasty)
    assert text.csv_cell("sema, lr=0.1") == "sema, lr=0.1" and text.csv_cell("") == text.csv_text("") == ""


@pytest.mark.parametrize("nasty", NASTY)
def test_a_text_is_one_cell_without_links_in_markdown(nasty):
    cell = text.markdown(nasty)
    assert "\n" not in cell and not ACTS.search(cell)
    bare = re.sub(r"\\.", "", cell)  # what is left without escaped characters
    assert not re.search(r"[`*\[\]<>|~!$]|&[#\w]|://|www\.|(?<!\w)_", bare.replace("&#46;", ""))
    assert text.markdown("sema, exp_threshold=1") == "sema, exp_threshold=1"


@pytest.mark.parametrize("nasty", NASTY)
def test_a_text_is_printed_as_it_is_by_latex(nasty):
    cell = text.latex(nasty)
    assert "\n" not in cell and not cell.startswith(("[", "*"))
    bare = re.sub(r"\\(textbackslash|text\w+)\{\}|\\[&%$#_{}]", "", cell)
    assert not re.search(r"[&%$#_\\~^<>|`]", bare)


@pytest.mark.parametrize("nasty", NASTY)
def test_a_text_is_text_in_a_page(nasty):
    page = html.render(
        "compare.html",
        title=nasty,
        short_title=nasty,
        notes=[html.Note(nasty)],
        sections=[
            html.Section(nasty, [html.Table([nasty], [[nasty, html.Bold(nasty)]]), html.Lines([nasty])]),
            html.Section("x", html.folded(nasty, html.facts({nasty: nasty}))),
        ],
    )
    assert not ACTS.search(page)
    assert "<script" not in page and page.count("<h2>") == 2


@pytest.mark.parametrize("nasty", NASTY)
def test_a_text_is_one_word_for_a_shell(nasty):
    line = text.shell(["printf", "%s", nasty])
    assert line.isprintable()
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    assert done.stdout == nasty.encode("utf-8", "surrogateescape")
    assert text.shell(["python", "main.py", "--set", "seed=[1, 2]"]) == "python main.py --set 'seed=[1, 2]'"


def test_tables_and_progress_lines_of_a_sweep_stay_whole(tmp_path, capsys):
    labels = [sweep.label_of({"prefix": nasty}, [{}]) for nasty in NASTY]
    runs = {1: dict.fromkeys(table.COLUMNS, 50.0), 2: dict.fromkeys(table.COLUMNS, 60.0)}
    rows = table.compare([(label, f"{n:012d}", runs) for n, label in enumerate(labels)])
    tables = table.tables(rows)
    assert all(not ACTS.search(content) for content in tables.values())
    lines = list(csv.DictReader(io.StringIO(tables["csv"])))
    assert [text.csv_text(line["cell"]) for line in lines] == labels
    assert len(tables["tex"].splitlines()) == 8 + len(rows)
    assert len(tables["md"].splitlines()) == 4 + len(rows)
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 10 for line in tables["md"].splitlines()[: 2 + len(rows)])
    job = jobs.Job(NASTY[3], 1, [], tmp_path, tmp_path / "console.txt")
    job.console.write_text("error: \x9b31m\u202egnp\n", encoding="utf-8")
    jobs.end(job, 1, lambda folder: None)
    board = jobs.Board(open(tmp_path / "board.txt", "w+", encoding="utf-8"))  # noqa: SIM115
    board.line(jobs.sentence(job, [job]))
    progress.write_line(f"method  {NASTY[3]}", board.stream)
    board.stream.seek(0)
    printed = board.stream.read()
    assert not ACTS.search(printed) and printed.count("\n") == 2
    board.stream.close()


def test_counts_and_first_lines():
    assert text.counted(1, "class", "classes") == "1 class" and text.counted(0, "task") == "0 tasks"
    assert text.counted(12345, "class", "classes") == "12,345 classes"
    assert text.first_line("\n one two \nthree") == "one two" and text.first_line("") == "no reason given"
    assert text.first_line("word " * 100, 20) == "word word word ..."
