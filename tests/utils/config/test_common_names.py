"""`epochs` and `rank` are read as each method's key before anything is checked or hashed; both at once are refused."""

import argparse
import json

import pytest

import models
from commands import load as commands_load
from utils.config import common_names
from utils.config.strict_json import ConfigError

COMMON = {"dataset": "digits", "init_cls": 2, "increment": 2}
KEYS = {
    "sema": ("func_epoch", "ffn_num"),
    "l2p": ("tuned_epoch", None),
    "ease": ("init_epochs", "ffn_num"),
    "inflora": ("epochs", "rank"),
    "nested_lora": ("epochs", "nested_lora_rank"),
    "slca": ("epochs", None),
    "simplecil": (None, None),
}


@pytest.fixture
def load(tmp_path):
    """Function: the sweep of an experiment file with these values, and of overrides on the command line."""

    def cells(values, *overrides):
        path = tmp_path / "run.json"
        path.write_text(json.dumps(COMMON | values), encoding="utf-8")
        return commands_load.load(argparse.Namespace(config=path, set=overrides, data_root=None, device=None)).cells

    return cells


def faults_of(load, *arguments):
    with pytest.raises(ConfigError) as caught:
        load(*arguments)
    return caught.value.faults


@pytest.mark.parametrize("method", KEYS)
def test_each_method_reads_them_as_its_key_and_hashes_that(load, method):
    for name, key in zip(common_names.NAMES, KEYS[method], strict=True):
        if key is None:
            assert faults_of(load, {"model_name": method, name: 3})[0].startswith(f"{name}: unknown key of {method}")
            continue
        (cell,), (published,) = (load({"model_name": method, written: 3}) for written in (name, key))
        assert getattr(cell.resolved.settings, key) == 3
        assert cell.resolved.hash == published.resolved.hash
        assert cell.values == published.values and cell.resolved.given == published.resolved.given


def test_every_method_that_trains_has_epochs():
    for method in models.available():
        fields = models.settings_of(method).model_fields
        assert ("epochs" in {*fields, *common_names.of(fields)}) == (method != "simplecil"), method


def test_both_in_one_file_are_refused_with_both_names(load):
    assert faults_of(load, {"model_name": "l2p", "epochs": 3, "tuned_epoch": 3}) == [
        "epochs: is tuned_epoch in l2p, and both are set; keep one of the two"
    ]
    (fault,) = faults_of(load, {"model_name": "l2p"}, "epochs=3", "tuned_epoch=3")
    assert fault.startswith("epochs: is tuned_epoch in l2p, and both are set")


def test_a_fault_has_the_name_that_was_written(load):
    (fault,) = faults_of(load, {"model_name": "sema", "rank": 0})
    assert fault.startswith("rank (ffn_num in sema): must be greater than or equal to 1; got 0")


def test_the_command_line_replaces_the_key_by_either_name(load):
    for written, override in (("tuned_epoch", "epochs"), ("epochs", "tuned_epoch")):
        (cell,) = load({"model_name": "l2p", written: 7}, f"{override}=3")
        assert cell.resolved.settings.tuned_epoch == 3


def test_a_sweep_over_methods_has_one_name_for_all(load):
    arms = [{"model_name": method, "epochs": 2} for method in ("l2p", "sema", "finetune")] + [{"epochs": None}]
    l2p, sema, finetune, default = (
        cell.resolved.settings for cell in load({"model_name": "l2p", "tuned_epoch": 9, "sweep": arms})
    )
    assert (l2p.tuned_epoch, sema.func_epoch, finetune.epochs, default.tuned_epoch) == (2, 2, 2, 5)
    grid = load({"model_name": "l2p", "epochs": 4, "sweep": {"model_name": ["l2p", "sema"]}})
    assert (grid[0].resolved.settings.tuned_epoch, grid[1].resolved.settings.func_epoch) == (4, 4)
