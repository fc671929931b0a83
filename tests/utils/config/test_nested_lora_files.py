"""Experiment files of Nested-LoRA load unchanged, with the settings they meant; every change is reported in one line."""

import json
from pathlib import Path

import pytest

from commands import load as commands_load
from commands import options
from utils.config import nested_lora_files
from utils.config.schema import WITHOUT_EFFECT
from utils.config.strict_json import ConfigError

# The 22 files of exps/ in github.com/motsun1/Nested-LoRA, key by key.
FILES = json.loads((Path(__file__).parents[2] / "fixtures" / "nested_lora_files.json").read_text(encoding="utf-8"))
MARKED = {"memory_size": 0, "model_name": "nested_lora", "dataset": "digits", "init_cls": 2, "increment": 2}


def load(values, folder, *overrides):
    path = folder / "old.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    sets = [word for text in overrides for word in ("--set", text)]
    (cell,) = commands_load.load(options.parser("").parse_args(["--config", str(path), *sets])).cells
    return cell.resolved


def translated(values):
    renamed, notes, faults = nested_lora_files.translate(values)
    assert not faults
    return renamed, "\n".join(notes)


# ---------------------------------------------------------------- the files as they are


@pytest.mark.parametrize("name", FILES)
def test_every_file_loads_with_its_values(name, tmp_path):
    settings = load(FILES[name], tmp_path).settings
    renamed = {"nb_tasks", "nested_lora_eval_ablation"}
    changed = {"model_name", "backbone_type", "nested_lora_consolidation_method", "device", "seed"}
    missing = {key for key in FILES[name] if not hasattr(settings, key)}
    assert missing <= WITHOUT_EFFECT | type(settings).ignored | renamed
    for key in FILES[name].keys() - missing - changed:
        value = getattr(settings, key)
        assert (list(value) if isinstance(value, tuple) else value) == FILES[name][key], key
    assert settings.seed == tuple(FILES[name]["seed"]) and settings.device == "cuda:0"
    assert settings.backbone_type == "pretrained_vit_b16_224_adapter"  # the same weights; and no mark of an older file
    assert len(FILES) == 22


def test_chain_keeps_the_meaning_of_its_file(tmp_path):
    resolved = load(FILES["nested_lora_alpha0.1_fast_only"], tmp_path)
    settings = resolved.settings
    assert settings.model_name == "nested_lora" and (settings.epochs, settings.nested_lora_rank) == (20, 8)
    assert (settings.nested_lora_lr_fast, settings.nested_lora_lr_slow, settings.init_lr) == (0.05, 0.005, 0.01)
    assert settings.nested_lora_eval == "fast"
    assert (
        settings.nested_lora_consolidation_method == "task_arithmetic"
        and settings.nested_lora_consolidation_alpha == 0.1
    )
    assert settings.nested_lora_reset == "fresh"  # a fault of the original stays off
    names, filled, faults, ignored, empty = resolved.notes
    assert empty.startswith("nested_lora_eval fast: after a merge the output of fast is 0")
    assert "pretrained_vit_b16_224_nested_lora as" in names
    assert "nested_lora_eval_ablation fast_only as nested_lora_eval fast" in names
    assert filled.endswith('defaults: nested_lora_consolidation_method "task_arithmetic"')
    assert faults.endswith('restore them: nested_lora_reset "zero", decay_other_rows true')
    assert "memory_size" in ignored and "ffn_num" in ignored


def test_competition_becomes_another_method(tmp_path):
    resolved = load(FILES["step2_moe_pam"], tmp_path)
    settings = resolved.settings
    assert (settings.model_name, settings.moe_mode, settings.num_experts) == ("moe_parallel", "parallel", 4)
    assert settings.fast_lr_multipliers == (1.0, 0.5, 0.1, 0.03) and settings.moe_val_ratio == 0.1
    assert settings.nested_lora_consolidation_method == "pam_lite"
    assert (settings.moe_loss, settings.moe_reset, settings.moe_eval) == ("sum", "all", "winner")
    text = "\n".join(resolved.notes)
    assert "our pam is another method" in text and "nb_tasks as num_experts" in text
    assert 'moe_loss "mean", moe_reset "winner", moe_eval "sum"' in text


def test_frozen_slow_without_merging(tmp_path):
    resolved = load(FILES["nested_lora_baseline"], tmp_path)
    assert resolved.settings.nested_lora_lr_slow == 0.0 and resolved.settings.nested_lora_use_consolidation is False
    assert "nested_lora_reset" not in "\n".join(resolved.notes)  # without a merge nothing is reset


def test_nested_inside_sema(tmp_path):
    resolved = load(FILES["exp_alpha0.05_int5"], tmp_path)
    settings = resolved.settings
    assert (settings.model_name, settings.ffn_adapter_type) == ("sema", "nested_lora")
    assert (settings.nested_lora_consolidation_alpha, settings.nested_lora_consolidation_interval) == (0.05, 5)
    assert settings.nested_lora_consolidation_method == "task_arithmetic"
    plain = load(FILES["baseline_sema_cifar"], tmp_path)
    assert len(plain.notes) == 1 and plain.settings.ffn_num == 32  # SEMA's own file: only the keys without effect


