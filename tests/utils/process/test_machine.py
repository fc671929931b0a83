"""Seeds, devices and environment facts."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.process import machine, seeds
from utils.process.machine import SetupError

ROOT = Path(__file__).resolve().parents[3]


# ---------------------------------------------------------------- seeds


def test_named_seed_is_fixed_for_all_time():
    # Written down once: a change here would silently change every published run.
    assert seeds.named_seed(1, "train", 0, 3) == 1543297849601607153
    assert seeds.named_seed() == 5460801731388113703


def test_named_seed_depends_on_every_part_and_its_type():
    cases = [(1, 2), (2, 1), (12,), ("1", 2), (1.0, 2), ((1, 2),), (1,), (True, 2), (None, 2), (b"1", 2)]
    assert len({seeds.named_seed(*case) for case in cases}) == len(cases)
    assert all(0 <= seeds.named_seed(i) < 2**63 for i in range(100))


def test_named_seed_takes_numpy_scalars_and_refuses_objects():
    assert seeds.named_seed(np.int64(7), np.str_("a"), torch.tensor(3)) == seeds.named_seed(7, "a", 3)
    with pytest.raises(TypeError, match="not object"):
        seeds.named_seed(object())


def test_generators_and_global_seeds():
    import random

    first, again, other = (torch.rand(3, generator=seeds.named_generator("x", i)) for i in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    seeds.seed_everything(5)
    drawn = random.random(), np.random.rand(), torch.rand(1).item()
    seeds.seed_everything(5)
    assert drawn == (random.random(), np.random.rand(), torch.rand(1).item())
    assert len(set(drawn)) == 3


def test_named_seed_and_runlog_need_no_torch():
    code = "import sys, utils.process.seeds as r; r.named_seed('a'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---------------------------------------------------------------- machine


def test_only_auto_falls_back_to_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.pick_device("auto") == machine.pick_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0", "cuda:1"):
        with pytest.raises(ValueError, match=rf"device '{name}' was asked for, but torch .+; auto takes the CPU"):
            machine.pick_device(name)
        assert machine.missing_device(name)


def test_pick_device_with_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert machine.pick_device("auto") == machine.pick_device("cuda") == torch.device("cuda:0")
    assert machine.pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match=r"'cuda:2' was asked for, but this machine has 2 GPUs: the last is cuda:1"):
        machine.pick_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "", "cuda:0 "])
def test_pick_device_refuses_unknown_names(name):
    with pytest.raises(ValueError, match="auto, cpu, cuda or cuda:N"):
        machine.pick_device(name)


def broken_import(error):
    def load(name):
        assert name == "torchvision"
        raise error

    return load


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("operator torchvision::nms does not exist\nmore"),
        ImportError("libcudart.so.13: cannot open shared object file"),
    ],
)
@pytest.mark.parametrize(("cuda", "build"), [(None, "CPU-only"), ("13.2", "CUDA 13.2")])
def test_torchvision_of_another_build_gives_two_lines(monkeypatch, error, cuda, build):
    monkeypatch.setattr(importlib, "import_module", broken_import(error))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(SetupError) as caught:
        machine.check_torchvision()
    wrong, fix = str(caught.value).split("\n")
    assert "different builds" in wrong and str(error).splitlines()[0] in wrong and build in wrong
    assert fix == "Fix: pip uninstall -y torch torchvision && pip install torch torchvision"
    assert isinstance(caught.value, ValueError)


def test_torchvision_missing(monkeypatch):
    monkeypatch.setattr(importlib, "import_module", broken_import(ModuleNotFoundError("no", name="torchvision")))
    with pytest.raises(SetupError, match=r"torchvision is not installed\.\nFix: pip install -r requirements\.txt"):
        machine.check_torchvision()


def test_torchvision_here_is_fine():
    machine.check_torchvision()


def test_environment_is_strict_json_without_names(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "--set", "about=two words"])
    facts = machine.environment(torch.device("cpu"))
    assert facts["command"] == "python main.py --set 'about=two words'"
    assert facts["versions"]["torch"] == torch.__version__ or facts["versions"]["torch"] in torch.__version__
    text = json.dumps(facts, allow_nan=False)
    assert str(Path.home()) not in text and str(ROOT) not in text
    assert facts["device"] == "cpu" and facts["cpu_count"] >= 1 and facts["threads"] >= 1


def test_git_facts_outside_a_repository(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine._git() is None
    monkeypatch.setattr(machine, "ROOT", ROOT / "utils")  # inside a repository, but not its root: not our commit
    assert machine._git() is None


def test_peak_memory_is_in_bytes():
    assert 50e6 < machine.peak_memory() < 1e12  # an interpreter with torch: more than 50 MB, less than a terabyte
