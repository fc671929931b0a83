"""The command line: names of experiment files that would leave --out, and --out beside other commands."""

from pathlib import Path

import pytest

from commands import compare, options


@pytest.mark.parametrize("name", ["...json", "..json", "latest.json", "x/...json"])
def test_a_file_whose_runs_would_lie_elsewhere_is_refused(name):
    for flags in ([], ["--check"]):
        with pytest.raises(ValueError, match="has another meaning; rename the file"):
            options.parse(["--config", name, *flags], "")
    assert options.parse(["--config", ".json"], "").config.stem == ".json"


def test_out_of_an_export_is_its_folder_and_else_where_runs_go():
    assert options.parse(["--export", "run"], "").out is None
    assert options.parse(["--export", "run", "--out", "logs"], "").out == Path("logs")
    assert options.parse(["--config", "x.json"], "").out == Path("logs")
    assert options.parse(["--compare", "run"], "").out == Path("logs")
    with pytest.raises(ValueError, match="--out has no effect with --list"):
        options.parse(["--list", "--out", "logs"], "")


def test_a_comparison_is_written_as_what_its_name_says(tmp_path):
    (tmp_path / "runs.pdf").mkdir()
    for name, place in (
        ("x.html", "x.html"),
        ("x.TEX", "x.TEX"),
        ("x.csv", "x.csv"),
        ("runs", "runs/compare.html"),
        ("v1.2", "v1.2/compare.html"),
        ("runs.pdf", "runs.pdf/compare.html"),
    ):
        assert compare.place_of(tmp_path / name) == tmp_path / place
    with pytest.raises(ValueError, match=r"--compare writes .html, .htm, .txt, .csv, .md, .tex, or compare.html into"):
        compare.place_of(tmp_path / "x.xlsx")


def test_argparse_repeats_nothing_that_acts_on_the_terminal(capsys):
    with pytest.raises(SystemExit):
        options.parse(["--\x1b[31m\u202e"], "")
    assert "\\x1b[31m\\u202e" in capsys.readouterr().err
