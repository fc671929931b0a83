"""ONNX and TorchScript files score as the model on every test image, or are refused with the reason."""

import importlib.util
import json

import pytest
import torch

from commands import export, export_formats
from tests.helpers.methods import run
from tests.helpers.runs import tiny_run
from tests.helpers.toy import toy_stream

needs_onnx = pytest.mark.skipif(
    export_formats.missing("onnx") is not None, reason="pip install -r requirements-onnx.txt"
)


@pytest.fixture
def learned(toy_learner):
    """A learner of two of three toy tasks, and the stream."""
    return lambda method, **settings: (run(toy_learner(method, **settings), stream := toy_stream(), 2), stream)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("torchscript", "dualprompt"),
        pytest.param("onnx", "simplecil", marks=needs_onnx),
    ],
)
def test_the_file_scores_batches_of_any_size_as_the_model(kind, method, learned, tmp_path):
    learner, stream = learned(method)
    facts = export_formats.write(learner, stream, 1, 8, tmp_path, kind)
    assert facts["file"] == export_formats.FILES[kind] and facts["images"] == facts["same_class"] == 16
    assert facts["difference"] <= 1e-5 * max(1, facts["largest_score"])
    images = torch.rand(5, 3, 8, 8)
    if kind == "torchscript":
        with pytest.warns(FutureWarning, match="deprecated"):
            scores = torch.jit.load(tmp_path / facts["file"])(images)
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(tmp_path / facts["file"])
        scores = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    with torch.inference_mode():
        torch.testing.assert_close(scores, learner.logits(images), rtol=1e-4, atol=1e-5)


def test_a_prediction_that_depends_on_the_numbers_is_refused_with_the_reason(learned, tmp_path, monkeypatch, capfd):
    learner, stream = learned("simplecil")
    plain = learner.logits
    monkeypatch.setattr(learner, "logits", lambda x: plain(x) if x.mean() > 0.5 else -plain(x))
    with pytest.raises(
        ValueError, match=r"simplecil cannot be written as torchscript: \w+: .*(guard|[Dd]ata-dependent)"
    ):
        export_formats.write(learner, stream, 1, 8, tmp_path, "torchscript")
    assert not list(tmp_path.glob("model*")) and capfd.readouterr() == ("", "")


def test_a_file_that_differs_is_refused_and_removed(learned, tmp_path, monkeypatch):
    learner, stream = learned("simplecil")

    def other(module, example, path):
        path.touch()
        return lambda images: module(images) * 1.01

    monkeypatch.setattr(export_formats, "_torchscript", other)
    with pytest.raises(ValueError, match=r"differs from the model by 0.01 on the test images, .* it is not kept"):
        export_formats.write(learner, stream, 1, 8, tmp_path, "torchscript")
    assert not list(tmp_path.glob("model*"))


def test_an_export_says_what_was_compared_and_how_files_become_its_input(tmp_path, monkeypatch):
    folder, _ = tiny_run("simplecil", tmp_path, monkeypatch, precision="bf16")
    text = export.export(folder, tmp_path / "out", kind="torchscript")
    assert "model.torchscript.pt: scores differ by at most 0 " in text and "the same class for 40 of 40 test" in text
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["formats"]["torchscript"]["images"] == 40
    assert config["input"]["size"] == 16 and config["input"]["resize"] == "both"
    assert config["subtracted_in_the_model"]["mean"] == [0.5] * 3
    model = export.load_model(str(tmp_path / "out"))
    assert model.recipe.plain() == config["input"] and model.learner.backbone.precision == "bf16"
    (tmp_path / "out" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "input"}))
    with pytest.raises(ValueError, match="does not say how files become its input: export the run again"):
        export.load_model(tmp_path / "out")


def test_packages_that_are_not_there_are_named_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs onnx, onnxscript, onnxruntime: pip install -r requirements-onnx.txt"):
        export.export(tmp_path / "none", tmp_path / "out", kind="onnx")
