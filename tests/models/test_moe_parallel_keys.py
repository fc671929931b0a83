"""Keys of moe_parallel: contradictory values are refused, and keys without effect are named."""

import pytest

import models
from tests.helpers.nested import faults_of
from tests.helpers.toy import toy_settings


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"num_experts": 0}, "num_experts: "),
        ({"num_experts": 3, "fast_lr_multipliers": [1.0, 0.5]}, "fast_lr_multipliers: 2 values for num_experts 3"),
        ({"fast_lr_multipliers": []}, "fast_lr_multipliers: 0 values for num_experts 4"),
        ({"num_experts": 2, "fast_lr_multipliers": [1.0, 0.0]}, "every value must be above 0; got [1.0, 0.0]"),
        ({"num_experts": 2, "fast_lr_multipliers": [1.0, 1e308]}, "1e+308 times the fast rate 0.01 is above 100"),
        ({"moe_val_ratio": 0.0}, "moe_val_ratio: 0 leaves no images on which to select among 4 experts"),
        ({"moe_val_ratio": 1.0}, "moe_val_ratio: "),
        ({"moe_mode": "task", "selection_split": "test"}, "selection_split: nothing is selected"),
        ({"moe_mode": "task", "moe_heads": "per_expert"}, "moe_heads: there is one head"),
        ({"nested_lora_levels": 1}, "competition needs fast experts, so at least 2"),
        ({"init_lr": 0.1, "min_lr": 0.05}, "min_lr: 0.05 is above 0.0125, the rate of the slowest expert"),
        ({"router_lr": 0.1}, "router_lr: unknown key of moe_parallel, it belongs to dylora_moe, sema"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(values, expected):
    found = faults_of("moe_parallel", **values)
    assert [fault for fault in found if expected in fault], found


def test_default_multipliers_halve():
    assert models.settings_of("moe_parallel")(
        model_name="moe_parallel", dataset="digits", init_cls=2, increment=2
    ).multipliers() == (1, 0.5, 0.25, 0.125)


def test_keys_that_do_not_act_are_told():
    told = list(
        toy_settings("moe_parallel", moe_mode="task", moe_val_ratio=0.2, fast_lr_multipliers=(1.0, 0.5, 0.2)).remarks()
    )
    assert told == ["these keys have no effect with moe_mode task: moe_val_ratio, fast_lr_multipliers"]
    assert not list(toy_settings("moe_parallel", moe_val_ratio=0.2).remarks())
    (told,) = toy_settings("moe_parallel", moe_mode="task", moe_reset="winner").remarks()
    assert told == "these keys have no effect with moe_mode task: moe_reset"
    (told,) = toy_settings("moe_parallel", nested_lora_use_consolidation=False, moe_reset="winner").remarks()
    assert told == "these keys have no effect with nested_lora_use_consolidation false: moe_reset"
    told = list(toy_settings("moe_parallel", selection_split="test", moe_val_ratio=0.2).remarks())
    assert told == ["these keys have no effect with selection_split test: moe_val_ratio"]
