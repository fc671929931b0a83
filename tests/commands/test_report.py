"""The page of a finished run can be written again, and comes back where somebody deleted it."""

import main
from tests.helpers.runs import tiny_experiment
from utils.report import page as report_page


def test_a_page_comes_back(tmp_path, monkeypatch, capsys):
    write = report_page.write_report
    run = tiny_experiment("simplecil", tmp_path, monkeypatch)
    monkeypatch.setattr(report_page, "write_report", write)  # which tiny runs leave out
    out = ["--out", str(tmp_path / "out")]
    assert main.main([*run, *out]) == 0
    (folder,) = (tmp_path / "out").glob("*/*/seed_3")
    page, plots = folder / "report.html", sorted(path.name for path in (folder / "plots").iterdir())
    written = page.read_text(encoding="utf-8")
    shown = capsys.readouterr().out.splitlines()
    assert shown[-2:] == [f"report: {page}", f"run folder: {folder.parent}"]
    page.unlink()
    for plot in (folder / "plots").iterdir():
        plot.unlink()
    assert main.main(["--report", str(folder), "--figures"]) == 0
    assert capsys.readouterr().out == f"report: {page}\nfigures (svg, pdf): {folder / 'figures'}\n"
    files = {path.name for path in (folder / "figures").iterdir()}
    assert files == {name.replace("png", ending) for name in plots for ending in ("svg", "pdf")} != set()
    assert page.read_text(encoding="utf-8") == written
    assert sorted(path.name for path in (folder / "plots").iterdir()) == plots
    assert main.main([*run, *out]) == 0 and "written again" not in capsys.readouterr().out
    page.unlink()
    assert main.main([*run, *out]) == 0
    assert f"a report was missing and is written again: {page}" in capsys.readouterr().out
    assert page.read_text(encoding="utf-8") == written


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert main.main(["--report", str(tmp_path)]) == 2
    assert "results.json is missing" in capsys.readouterr().err
    assert main.main(["--report", str(tmp_path), "--set", "epochs=1"]) == 2
    assert "--report RUN takes the settings of that run" in capsys.readouterr().err
    for flags in (["--config", "exps/quickstart.json"], ["--explain", str(tmp_path)]):
        assert main.main([*flags, "--figures"]) == 2
        shown = capsys.readouterr().err
        assert "--figures has" in shown and shown.count("\n") == 1
