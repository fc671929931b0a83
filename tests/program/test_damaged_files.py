"""Every kind of file the program reads, damaged in every way: one line with the cause, exit code 2, no traceback.

No code in such a file is ever run. Checkpoints are damaged in tests/utils/files/test_storage.py and
tests/utils/run/test_checkpoint.py, exports in tests/commands/test_export.py.
"""

import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save as as_safetensors

import main
import models
from backbone import hub, weights
from backbone.adapters.lora import LoRA
from backbone.adapters.peft_format import CONFIG, WEIGHTS, load_peft, save_peft
from tests.helpers import runs
from tests.helpers.files import (
    write_binary,
    write_python,
)
from tests.helpers.runs import few_digits, tiny_experiment
from utils import data
from utils.config.schema import Experiment
from utils.data.images import decode

MARKER = "code_was_run"


class Runs:
    """Unpickling it makes a file in the working directory."""

    def __reduce__(self):
        return os.mkdir, (MARKER,)


def as_torch(value) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def as_png(size=(16, 16)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 90)).save(file, "PNG")
    return file.getvalue()


def zipped(**members) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/"), content)
    return file.getvalue()


FOREIGN = {
    "text": b"hello, world\n", "html": b"<!DOCTYPE html><html>404</html>", "zeros": bytes(5000), "ones": b"\xff" * 5000,
    "gzip": b"\x1f\x8b\x08" + bytes(50), "zip": zipped(a="b"), "png": as_png()[:60], "utf-16": '{"a": 1}'.encode("utf-16"),
    "list": b"[1, 2]", "lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "pickle that runs code": pickle.dumps(Runs()), "torch file that runs code": as_torch({"a": Runs()}),
    "old torch file that runs code": pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps(Runs(), 2),
    "torch file of the future": zipped(x__data__pkl=pickle.dumps({}), x__version="99"),
    "safetensors of the future": (2**63).to_bytes(8, "little") + b'{"a":1}',
}  # fmt: skip


