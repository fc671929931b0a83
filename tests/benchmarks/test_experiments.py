"""The experiment files of published sets are those of the table in benchmarks/experiments.py, and every one resolves."""

import models
from backbone import catalogue
from benchmarks import experiments
from utils import data
from utils.config.resolve import resolve


def test_the_files_are_those_of_the_table():
    for name, values in experiments.experiments().items():
        text = (experiments.EXPS / f"{name}.json").read_text(encoding="utf-8")
        assert text == experiments.text_of(values), "python -m benchmarks.experiments"
    for name in experiments.ELSEWHERE:
        assert (experiments.EXPS / f"{name}.json").is_file() and name not in experiments.experiments()


def test_every_file_of_the_table_resolves():
    known = {"settings_of": models.settings_of, "methods": models.available(), "backbones": catalogue.names}
    hashes = set()
    for name, values in experiments.experiments().items():
        found = resolve(dict(values), source=name, **known)
        assert found.settings.dataset in data.DATASETS and not found.notes, name
        hashes.add(found.hash)
    assert len(hashes) == len(experiments.experiments()) == len(experiments.SETS) * 3 - len(experiments.ELSEWHERE) + 1


def test_tasks_in_words():
    assert experiments.SETS["cars"].tasks(196) == "a first task of 16 classes and 9 tasks of 20"
    assert experiments.SETS["vtab"].tasks(50) == "5 tasks of 10"
