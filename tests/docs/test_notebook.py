"""docs/tour.ipynb is a notebook without outputs whose cells run in order, beside other modules called utils and models."""

import json
import re
import sys
import types
from pathlib import Path

import cilrun

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "tour.ipynb"


def test_the_notebook_is_valid_and_has_no_outputs():
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert book.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (book["nbformat"], book["nbformat_minor"], book["metadata"]["language_info"]["name"]) == (4, 5, "python")
    ids = [cell["id"] for cell in book["cells"]]
    assert len({*ids}) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", name) for name in ids)
    for cell in book["cells"]:
        assert all(isinstance(line, str) for line in cell["source"]) and cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            assert cell.keys() == {"cell_type", "id", "metadata", "source", "outputs", "execution_count"}
        else:
            assert cell["cell_type"] == "markdown" and cell.keys() == {"cell_type", "id", "metadata", "source"}


def test_its_cells_run_in_order_and_take_no_name_of_another_project(tmp_path, monkeypatch, capsys):
    """Everything is loaded under `cilrun`: the modules called utils and models that are there stay what they are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    strangers = {name: types.ModuleType(name) for name in ("utils", "models", "commands", "backbone", "main")}
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in strangers}
    for name in before:
        monkeypatch.delitem(sys.modules, name)
    for name, module in strangers.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".", str(cilrun.ROOT))])
    names: dict = {"__name__": "notebook"}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name} {cell['id']}", "exec"), names)
    assert {name: sys.modules[name] for name in strangers} == strangers
    assert not [name for name in sys.modules if name.partition(".")[0] in strangers and "." in name]
    assert type(names["run"].learner).__module__ == "cilrun.models.simplecil"
    assert names["results"]["last_accuracy"] > 97 and names["features"].shape == (359, 128)
    assert Path("tour/features.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    truth = re.search(r"it is (\d)\n", printed)
    assert truth and f"best: [('{truth[1]}', " in printed
