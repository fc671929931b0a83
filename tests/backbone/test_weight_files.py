"""Weight files in the wrappings people have: taken off with a line, or refused in a few lines that say what to do."""

import argparse
import re
import shlex
import shutil
import subprocess

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from backbone import catalogue, weight_files, weight_fit, weights
from utils.config.schema import Experiment

NAME = "test_vit"  # timm's smallest: 6 blocks of width 64, patches of 16 px


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return timm.create_model(NAME, img_size=32, num_classes=0)


@pytest.fixture(scope="module")
def state(vit):
    return vit.state_dict()


def settings(path, name=NAME) -> Experiment:
    values = {"model_name": "sema", "dataset": "digits", "init_cls": 2, "increment": 2, "image_size": 32}
    return Experiment(**values, backbone_type=name, backbone_weights=str(path))


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def doubled(state):
    return {name: 2 * tensor for name, tensor in state.items()}


def refusal(content, path, name=NAME) -> str:
    torch.save(content, path)
    with pytest.raises(ValueError) as error:
        weights.build(settings(path, name))
    with pytest.raises(ValueError, match=re.escape(str(error.value))):
        weights.fit(settings(path, name))
    return str(error.value)


@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (lambda s: s, None),
        (lambda s: s | {"head.weight": torch.zeros(3, 64), "head.bias": torch.zeros(3)}, None),
        (lambda s: s | {"epoch": 3}, None),
        (lambda s: {"model": s, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, "'model' are taken"),
        (lambda s: {"state_dict": s}, "'state_dict' are taken"),
        (lambda s: {"model_ema": s}, "'model_ema' are taken"),
        (lambda s: {"checkpoint": {"model": {"weights": s}}}, "'checkpoint.model.weights' are taken"),
        *[
            (lambda s, p=p: prefixed(p, s), f"the file under the prefix {p!r} are taken")
            for p in ("module.", "model.", "backbone.", "encoder.", "_orig_mod.", "module._orig_mod.", "net.0.")
        ],
        (lambda s: {"state_dict": prefixed("model.", s)}, "'state_dict' under the prefix 'model.' are taken"),
        (
            lambda s: {"teacher": prefixed("backbone.", s) | {"head.mlp.weight": torch.zeros(2)}},
            "'teacher' under the prefix 'backbone.' are taken; 1 other tensors there are left out",
        ),
        (lambda s: {"model": s, "model_ema": dict(s)}, "'model' are taken"),  # the same weights twice
        (
            lambda s: s | {"mask_token": torch.zeros(1), "decoder_pred.bias": torch.zeros(2)},
            "2 tensors of pre-training",
        ),
        (lambda s: {name: tensor.bfloat16().double() for name, tensor in s.items()}, None),
    ],
)
def test_wrappings_are_taken_off_with_a_line(wrap, note, state, tmp_path):
    path = tmp_path / "w.pth"
    torch.save(wrap(state), path)
    backbone, facts = weights.build(settings(path))
    assert weights.fit(settings(path)) == list(facts.notes)
    assert len(facts.notes) == (note is not None) and (note or "") in "".join(facts.notes)
    loaded = backbone.vit.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.allclose(loaded[name], state[name], atol=1e-2) for name in state)


def test_of_two_sets_of_weights_the_choice_is_named_and_its_command_works(state, tmp_path):
    path = tmp_path / "it's.pth"
    line = refusal({"teacher": prefixed("backbone.", state), "student": doubled(state)}, path)
    assert "2 sets of weights that fit, 'teacher' under the prefix 'backbone.', 'student': choose one" in line
    (code,) = shlex.split(line.partition("python -c ")[2])
    exec(compile(code, "line", "exec"), {})
    loaded = weights.build(settings(tmp_path / "it's_teacher_backbone.pth"))[0].vit.state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_of_two_sets_the_one_that_fits_is_taken(state, tmp_path):
    other = timm.create_model("test_vit2", img_size=32, num_classes=0).state_dict()
    torch.save({"teacher": other, "student": state}, tmp_path / "w.pth")
    assert "'student'" in weights.build(settings(tmp_path / "w.pth"))[1].notes[0]


