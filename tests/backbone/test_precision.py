"""Compiled blocks compute what plain ones do, however slots grow; where nothing can be compiled the plain ones go on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import main
from backbone import precision
from backbone.adapters.adapter import Adapter
from backbone.blocks import HALVES
from tests.helpers.runs import tiny_experiment
from tests.helpers.toy import toy_backbone

ROOT = Path(__file__).resolve().parents[2]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def adapt(backbone, layer):
    torch.manual_seed(layer)
    backbone.fill(layer, Adapter(16, 4))
    for parameter in backbone.slots[str(layer)].parameters():
        nn.init.normal_(parameter, std=0.3)


def counting(calls):
    """A stand-in for torch.compile that counts what is compiled and notes which half ran on which block."""

    def compile_(half, dynamic):
        assert dynamic  # the batch size stays open
        calls.append("compiled")

        def run(block, x, *position):
            calls.append((half, block))
            return half(block, x, *position)

        return run

    return compile_


def test_only_the_frozen_halves_are_compiled_and_growth_compiles_nothing(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", counting(calls))
    plain, backbone = toy_backbone(), toy_backbone()
    precision.prepare(backbone, compiled=True)
    assert calls == ["compiled", "compiled", *((half, backbone.vit.blocks[0]) for half in HALVES)]
    for layer in (None, 1, 2):
        if layer is not None:
            adapt(plain, layer)
            adapt(backbone, layer)
        calls.clear()
        assert torch.equal(backbone(IMAGES), plain(IMAGES))
        whole = backbone.vit.blocks if layer is None else backbone.vit.blocks[:-1]  # the last one for one token alone
        assert calls == [(half, block) for block in whole for half in HALVES]
        stream = backbone.prefix(IMAGES, 1, inside=True)
        assert torch.equal(stream.after, plain.prefix(IMAGES, 1, inside=True).after)
        torch.testing.assert_close(backbone(stream), plain(IMAGES))
    precision.prepare(backbone)
    assert backbone.halves is HALVES


def test_shapes_alone_are_never_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    precision.prepare(toy_backbone().to("meta"), compiled=True)


@pytest.mark.parametrize("error", [RuntimeError("no compiler\nat all"), OSError("g++ is gone"), ImportError("triton")])
def test_without_a_compiler_there_is_one_warning_and_the_plain_path(error, monkeypatch):
    def broken(half, dynamic):
        def run(block, x, *position):
            raise error

        return run

    monkeypatch.setattr(torch, "compile", broken)
    told, backbone = [], toy_backbone()
    precision.prepare(backbone, compiled=True, say=told.append)
    reason = str(error).splitlines()[0]
    assert told == [f"compile: torch.compile does not work on this machine ({reason}): the run goes on uncompiled"]
    assert backbone.halves is HALVES and torch.equal(backbone(IMAGES), toy_backbone()(IMAGES))


ALONE = """
import torch
from tests.helpers.toy import toy_backbone
from backbone import precision as computing
told, backbone, images = [], toy_backbone(), torch.rand(2, 3, 8, 8)
computing.prepare(backbone, compiled=True, say=told.append)
print(len(told), *told)
assert torch.equal(backbone(images), toy_backbone()(images))
"""


@pytest.mark.slow
def test_without_a_real_compiler_too(tmp_path):
    """In a process of its own: torch remembers which compilers work."""
    places = {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    environment = os.environ | places | {"CXX": "no-such-compiler"}
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 compile: torch.compile does not work on this machine (")
    assert done.stdout.count("\n") == 1


@pytest.mark.slow
@needs_compiler
def test_compiled_features_and_gradients_equal_plain_ones_to_rounding():
    torch.compiler.reset()
    plain, backbone, told = toy_backbone(), toy_backbone(), []
    precision.prepare(backbone, compiled=True, say=told.append)
    assert not told
    for layer in (2, 0):  # a slot that comes later, below
        adapt(plain, layer)
        adapt(backbone, layer)
        for count in (6, 3):
            made = []
            for model in (plain, backbone):
                model.zero_grad()
                features = model(IMAGES[:count])
                features.square().sum().backward()
                made.append([features, *(p.grad for p in model.slots.parameters())])
            for ours, theirs in zip(*made, strict=True):
                torch.testing.assert_close(ours, theirs)  # torch's own bounds for float32
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8  # not one for each of the blocks and batches


@pytest.mark.slow
@needs_compiler
def test_a_compiled_run_is_evaluated_as_recorded(tmp_path, monkeypatch, capsys):
    torch.compiler.reset()
    run = tiny_experiment("sema", tmp_path, monkeypatch, compile=True, precision="bf16")
    assert main.main([*run, "--out", str(tmp_path / "logs")]) == 0
    (folder,) = (tmp_path / "logs").glob("*/*/seed_3")
    assert main.main(["--evaluate", str(folder)]) == 0
    told = capsys.readouterr()
    assert "every number is as recorded" in told.out and "uncompiled" not in told.err
