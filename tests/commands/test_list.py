"""--list: everything in short, one kind in full, entries with a word, and the nearest name for an unknown kind."""

import pytest

import main
import models
from backbone import catalogue
from commands import list as listed
from utils.data import DATASETS


@pytest.fixture
def show(capsys):
    """Function: (exit code, lines, errors) of --list with these words."""

    def run(*words):
        code = main.main(["--list", *words])
        shown, errors = capsys.readouterr()
        return code, shown.splitlines(), errors

    return run


def test_without_a_word_all_names_are_there(show):
    code, lines, errors = show()
    assert (code, errors) == (0, "") and len(lines) < 400
    text = "\n".join(lines)
    for name in (*models.available(), *DATASETS, "exps/quickstart.json", "vit_base_patch16_224"):
        assert name in text
    assert "Shows" not in text  # what an experiment shows stands in --list exps


@pytest.mark.parametrize(
    ("kind", "count"),
    [("methods", len(models.available())), ("backbones", len(catalogue.names()))],
)
def test_one_kind(show, kind, count):
    code, lines, _ = show(kind)
    assert code == 0 and lines[0] == f"{kind} ({count})"
    assert len(lines) == count + 1 or kind == "backbones"


def test_a_word_is_looked_for_in_names_and_texts_in_any_case(show):
    _, lines, _ = show("methods", "RIDGE")
    assert lines[0] == f"methods (1 of {len(models.available())} with RIDGE)" and lines[1].split()[0] == "ranpac"
    _, lines, _ = show("exps", "finetune_cifar")
    assert lines[1].startswith("  exps/finetune_cifar.json  Shows the whole ViT fine-tuned")
    _, lines, _ = show("backbones", "augreg2")
    names = " ".join(lines[1:]).replace(",", "").split()
    assert names == [name for name in catalogue.names() if "augreg2" in name] and names


def test_what_is_not_there_names_the_nearest(show):
    code, _, errors = show("metods")
    assert code == 2 and "--list metods: is no kind of list; did you mean 'methods'?" in errors
    code, _, errors = show("methods", "semma")
    assert code == 2 and "--list methods semma: none of" in errors and "did you mean 'sema'?" in errors
    code, _, errors = show("exps", "a", "b")
    assert code == 2 and "one word to look for is expected" in errors


def test_a_file_that_cannot_be_read_is_listed_with_its_fault(tmp_path):
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    text = listed.listing(["exps"], tmp_path, {}, [])
    assert text.splitlines()[0] == "exps (1)" and "is not valid JSON" in text


def test_the_data_sets_with_images_licence_and_download(capsys):
    assert main.main(["--list", "data"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(DATASETS)
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines[1:]}
    assert rows["cifar100"].startswith("100 50,000 10,000 fetch, 170 MB CIFAR-100, https://www.cs.toronto.edu/")
    assert rows["imageneta"].startswith("200 5,981 1,519 your hand ImageNet-A") and rows["imageneta"].endswith(
        "makers'"
    )
    assert rows["digits"].startswith("10 in this program 1,797 handwritten")
    assert main.main(["--list", "data", "Fashion"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["fashion", "fashion_mnist"]