def test_files_are_read_by_their_content(state, tmp_path):
    torch.save(state, tmp_path / "torch.safetensors")
    save_file(state, tmp_path / "safetensors.pth")
    shutil.copy(tmp_path / "torch.safetensors", tmp_path / "noending")
    for name, note in (("torch.safetensors", "torch.save"), ("safetensors.pth", "holds safetensors"), ("noending", "")):
        backbone, facts = weights.build(settings(tmp_path / name))
        assert torch.equal(backbone.vit.state_dict()["norm.weight"], state["norm.weight"])
        assert note in "".join(facts.notes) and len(facts.notes) == bool(note)


@pytest.mark.parametrize("old_format", [False, True])
def test_a_namespace_or_a_whole_model_is_named_with_the_line_that_converts_it(old_format, vit, state, tmp_path):
    for content, cause in (
        ({"model": state, "args": argparse.Namespace(lr=1), "epoch": 1}, "argparse.Namespace"),
        (vit, "timm."),
    ):
        path = tmp_path / "w.pth"
        torch.save(content, path, _use_new_zipfile_serialization=not old_format)
        with pytest.raises(ValueError) as error:
            weights.build(settings(path))
        line = str(error.value)
        assert cause in line and "pickled code is never run. If you trust its source" in line and "\n" not in line
        (code,) = shlex.split(line.partition("python -c ")[2])
        exec(compile(code, "line", "exec"), {})
        loaded = weights.build(settings(tmp_path / "w_tensors.pth"))[0].vit.state_dict()
        assert all(torch.equal(loaded[name], state[name]) for name in state)


class Attack:
    def __reduce__(self):
        return subprocess.call, (["touch", "never"],)