def test_the_command_line_takes_our_names(tmp_path):
    assert load(FILES["step2_moe_pam"], tmp_path, "nested_lora_consolidation_method=pam").settings.model_dump()[
        "nested_lora_consolidation_method"
    ] == ("pam")


@pytest.mark.parametrize("name", ["step2_moe_pam", "nested_lora_minimal", "nested_lora_cifar"])
def test_the_resolved_settings_are_no_older_file(name, tmp_path):
    resolved = load(FILES[name], tmp_path, "nested_lora_consolidation_method=pam")
    again = load(resolved.values, tmp_path)
    assert again.notes == tuple(resolved.settings.remarks()) and again.values == resolved.values
    assert again.hash == resolved.hash


# ---------------------------------------------------------------- what the files do not contain


def test_defaults_of_the_chain():
    values, notes = translated(MARKED | {"init_lr": 0.02})
    assert values == MARKED | {
        "init_lr": 0.02,
        "nested_lora_use_consolidation": False,
        "nested_lora_consolidation_method": "task_arithmetic",
        "nested_lora_consolidation_alpha": 0.1,
        "nested_lora_lr_fast": 0.1,  # five times init_lr
        "nested_lora_lr_slow": 0.02,
    }
    assert "Nested-LoRA's defaults: nested_lora_use_consolidation false" in notes
    assert translated(MARKED)[0]["nested_lora_lr_fast"] == pytest.approx(0.05)  # of the default init_lr
    assert "nested_lora_lr_fast" not in translated(MARKED | {"init_lr": "fast"})[0]  # config.resolve says what is wrong


def test_defaults_inside_sema():
    values, _ = translated(MARKED | {"model_name": "sema", "ffn_adapter_type": "nested_lora"})
    assert (values["nested_lora_lr_fast"], values["nested_lora_lr_slow"]) == (0.01, 0.001)


def test_a_file_of_ours_is_left_alone():
    ours = {k: v for k, v in MARKED.items() if k != "memory_size"} | {"nested_lora_consolidation_method": "pam"}
    assert nested_lora_files.translate(ours) == (ours, [], [])
    sema = MARKED | {"model_name": "sema"}
    assert nested_lora_files.translate(sema) == (sema, [], [])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"nb_tasks": 3}, {"model_name": "moe_parallel", "moe_mode": "task", "num_experts": 3}),
        (
            {"nb_tasks": 3, "moe_mode": "standard"},
            {"model_name": "moe_parallel", "moe_mode": "task", "num_experts": 3},
        ),
        (
            {"nb_tasks": 1, "moe_mode": "parallel"},
            {"model_name": "moe_parallel", "moe_mode": "parallel", "num_experts": 1},
        ),
        ({"moe_mode": "parallel"}, {"model_name": "moe_parallel", "moe_mode": "parallel"}),
        ({"nb_tasks": 1, "moe_mode": "standard", "moe_val_ratio": 0.1}, {"model_name": "nested_lora"}),
        ({"nb_tasks": 1}, {"model_name": "nested_lora"}),
        ({"model_name": "sema", "nb_tasks": 4, "moe_mode": "parallel"}, {"model_name": "sema"}),
    ],
    ids=lambda value: str(value),
)
def test_modes_of_the_competition(changes, expected):
    values, notes = translated(MARKED | changes)
    keys = {"model_name", "moe_mode", "num_experts", "nb_tasks", "moe_val_ratio"}
    assert {k: v for k, v in values.items() if k in keys} == expected
    renamed = {"nb_tasks"} if "num_experts" in values else set()
    dropped = changes.keys() - values.keys() - renamed
    assert all(key in notes for key in dropped) and ("never read" in notes) == bool(dropped)


def test_faults_without_effect_are_not_offered():
    _, notes = translated(MARKED | {"nb_tasks": 3, "nested_lora_use_consolidation": True})
    assert 'nested_lora_reset "zero"' in notes and "moe_loss" not in notes and "moe_reset" not in notes
    _, notes = translated(MARKED | {"moe_mode": "parallel"})  # whose default is not to merge
    assert 'moe_loss "mean"' in notes and "lora_reset" not in notes and "moe_reset" not in notes


def test_contradictions_and_misspelt_values_are_faults(tmp_path):
    both = MARKED | {"nb_tasks": 2, "num_experts": 4, "nested_lora_eval_ablation": "slow"}
    with pytest.raises(ConfigError) as caught:
        load(both, tmp_path)
    first, second = caught.value.faults
    assert first == "num_experts: nb_tasks is its older name; keep one of the two"
    assert second.startswith("nested_lora_eval_ablation: none, fast_only or slow_only is expected")
    with pytest.raises(ConfigError, match=r"- nb_tasks \(an older name of num_experts\): a whole number is expected"):
        load(MARKED | {"nb_tasks": "four", "moe_mode": "parallel"}, tmp_path)
    with pytest.raises(ConfigError, match="- num_experts: "):
        load(MARKED | {"nb_tasks": 2, "moe_mode": "parallel"}, tmp_path, "num_experts=0")
    with pytest.raises(ConfigError, match="keep one of the two"):
        load(MARKED | {"nested_lora_eval": "slow", "nested_lora_eval_ablation": "none"}, tmp_path)