def cuts(whole: bytes) -> dict[str, bytes]:
    """Nothing, a byte, within the head, at sizes files are written in, half, all but a byte."""
    lengths = sorted(
        {n for n in (0, 1, 7, 8, 9, 40, 512, 4096, len(whole) // 2, len(whole.rstrip()) - 1) if n < len(whole)}
    )
    return {f"cut to {length}": whole[:length] for length in lengths}


def flips(whole: bytes, step: int = 1):
    """The file with one bit turned, at every `step`th byte."""
    for place in range(0, len(whole), step):
        yield place, whole[:place] + bytes([whole[place] ^ 1 << place // step % 8]) + whole[place + 1 :]


def damages(path: Path, skip=()):
    """Damages the file in every way, one after the other, and gives what was done; it is whole again at the end."""
    whole = path.read_bytes()
    for what, content in (cuts(whole) | FOREIGN).items():
        if what not in skip:
            path.write_bytes(content)
            yield what
    path.unlink()
    yield "missing"
    path.mkdir()
    yield "a folder"
    path.rmdir()
    path.write_bytes(whole)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A working directory of its own, in which no code from a file may leave its mark."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not Path(MARKER).exists()


@pytest.fixture
def refused(capsys):
    """Function: the program's answer to bad input, which must be exit code 2 and one line with `named`; faults of a JSON file
    follow it, one a line."""

    def run(arguments, *named, what=""):
        capsys.readouterr()
        code = main.main([str(a) for a in arguments])
        said = capsys.readouterr().err
        message = said[said.index("error: ") :] if "error: " in said else said
        assert code == 2, (what, code, said)
        assert "Traceback" not in said and all(str(name) in message for name in named), (what, said)
        first, *rest = message.splitlines()
        assert len(first) < 1000 and all(line.startswith("  ") for line in rest), (what, said)
        return message

    return run


TINY = {k: v for k, v in runs.TINY.items() if k in models.settings_of("simplecil").model_fields}
TINY["model_name"] = "simplecil"


def experiment(place: Path, name="run.json", **settings) -> Path:
    path = place / name
    path.write_text(json.dumps(TINY | settings), encoding="utf-8")
    return path


# ---------------------------------------------------------------- JSON


def test_a_damaged_experiment_file(place, refused):
    path = experiment(place)
    whole = path.read_bytes()
    for what in damages(path):
        refused(["--config", path, "--check"], path, what=what)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(["--config", path, "--check"], path, "line" if length else "empty", what=length)
    path.write_bytes(whole)
    assert main.main(["--config", str(path), "--check"]) == 0


@pytest.fixture
def finished(place, monkeypatch):
    """A finished tiny run: (its arguments, its folder)."""
    arguments = [*tiny_experiment("simplecil", place, monkeypatch), "--out", str(place / "logs")]
    assert main.main(arguments) == 0
    (folder,) = place.glob("logs/*/*/seed_3")
    return arguments, folder


@pytest.mark.parametrize("option", ["--evaluate", "--export"])
def test_a_saved_run_with_damaged_settings(option, finished, refused):
    _, folder = finished
    for what in damages(folder / "config.json"):
        refused([option, folder], folder, "config.json", what=what)
    assert main.main([option, str(folder)]) == 0


def test_damaged_results_are_made_anew(finished, capsys):
    arguments, folder = finished
    path = folder / "results.json"
    whole = json.loads(path.read_bytes())
    others = [whole | {"seed": 4}, whole | {"seconds": None}, {}, {"a": 1}, whole | {"last_accuracy": "high"}]
    contents = [*cuts(path.read_bytes()).values(), *FOREIGN.values(), *(json.dumps(o).encode() for o in others)]
    for content in contents:
        path.write_bytes(content)
        assert main.main(arguments) == 0
        said = capsys.readouterr()
        assert f"warning: {path}" in said.err and "mean" in said.out, (content[:50], said)
        assert json.loads(path.read_bytes()) == whole, content[:50]


def test_a_folder_in_the_place_of_results_is_refused_at_the_start(finished, refused):
    arguments, folder = finished
    (folder / "results.json").unlink()
    (folder / "results.json").mkdir()
    before = (folder / "metrics.jsonl").read_bytes()
    refused(arguments, folder / "results.json", "is a folder")
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_damaged_metrics_rows_are_told(finished, refused):
    arguments, folder = finished
    (folder / "results.json").unlink()
    path = folder / "metrics.jsonl"
    whole = path.read_bytes()
    first, rest = whole.split(b"\n", 1)
    for content in (whole[:-9] + b"\n", b"\xff\n" + rest, first[:-4] + b"\n" + rest, b"[1]\n" + rest, b"1\n"):
        path.write_bytes(content)
        refused(arguments, path, "--resume never", what=content[-50:])
    path.write_bytes(whole)
    assert main.main(arguments) == 0


# ---------------------------------------------------------------- weights


@pytest.fixture
def vit(monkeypatch):
    """timm's ViT-Tiny with two narrow blocks, and settings that choose it."""
    real = timm.create_model
    narrow = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: real(name, **kwargs | narrow))
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0)


TINY_VIT = {"backbone_type": "vit_tiny_patch16_224", "image_size": 32}


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_damaged_weights(name, vit, place, monkeypatch, refused):
    monkeypatch.setattr(data, "load", lambda *args, **options: few_digits())
    file = place / name
    state = vit.state_dict()
    file.write_bytes(as_safetensors(state) if name.endswith("tensors") else as_torch(state))
    path = experiment(place, backbone_weights=str(file), **TINY_VIT)
    arguments = ["--config", path, "--out", place / "logs"]
    for what in damages(file):
        refused(arguments, file, "backbone_weights", what=what)
    assert not (place / "logs").exists()
    state["norm.bias"][0] = float("nan")
    file.write_bytes(as_safetensors(state) if name.endswith("tensors") else as_torch(state))
    refused(arguments, file, "norm.bias")


def test_a_flipped_bit_in_a_pth_file_is_told_by_its_checksums(vit, place):
    file = place / "w.pth"
    whole = as_torch(vit.state_dict())
    value = vit.state_dict()["blocks.0.mlp.fc1.weight"].numpy().tobytes()
    at = whole.index(value)
    for offset in (0, len(value) // 2, len(value) - 1):
        changed = bytearray(whole)
        changed[at + offset] ^= 1
        file.write_bytes(bytes(changed))
        with pytest.raises(ValueError, match=r"w\.pth is damaged or foreign"):
            weights.read_weights(file)
    file.write_bytes(whole)
    assert weights.read_weights(file).keys() == vit.state_dict().keys()


def test_a_damaged_copy_in_the_hubs_cache_is_told_in_a_line(monkeypatch, place, vit):
    file = place / "model.safetensors"
    file.write_bytes(as_safetensors(vit.state_dict())[:-9])
    monkeypatch.setattr(hub, "fetch", lambda *_: file)
    with pytest.raises(
        ValueError, match=rf"{file} are damaged or do not fit \(.*header.*\); delete that file"
    ) as error:
        weights.build(Experiment(**TINY | TINY_VIT | {"backbone_weights": "pretrained"}))
    assert "\n" not in str(error.value)


def test_a_flipped_bit_in_the_head_of_a_weights_file_is_told(vit, place):
    file = place / "w.safetensors"
    whole = as_safetensors(vit.state_dict())
    head = int.from_bytes(whole[:8], "little") + 8
    cfg = Experiment(**TINY | TINY_VIT | {"backbone_weights": str(file)})
    told = 0
    for place_, content in flips(whole[:head], 11):
        file.write_bytes(content + whole[head:])
        try:
            weights.build(cfg)
        except ValueError as error:
            assert str(file) in str(error), place_
            told += 1
    assert told > 0.9 * head / 11  # the rest are spaces and the like


def test_the_embedded_weights_damaged(place, monkeypatch, refused):
    file = shutil.copy(weights.EMBEDDED_FILE, place / "embedded.safetensors")
    monkeypatch.setattr(weights, "EMBEDDED_FILE", file)
    path = experiment(place, backbone_weights="pretrained")
    for what in damages(file):
        refused(["--config", path, "--check"], file, "restore it", what=what)
    file.write_bytes(as_safetensors({"a": torch.zeros(1)}))
    refused(["--config", path, "--check"], file, "restore it")


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("version", ["binary", "python"])
def test_damaged_cifar(version, place, few, refused):
    root = place / "daten ü 数据"
    folder = write_binary(root, *few, classes=100) if version == "binary" else write_python(root, *few)
    path = experiment(place, dataset="cifar100", init_cls=50, increment=50)
    for file in sorted(folder.iterdir()):
        names = file.suffix == ".txt"  # of classes: any hundred words will do
        for what in damages(file, skip={f"cut to {len(file.read_bytes().rstrip()) - 1}"} if names else ()):
            refused(["--config", path, "--data-root", root, "--out", place / "logs"], root, what=(file.name, what))
    assert not (place / "logs").exists()


def class_folders(root: Path, classes=2) -> Path:
    for name in range(classes):
        for number in range(3):
            file = root / f"класс {name}" / f"bild {number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(as_png((16 + name, 16)))
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images(workers, place, refused):
    root = class_folders(place / "bilder")
    settings = {"dataset": "folder", "data_path": str(root), "init_cls": 1, "increment": 1, "num_workers": workers}
    path = experiment(place, **settings, batch_size=1)
    file = root / "класс 0" / "bild 1.png"
    number = 0
    skip = {f"cut to {len(file.read_bytes()) - 1}"}  # all pixels are there
    if workers:  # which take time to start
        skip |= {*FOREIGN} - {"html", "pickle that runs code"}
    for what in damages(file, skip=skip):
        if what in ("missing", "a folder"):
            continue  # another data set, but a whole one
        if main.main(["--config", str(path), "--out", str(place / f"logs {number}"), "--check"]) == 0:
            refused(["--config", path, "--out", place / f"logs {number}"], file, what=what)
        number += 1
    assert number > 5


def test_a_flipped_bit_in_an_image_gives_pixels_or_its_name(place):
    file, told = place / "a.png", 0
    whole = as_png()
    for place_, content in flips(whole):
        file.write_bytes(content)
        try:
            assert decode(file).dtype == torch.uint8
        except ValueError as error:
            assert str(file) in str(error) and "\n" not in str(error), place_
            told += 1
    assert told > len(whole) / 2


@pytest.mark.parametrize("change", ["gone", "a file", "class is a file", "no class", "class empty", "link to nowhere"])
def test_class_folders_that_are_none(change, place, refused):
    root = class_folders(place / "bilder")
    path = experiment(place, dataset="folder", data_path=str(root), init_cls=1, increment=1)
    if change in ("gone", "a file", "no class"):
        shutil.rmtree(root)
    if change == "a file":
        root.write_bytes(as_png())
    elif change == "no class":
        root.mkdir()
    elif change != "gone":
        shutil.rmtree(root / "класс 0")
        if change == "class is a file":
            shutil.rmtree(root / "класс 1")
            (root / "класс 0").write_bytes(as_png())
        elif change == "class empty":
            (root / "класс 0").mkdir()
        else:
            (root / "класс 0").symlink_to(place / "nowhere")
    refused(["--config", path, "--out", place / "logs"], root)
    assert not (place / "logs").exists()


# ---------------------------------------------------------------- peft


def test_damaged_peft_files(vit, place, monkeypatch):
    cfg = Experiment(**TINY | TINY_VIT)
    backbone, _ = weights.build(cfg)
    folder = place / "адаптер 1"
    save_peft(folder, {(0, "fc1"): LoRA(32, 128, 2, 2.0)})
    assert load_peft(folder, backbone).keys() == {(0, "fc1")}
    for name in (CONFIG, WEIGHTS):
        for what in damages(folder / name):
            with pytest.raises(ValueError, match=r"адаптер 1") as caught:
                load_peft(folder, backbone)
            assert "\n" not in str(caught.value).replace("\n  - ", ""), (name, what, str(caught.value))
    whole = json.loads((folder / CONFIG).read_text())
    strange = (None, [], {}, "x", -1, 1.5, True, 10**400)
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "peft_type", "bias", "init_lora_weights"):
        for value in strange:
            (folder / CONFIG).write_text(json.dumps(whole | {key: value}))
            try:
                load_peft(folder, backbone)
            except ValueError as error:
                assert str(folder) in str(error), (key, value)
    (folder / CONFIG).write_text(json.dumps(whole | {"format_of_the_future": {"a": 1}}))
    with pytest.raises(ValueError, match="format_of_the_future"):
        load_peft(folder, backbone)


# ---------------------------------------------------------------- paths


def test_paths_with_spaces_and_other_scripts(vit, place, monkeypatch, capsys):
    odd = place / "ordner mit leer  zeichen ü" / "数据 путь"
    root = class_folders(odd / "bilder")
    file = odd / "gewichte ß.safetensors"
    file.write_bytes(as_safetensors(vit.state_dict()))
    settings = {
        "dataset": "folder",
        "data_path": str(root),
        "init_cls": 1,
        "increment": 1,
        "backbone_weights": str(file),
    }
    path = experiment(odd, "экс перимент.json", **settings, **TINY_VIT)
    arguments = ["--config", str(path), "--out", str(odd / "aus gabe"), "--data-root", str(odd)]
    assert main.main([*arguments, "--check"]) == 0
    assert main.main(arguments) == 0
    (folder,) = odd.glob("aus gabe/экс перимент/*/seed_3")
    assert (folder / "report.html").is_file()
    assert main.main(arguments) == 0 and "seed 3 is finished" in capsys.readouterr().out
    assert main.main(["--evaluate", str(folder)]) == 0
    assert main.main(["--export", str(folder)]) == 0


def test_a_folder_whose_name_is_no_text(place, monkeypatch, capsys):
    """Names are bytes to the system; Python shows those that are not UTF-8 as lone surrogates."""
    out = os.fsdecode(os.fsencode(place) + b"/\xff")
    try:
        os.mkdir(out)
    except OSError:
        pytest.skip("the file system takes UTF-8 names alone")
    monkeypatch.setattr(data, "load", lambda *args, **options: few_digits())
    assert main.main(["--config", str(experiment(place)), "--out", out]) == 0
    assert (next(Path(out).glob("*/*/seed_3")) / "results.json").is_file()
