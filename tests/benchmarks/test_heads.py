"""The study of heads: its numbers are those of runs, a method has the variants of its heads, differences are paired."""

import pytest

import models
from benchmarks import heads
from benchmarks.study import shipped


def test_a_variant_scores_what_the_shipped_experiment_reports():
    values = shipped("simplecil", "digits")
    reported = 98.05  # exps/simplecil_digits.json, seed 1993, after the last task
    measured = heads.measure(values, 1993, only=("ncm", "lda"))
    assert 100 * measured["ncm"] == pytest.approx(reported, abs=0.6) and measured["lda"] > measured["ncm"]


def test_a_method_has_the_variants_of_its_heads():
    nested, simple = (heads.variants_of(m, models.settings_of(m)) for m in ("nested_lora", "simplecil"))
    assert nested == heads.VARIANTS
    assert {keys["head"] for keys in simple.values()} == {"ncm", "ridge", "lda"}
    assert not any("head_drift_repair" in keys for keys in simple.values())  # nothing moves
    for model, variants in (("ranpac", heads.RANPAC), ("nested_lora", heads.VARIANTS)):
        for keys in variants.values():
            values = shipped(model, "icons") | {"seed": 1, "head_drift": False} | keys
            values = {key: value for key, value in values.items() if key != "head_projection_dim" or key in keys}
            assert not list(models.settings_of(model)(**values).cross_checks()), keys


def test_differences_are_paired_by_seed():
    runs = {("a", 1): {"ncm": 0.5}, ("a", 2): {"ncm": 0.7}, ("b", 1): {"ncm": 0.6}, ("b", 2): {"ncm": 0.8}}
    lines = heads.table(runs, ("a", "ncm")).splitlines()
    assert lines[2:] == [
        "| a | ncm | 60.0 ± 14.1 | 2 | +0.0 [+0.0, +0.0] |",
        "| b | ncm | 70.0 ± 14.1 | 2 | +10.0 [+10.0, +10.0] |",
    ]
