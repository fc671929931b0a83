"""Tables for papers: the columns one can choose, the best in bold, and files that a strict reader takes."""

import csv
import io

import pytest

import main
from commands import compare
from tests.helpers.finished import make
from tests.helpers.latex import rows_of
from utils.compare import columns, table


def numbers(last, forgetting=1.0, parameters=1_234_567, **others):
    values = {"last_accuracy": last, "average_accuracy": last, "forgetting": forgetting, "parameters": parameters}
    return values | {"seconds_in_all": 12.34, "adapters_at_end": 3} | others


def rows(*experiments, names="last,forgetting,parameters"):
    return table.compare(
        [(f"{n}: {label}", "0" * 12, runs) for n, (label, runs) in enumerate(experiments, start=1)],
        columns.chosen(names.split(",")),
        [label for label, _ in experiments],
    )


THREE = rows(
    ("a_1 & 50%", {1: numbers(70.0), 2: numbers(72.0)}),
    ("[b] $x$ ~", {1: numbers(71.0, 0.5), 2: numbers(75.0, 0.25, parameters=2_000_000)}),
    ("c\\d{é}", {1: numbers(73.001)}),
)


def test_latex_is_a_whole_table_of_booktabs_with_the_best_in_bold():
    tex = table.as_latex(THREE)
    head, first, second, third = rows_of(tex)
    assert head == ["row", "n", "pairs", "last", "difference", "forgetting", "difference", "parameters"]
    assert first[:4] == [r"a\_1 \& 50\%", "$2$", "-", r"$71.00 \pm 1.41$"]
    assert first[-1] == "$1{,}234{,}567$"  # equal in both seeds
    # differences 1 and 3: mean 2, std sqrt(2), 2 +- t(0.975, 1) = 12.706 times 1
    assert second[3:5] == [r"$\mathbf{73.00} \pm 2.83$", "$+2.00$ $[-10.71, +14.71]$"]
    assert second[5] == r"$\mathbf{0.38} \pm 0.18$"  # the lowest forgetting is the best
    assert second[-1] == r"$1{,}617{,}284 \pm 541{,}243$"  # no best of costs
    assert third[3:5] == [r"$\mathbf{73.00}$", "$+3.00$"]  # equal as printed, so bold too
    assert "XeLaTeX" in tex and "XeLaTeX" not in table.as_latex(THREE[:2])


def test_the_reader_refuses_what_would_not_compile():
    tex = table.as_latex(THREE)
    for old, new in (
        (r"a\_1", "a_1"),
        (r"\& 50", "& 50"),
        (r"50\%", "50%"),
        (r"\mathbf{73.00}", r"\mathbf{73.00"),
        (r"$71.00 \pm", r"71.00 \pm"),
        (r"\toprule", r"\hline"),
        (r"{}[b]", "[b]"),
    ):
        assert old in tex
        with pytest.raises(AssertionError):
            rows_of(tex.replace(old, new, 1))


def test_markdown_and_text_have_the_chosen_columns():
    lines = table.as_markdown(THREE).splitlines()
    assert lines[0] == "| row | n | pairs | last | difference | forgetting | difference | parameters |"
    assert lines[3].startswith(
        r"| \[b\] \$x\$ \~ | 2 | 2 | **73.00** ± 2.83 | +2.00 [-10.71, +14.71] | **0.38** ± 0.18"
    )
    text = table.as_text(THREE).splitlines()
    assert text[10].split() == ["parameters", "mean", "std", "n"]
    assert text[11].split()[-3:] == ["1,234,567", "0", "2"]


def test_csv_has_costs_without_differences():
    (first, *_) = csv.DictReader(io.StringIO(table.as_csv(THREE)))
    assert first["parameters_mean"] == "1234567.0" and "parameters_low" not in first and "last_accuracy_low" in first


def test_what_was_selected_on_test_data_is_never_the_best():
    peeked = {1: numbers(99.0, selection_history=[{"split": "test"}])}
    found = rows(("a", {1: numbers(70.0)}), ("b", peeked), ("c", {1: numbers(60.0)}))
    assert table.best(found, columns.COLUMNS["last"]) == {0}
    assert table.best(found[:2], columns.COLUMNS["last"]) == set()  # one alone is no best
    assert table.best(found, columns.COLUMNS["parameters"]) == set()


def test_figures_are_those_at_the_end():
    results = {
        "trainable_parameters": [5, 7],
        "total_parameters": [50, 70],
        "adapters_per_layer": [{"0": 1}, {"0": 2, "3": 1}],
        "seconds": [{"train": 1.5, "evaluate": 0.25}, {"train": None}],
        "peak_memory_bytes": 3 * 2**20,
    }
    assert columns.figures(results) == {
        "parameters": 70, "trained_in_last_task": 7, "adapters_at_end": 3, "seconds_in_all": 1.75, "peak_mib": 3.0,
        "learning_accuracy": None, "ece": None, "gigaflop": None, "cpu_hours": None, "gpu_hours": None,
    }  # fmt: skip
    results |= {"learning_accuracy": 80.0, "calibration": {"ece": 4.5}, "operations": [1, 2_500_000_000]}
    results |= {"cpu_hours": 0.5, "gpu_hours": 0.0}
    later = columns.figures(results)
    assert (later["learning_accuracy"], later["ece"], later["gigaflop"]) == (80.0, 4.5, 2.5)
    assert (later["cpu_hours"], later["gpu_hours"]) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("last,forgeting", "there is no column 'forgeting'; there are last, average, "),
        ("forgeting", "did you mean 'forgetting'?"),
        ("last,last", "'last' is named twice"),
        ("", "names separated by commas are expected"),
    ],
)
def test_a_wrong_column_is_one_line(given, text, tmp_path, capsys):
    assert main.main(["--compare", str(tmp_path), "--columns", given]) == 2
    shown = capsys.readouterr().err
    assert text in shown and shown.startswith("error: ") and shown.count("\n") == 1


def test_files_by_their_ending(tmp_path, capsys):
    make(tmp_path / "r" / "a" / "seed_1")
    make(tmp_path / "r" / "b" / "seed_1", right=4, init_lr=0.02)
    line = ["--compare", str(tmp_path / "r"), "--columns", "last,time,adapters", "--out"]
    assert main.main([*line, str(tmp_path / "t.tex")]) == 0
    found = rows_of((tmp_path / "t.tex").read_text(encoding="utf-8"))
    assert found[0] == ["row", "n", "pairs", "last", "difference", "time (s)", "adapters"]
    assert found[1] == [r"init\_lr=0.01", "$1$", "-", r"$\mathbf{75.00}$", "-", "$4.0$", "$2.0$"]
    assert main.main([*line, str(tmp_path / "t.html")]) == 0
    assert '<td data-label="time (s)">4.0</td>' in (tmp_path / "t.html").read_text(encoding="utf-8")
    for name in ("t.latex", "t.pdf", "t.xlsx"):
        capsys.readouterr()
        assert main.main([*line, str(tmp_path / name)]) == 2
        shown = capsys.readouterr().err
        assert f"no table is written as {name[1:]}; --compare writes .html, .htm, .txt, .csv, .md, .tex" in shown
        assert shown.count("\n") == 1 and not (tmp_path / name).exists()
    (tmp_path / "d.latex").mkdir()
    assert compare.place_of(tmp_path / "d.latex") == tmp_path / "d.latex" / "compare.html"
    assert compare.place_of(tmp_path / "v1.2") == tmp_path / "v1.2" / "compare.html"
