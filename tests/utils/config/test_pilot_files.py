"""Experiment files of LAMDA-PILOT load with the settings they meant, or say in one line what has no counterpart."""

import json
from pathlib import Path

import pytest

from backbone.catalogue import timm_tag
from commands import load as commands_load
from commands import options
from utils.config import pilot_files
from utils.config.schema import WITHOUT_EFFECT
from utils.config.strict_json import ConfigError

# Keys and values of exps/*.json in github.com/sun-hailong/LAMDA-PILOT; "older": as they were until 2023.
FILES = json.loads((Path(__file__).parents[2] / "fixtures" / "pilot_files.json").read_text(encoding="utf-8"))
REFUSED = {
    "aper_finetune": "LAMDA-PILOT's aper_finetune trains the whole ViT in the first task",
    "aper_ssf": "aper_ssf trains scales and shifts (SSF)",
    "aper_vpt_deep": "aper_vpt trains input prompts (VPT)",
    "aper_vpt_shallow": "aper_vpt trains input prompts (VPT)",
    "ranpac_ssf": "ranpac_ssf trains scales and shifts (SSF)",
}
METHODS = {
    "adam_adapter": "aper_adapter",
    "dual_prompt": "dualprompt",
    "ranpac_adapter": "ranpac",
    "ranpac-phase2": "ranpac",
}
AUGREG = "vit_base_patch16_224.augreg_in21k_ft_in1k"  # timm 0.6.12's vit_base_patch16_224
MARKED = {"memory_size": 0, "dataset": "digits", "init_cls": 2, "increment": 2}


def load(values, folder):
    path = folder / "pilot.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    (cell,) = commands_load.load(options.parser("").parse_args(["--config", str(path)])).cells
    return cell.resolved


def faults_of(values, folder):
    with pytest.raises(ConfigError) as caught:
        load(values, folder)
    return caught.value.faults


@pytest.mark.parametrize("name", FILES)
def test_every_file_loads_with_its_values_or_says_what_is_missing(name, tmp_path):
    written = FILES[name]
    if name in REFUSED:
        (fault,) = faults_of(written, tmp_path)
        assert fault.startswith("model_name: ") and REFUSED[name] in fault and "no counterpart" in fault
        return
    settings = load(written, tmp_path).settings
    assert settings.model_name == METHODS.get(written["model_name"], written["model_name"])
    assert timm_tag(settings.backbone_type) == AUGREG and settings.input_normalisation == "auto"
    assert settings.seed == tuple(written["seed"]) and settings.device == "cuda:0"
    accepted = {"convnet_type", "get_original_convnet", *type(settings).only}
    lacking = {key for key in written if not hasattr(settings, key)}
    assert lacking <= WITHOUT_EFFECT | type(settings).ignored | accepted
    for key in written.keys() - lacking - {"model_name", "backbone_type", "device", "seed"}:
        value = getattr(settings, key)
        assert (list(value) if isinstance(value, tuple) else value) == written[key], key


def test_finetune_is_the_whole_vit_with_the_recipe_of_the_file(tmp_path):
    resolved = load(FILES["finetune, older"], tmp_path)
    cfg = resolved.settings
    assert (cfg.trainable, cfg.mask_old_classes, cfg.optimizer) == ("backbone", True, "sgd")
    assert (cfg.passes(0), cfg.rate(0), cfg.steps_of(0), cfg.init_weight_decay) == (
        20,
        0.001,
        ((60, 120, 170), 0.1),
        0.0005,
    )
    assert (cfg.passes(1), cfg.rate(1), cfg.steps_of(1), cfg.weight_decay) == (20, 0.001, ((40, 70), 0.1), 0.0002)
    notes = "\n".join(resolved.notes)
    assert 'trainable "backbone", mask_old_classes true' in notes and "convnet_type as backbone_type" in notes
    assert load(MARKED | {"model_name": "finetune", "trainable": "head"}, tmp_path).settings.trainable == "head"


def test_forms_that_stay_off_are_named(tmp_path):
    notes = "\n".join(load(FILES["dualprompt"], tmp_path).notes)
    assert "these values restore them: scrambled_e_prompt true, decay_other_rows true" in notes
    with_forms = FILES["dualprompt"] | {"scrambled_e_prompt": True, "decay_other_rows": True}
    assert "restore" not in "\n".join(load(with_forms, tmp_path).notes)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"drop": 0.1}, "drop: 0.1 has no counterpart here, only 0.0 has"),
        ({"pretrained": False}, "pretrained: false has no counterpart here, only true has"),
        ({"freeze": ["blocks"]}, 'freeze: ["blocks"] has no counterpart here, only ["blocks", "patch_embed"'),
        ({"backbone_type": "resnet32"}, "backbone_type: resnet32 is a convolutional network"),
        (
            {"backbone_type": "pretrained_vit_b16_224_ssf"},
            "backbone_type: pretrained_vit_b16_224_ssf has scales and shifts",
        ),
        (
            {"convnet_type": "pretrained_vit_b16_224"},
            "backbone_type: convnet_type is its older name; keep one of the two",
        ),
    ],
)
def test_a_value_without_a_counterpart_is_one_line(changes, fault, tmp_path):
    (line,) = faults_of(FILES["l2p"] | changes, tmp_path)
    assert line.startswith(fault)


def test_files_without_a_mark_stay_as_they_are():
    values = {"model_name": "finetune", "backbone_type": "vit_base_patch16_224", "drop": 0.5}
    assert pilot_files.translate(values) == (values, [], [])
