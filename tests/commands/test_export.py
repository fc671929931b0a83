"""An exported model scores as the run it comes from, bit for bit, without the run's folder, or is refused in a line."""

import json

import pytest
import torch

import main
from commands import export, saved
from tests.helpers.methods import METHODS
from tests.helpers.runs import tiny_experiment


@pytest.mark.parametrize("method", METHODS)
def test_an_exported_model_of_any_method_scores_as_its_run(method, tmp_path, monkeypatch, capsys):
    run = tiny_experiment(method, tmp_path, monkeypatch)
    assert main.main([*run, "--out", str(tmp_path / "logs")]) == 0
    (folder,) = (tmp_path / "logs").glob("*/*/seed_3")
    learner = saved.load(folder).learner
    assert main.main(["--export", str(folder)]) == 0
    assert f"{method} after task 2/2, 10 classes" in capsys.readouterr().out
    (folder / "export").rename(tmp_path / "elsewhere")
    again, classes = export.load(str(tmp_path / "elsewhere"))
    order = json.loads((folder / "results.json").read_text())["class_order"]
    assert classes == [str(c) for c in order]
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(again.logits(images), learner.logits(images))
    assert not again.training and not any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "code"])
def test_damage_is_told(file, damage, tmp_path, monkeypatch):
    run = tiny_experiment("simplecil", tmp_path, monkeypatch)
    assert main.main([*run, "--out", str(tmp_path / "logs")]) == 0
    (folder,) = (tmp_path / "logs").glob("*/*/seed_3")
    export.export(folder, tmp_path / "out")
    path = tmp_path / "out" / file
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        bad = {"cut": content[:-3], "flip": content[:20] + b"\xff" + content[21:], "code": b"\x80\x04c__main__\nrun\n."}
        path.write_bytes(bad[damage])
    with pytest.raises(ValueError, match=r"out is no exported model that can be used: [^\n]+$"):
        export.load(tmp_path / "out")


def test_an_export_never_replaces_files_and_takes_no_settings(tmp_path, capsys):
    (tmp_path / "run" / "export").mkdir(parents=True)
    (tmp_path / "run" / "export" / "mine").touch()
    assert main.main(["--export", str(tmp_path / "run")]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert main.main(["--export", str(tmp_path / "none")]) == 2
    assert "is no run folder" in capsys.readouterr().err
    assert main.main(["--export", str(tmp_path / "run"), "--set", "seed=[1]"]) == 2
