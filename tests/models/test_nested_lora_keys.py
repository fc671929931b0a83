"""Keys of nested_lora: contradictory values are refused, and keys without effect are named."""

import pytest

from tests.helpers.nested import faults_of
from tests.helpers.toy import toy_settings


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"nested_lora_levels": 3, "nested_lora_level_lrs": [0.1, 0.2]}, "nested_lora_level_lrs: 2 values, but"),
        ({"nested_lora_level_lrs": [0.1]}, "nested_lora_levels 2 has 0 levels between slow and fast"),
        ({"nested_lora_levels": 4, "nested_lora_level_intervals": [2]}, "nested_lora_level_intervals: 1 values"),
        ({"nested_lora_levels": 3, "nested_lora_level_intervals": [0]}, "every value must be above 0; got [0]"),
        ({"nested_lora_levels": 3, "nested_lora_level_lrs": [101]}, "every rate must be at most 100; got [101.0]"),
        ({"nested_lora_levels": 1, "nested_lora_lr_fast": 0.1}, "nested_lora_lr_fast: is for fast adapters"),
        ({"nested_lora_consolidation_method": "ties"}, 'adapter only with nested_lora_activation "none"'),
        (
            {"nested_lora_consolidation_method": "ema", "nested_lora_consolidation_alpha": 2.0},
            "nested_lora_consolidation_alpha: ema averages slow and fast, so at most 1 is expected; got 2",
        ),
        ({"min_lr": 0.005, "nested_lora_lr_slow": 0.001}, "min_lr: 0.005 is above nested_lora_lr_slow 0.001"),
        (
            {"min_lr": 0.005, "nested_lora_levels": 3, "nested_lora_level_lrs": [0.001]},
            "min_lr: 0.005 is above nested_lora_level_lrs 0.001",
        ),
        ({"min_lr": 0.005, "init_lr": 0.01}, "min_lr: 0.005 is above 0.001, the slow rate"),
        ({"head_recalibration": True, "head": "ncm"}, "head_recalibration: refits the linear head, but head 'ncm'"),
        ({"head_lr": 0.0}, "head_lr: must be greater than 0"),  # there may be nothing else to train
        ({"router_lr": 0.1}, "router_lr: unknown key of nested_lora, it belongs to dylora_moe, sema"),
        ({"nested_lora_eval": "both"}, "nested_lora_eval: must be 'combined', 'slow' or 'fast'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(values, expected):
    assert [fault for fault in faults_of("nested_lora", **values) if expected in fault], faults_of(
        "nested_lora", **values
    )


@pytest.mark.parametrize(
    ("method", "values", "expected"),
    [
        (
            "slca",
            {"init_lr": 0.01, "min_lr": 0.005},
            "min_lr: 0.005 is above 0.0001, the backbone's rate (bcb_lrscale)",
        ),
        ("sema", {"init_lr": 0.01, "min_lr": 0.005, "router_lr": 0.001}, "min_lr: 0.005 is above router_lr 0.001"),
    ],
)
def test_no_rate_may_start_below_where_its_cosine_ends(method, values, expected):
    assert faults_of(method, **values) == [expected]


def test_keys_of_nested_adapters_are_refused_by_plain_sema_by_name():
    keys = {"nested_lora_rank": 4, "nested_lora_lr_slow": 0.001, "head_recalibration": True}
    faults = faults_of("sema", ffn_adapter_type="adaptmlp", **keys)
    assert sorted(f.partition(":")[0] for f in faults) == sorted(keys)
    assert all('set ffn_adapter_type to "nested_lora" or remove it' in f for f in faults)


def test_what_does_not_act_is_told():
    told = {
        "nested_lora_eval fast": {"nested_lora_eval": "fast"},
        "have no effect with nested_lora_update_interval_slow 1": {"nested_lora_skipped_gradients": "accumulate"},
        "have no effect with nested_lora_levels 1": {"nested_lora_levels": 1, "nested_lora_reset": "zero"},
        "have no effect with nested_lora_levels 1: nested_lora_consolidation_rank": {
            "nested_lora_levels": 1,
            "nested_lora_consolidation_rank": 4,
        },
        "have no effect with nested_lora_use_consolidation false: nested_lora_consolidation_method": {
            "nested_lora_use_consolidation": False,
            "nested_lora_consolidation_method": "svd",
        },
        "nested_lora_consolidation_alpha 1 with ema replaces slow": {"nested_lora_consolidation_method": "ema"},
    }
    for start, keys in told.items():
        (line,) = toy_settings("nested_lora", **keys).remarks()
        assert start in line
    assert not list(toy_settings("nested_lora", nested_lora_eval="slow").remarks())
