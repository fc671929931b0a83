"""A finished run over weights of the hub is compared with their file in the cache, as one over a file of weights is."""

import os

import timm
import torch
from safetensors.torch import save_file

import main
from backbone import hub
from tests.helpers.runs import tiny_experiment
from tests.helpers.vits import SMALL, small

TAG = "vit_small_patch16_dinov3.lvd1689m"


def test_hub_weights_that_changed_under_a_finished_run_are_refused(tmp_path, monkeypatch, capsys):
    file, real = tmp_path / "model.safetensors", timm.create_model
    narrow = {key: SMALL[key] for key in ("embed_dim", "depth", "num_heads")}
    monkeypatch.setattr(timm, "create_model", lambda name, **given: real(name, **{**given, **narrow}))
    monkeypatch.setattr(hub, "cached", lambda pretrained: file if file.is_file() else None)
    state = small(TAG.partition(".")[0]).state_dict()
    save_file(state, file)
    keys = {"backbone_type": TAG, "backbone_weights": "pretrained", "image_size": 32, "backbone_depth": 2}
    run = [*tiny_experiment("simplecil", tmp_path, monkeypatch, **keys), "--out", str(tmp_path / "logs")]
    assert main.main(run) == 0 and main.main(run) == 0
    assert "seed 3 is finished" in capsys.readouterr().out
    os.utime(file, ns=(5, 5))  # another time alone: the hash decides
    assert main.main(run) == 0
    deeper = {**state, "blocks.2.norm1.weight": state["blocks.2.norm1.weight"] + 1}
    save_file(deeper, file)  # a block that the run does not use
    assert main.main(run) == 0
    save_file({**state, "blocks.1.norm1.weight": torch.ones(32)}, file)
    capsys.readouterr()
    assert main.main(run) == 2
    said = capsys.readouterr().err
    assert "seed 3 is finished, but the backbone's weights changed since (" in said and said.count("\n") == 1
    file.unlink()  # what is not here is not compared
    assert main.main(run) == 0