def test_what_is_no_checkpoint_gets_its_reason_and_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refusal({"model": Attack()}, tmp_path / "attack.pth")
    assert "calls for commands.call, which no weights need" in line and "python -c" not in line
    assert not (tmp_path / "never").exists()
    np.savez(tmp_path / "google.npz", kernel=np.zeros(3))
    for name, content, cause in (
        ("google.npz", None, "an archive of numpy, as Google's ViTs are. timm converts it"),
        ("lfs.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("page.pth", b"<!DOCTYPE html><html>", "web page"),
        ("index.pth", b'{"weight_map": {}}', "JSON"),
        ("old.ckpt", b"\x1f\x8b\x08", "unpack it first"),
        ("keras.h5", b"\x89HDF\r\n", "HDF5"),
        ("empty.pth", b"", "damaged or foreign"),
        ("deep.safetensors", (5000).to_bytes(8, "little") + b"[" * 5000, "damaged"),
        ("large.safetensors", (2**62).to_bytes(8, "little") + b"{}", "damaged"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=cause) as error:
            weights.build(settings(tmp_path / name))
        assert len(str(error.value)) < 700 + len(str(tmp_path)) * 4


def test_another_architecture_takes_two_lines(state, tmp_path):
    sizes = {"img_size": 32, "num_classes": 0, "weight_init": "skip"}
    small = timm.create_model("vit_small_patch16_224", **sizes).state_dict()
    line = refusal(small, tmp_path / "w.pth", "vit_tiny_patch16_224")
    assert line == (
        f"weights from {tmp_path / 'w.pth'} do not fit vit_tiny_patch16_224:\n"
        "  width 384 in the file, 192 in vit_tiny_patch16_224; vit_small_patch16_224 has 384"
    )
    line = refusal(timm.create_model("test_vit2", img_size=32, num_classes=0).state_dict(), tmp_path / "w.pth")
    assert line.endswith("depth 8 in the file, 6 in test_vit; test_vit2 has 8")
    line = refusal(timm.create_model(NAME, img_size=32, num_classes=0, patch_size=8).state_dict(), tmp_path / "w.pth")
    assert line.endswith(":\n  patch 8x8 px in the file, 16x16 px in test_vit")
    line = refusal(state | {"patch_embed.proj.weight": torch.zeros(64, 1, 16, 16)}, tmp_path / "w.pth")
    assert line.endswith(":\n  channels 1 in the file, 3 in test_vit")
    with_token = timm.create_model("deit_tiny_distilled_patch16_224", **sizes).state_dict()
    line = refusal(with_token, tmp_path / "w.pth", "vit_tiny_patch16_224")
    assert line.endswith("they fit deit_tiny_distilled_patch16_224") and line.count("\n") == 3


def test_position_embeddings_of_another_grid_are_resampled_and_of_none_refused(state, tmp_path):
    wider = timm.create_model(NAME, img_size=64, num_classes=0).state_dict()
    torch.save(wider, tmp_path / "w.pth")
    expected = timm.create_model(NAME, img_size=32, num_classes=0)
    expected.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(dict(wider), expected))
    loaded = weights.build(settings(tmp_path / "w.pth"))[0].vit.state_dict()
    assert torch.equal(loaded["pos_embed"], expected.state_dict()["pos_embed"])
    line = refusal(state | {"pos_embed": state["pos_embed"][:, :-1]}, tmp_path / "w.pth")
    assert "shape of pos_embed: file (1, 4, 64), model (1, 5, 64)" in line


def test_dinov2s_registers_are_timms(tmp_path):
    sizes = {"img_size": 28, "num_classes": 0, "weight_init": "skip"}
    vit = timm.create_model("vit_small_patch14_reg4_dinov2", **sizes)
    expected = {name: torch.randn(tensor.shape) for name, tensor in vit.state_dict().items() if "blocks" not in name}
    official = dict(expected) | {"mask_token": torch.zeros(1, 384), "register_tokens": expected["reg_token"]}
    del official["reg_token"]
    official["pos_embed"] = torch.cat([torch.ones(1, 1, 384), expected["pos_embed"]], 1)
    official["cls_token"] = expected["cls_token"] - 1
    converted, notes = weight_fit.converted(official)
    assert converted.keys() == expected.keys() and len(notes) == 2
    assert all(torch.allclose(converted[key], expected[key], atol=1e-6) for key in expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("odd", "what"),
    [
        (lambda t: t.to_sparse(), "sparse"),
        (lambda t: torch.empty(64, device="meta"), "without values"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "quantised"),
        (lambda t: torch.nested.nested_tensor([torch.zeros(3), torch.zeros(4)]), "nested"),
        (lambda t: t.to(torch.complex64), "complex64"),
        (lambda t: t.to(torch.int8), "int8"),
        (lambda t: torch.zeros(1).as_strided((10**6, 10**5), (0, 0)), "100,000,000,000 numbers in 4 bytes"),
    ],
)
def test_tensors_that_are_no_plain_arrays_are_named_in_a_line(odd, what, state, tmp_path):
    line = refusal(state | {"norm.weight": odd(state["norm.weight"])}, tmp_path / "w.pth")
    assert line.endswith(f":\n  plain tensors of real numbers are expected, but not so: norm.weight ({what})")


def test_absurd_values_and_names_are_bounded(state, tmp_path):
    assert refusal(state | {"norm.weight": torch.full((64,), 1e38)}, tmp_path / "w.pth").endswith(
        "larger than 1e+18, so damaged: norm.weight"
    )
    assert "every number is 0" in refusal({k: 0 * v for k, v in state.items()}, tmp_path / "w.pth")
    line = refusal(state | {"\x1b[31m<b>\n\u202e" + "x" * 5000: torch.zeros(1)}, tmp_path / "w.pth")
    assert "\\x1b[31m<b>\\n\\u202e" in line and len(line) < 400
    foreign = refusal({f"t{i}": torch.zeros(0) for i in range(2000)}, tmp_path / "w.pth")
    assert len(foreign) < 700 and "and 1,992 more" in foreign
    assert "torchvision" in refusal({"encoder.layers.encoder_layer_0.ln_1.bias": torch.zeros(2)}, tmp_path / "w.pth")


def test_architectures_read_from_source_are_those_of_the_models():
    sizes = catalogue.architectures()
    assert sizes["vit_small_patch16_224"] == (16, 384, 12) and sizes["deit_tiny_distilled_patch16_224"] == (16, 192, 12)
    for name in ("test_vit", "vit_tiny_patch16_224", "vit_small_patch14_dinov2"):
        with torch.device("meta"):
            parts = weight_fit._parts(timm.create_model(name, weight_init="skip").state_dict())
        assert sizes[name] == (parts["patch"][0], parts["width"], parts["depth"])
    assert len(sizes) > 100 and weight_files.ANCHOR in timm.create_model(NAME).state_dict()
