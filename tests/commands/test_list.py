"""`--list` and its sections."""

import pytest

import main
from utils import data


def test_the_data_sets_with_images_licence_and_download(capsys):
    assert main.main(["--list", "data"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(data.DATASETS)
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines[1:]}
    assert rows["cifar100"].startswith("100 50,000 10,000 fetch, 170 MB CIFAR-100, https://www.cs.toronto.edu/")
    assert rows["imageneta"].startswith("200 5,981 1,519 your hand ImageNet-A") and rows["imageneta"].endswith(
        "makers'"
    )
    assert rows["digits"].startswith("10 in this program 1,797 handwritten")


@pytest.mark.parametrize(
    ("words", "has", "lacks"),
    [
        ([], ("methods", "data sets", "backbones", "experiments"), ()),
        (["methods"], ("  sema ",), ("data sets", "exps/")),
    ],
)
def test_a_section_alone(words, has, lacks, capsys):
    assert main.main(["--list", *words]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in has) and not any(word in shown for word in lacks)
