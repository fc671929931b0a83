"""utils/data: the embedded sets are what they say, and files in the real formats are read right or refused."""

import itertools
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from tests.helpers.files import write_binary, write_python
from utils import data
from utils.data import cifar_pickle, digits, fractals, glyphs


def test_importing_is_light():
    heavy = {"torch", "torchvision", "sklearn", "matplotlib", "PIL"}
    code = f"import sys; from utils import data; print({heavy} & set(sys.modules))"
    root = Path(data.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == "set()\n"


def test_facts():
    assert {name: info.num_classes for name, info in data.DATASETS.items() if info.kind == "folders"} == {
        **{"imagenetr": 200, "imageneta": 200, "vtab": 50, "cub": 200, "omnibenchmark": 300, "objectnet": 200},
        "folder": None,
    }
    assert {"digits", "glyphs", "fractals", "cifar10", "cifar100", "cifar224"} < set(data.DATASETS)
    assert data.count_classes("vtab") == 50 and data.count_classes("folder") is None
    with pytest.raises(
        ValueError, match=r"dataset 'mnst' is not known; did you mean 'mnist' .+; known are digits, glyphs"
    ):
        data.load("mnst")


# -------------------------------------------------------------------------------------------------- embedded


def test_digits():
    loaded = data.load("digits")
    assert data.missing("digits") is None
    assert (len(loaded.train), len(loaded.test), len(loaded.class_names)) == (1438, 359, 10)
    assert loaded.train.images.shape == (1438, 3, 32, 32) and loaded.train.images.dtype == torch.uint8
    assert np.bincount(loaded.test.labels).tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    everything = torch.cat([loaded.train.images, loaded.test.images])
    assert len(torch.unique(everything.flatten(1), dim=0)) == 1797
    assert (everything[:, 0] == everything[:, 2]).all() and everything.max() == 255
    inner = torch.zeros(32, 32, dtype=torch.bool)
    inner[4:28, 4:28] = True
    assert (everything[:, :, ~inner] == 0).all()
    assert torch.equal(loaded.train.images, data.load("digits").train.images)


def test_digits_are_those_of_scikit_learn_wherever_it_keeps_them(monkeypatch):
    theirs = load_digits()
    for hidden in (False, True):
        if hidden:
            monkeypatch.setattr(digits.Path, "is_file", lambda path: False)
        images, labels = digits._raw()
        assert np.array_equal(images, theirs.images) and np.array_equal(labels, theirs.target)


def test_digits_are_enlarged_bilinearly():
    grey = np.zeros((1, 8, 8))
    grey[0, 0, 0], grey[0, 0, 1] = 16, 8
    # centres of the fine pixels lie at -1/3, 0, 1/3, 2/3, 1, 4/3, ... of the coarse ones; 127.5 and 42.5 round up
    assert digits.enlarge(grey)[0, 1, 4, 4:12].tolist() == [255, 255, 213, 170, 128, 85, 43, 0]
    random = np.random.RandomState(0).randint(0, 17, (3, 8, 8))
    large = torch.nn.functional.interpolate(torch.tensor(random)[:, None] * 255 / 16, size=(24, 24), mode="bilinear")
    assert np.abs(digits.enlarge(random)[:, :1, 4:28, 4:28] - large.numpy()).max() < 0.501


@pytest.fixture(scope="module")
def drawn():
    return data.load("glyphs")


def test_glyphs(drawn):
    assert len(drawn.class_names) == len(set(drawn.class_names)) == 100
    assert drawn.train.images.shape == (6000, 3, 32, 32) and drawn.test.images.shape == (1500, 3, 32, 32)
    assert set(np.bincount(drawn.train.labels)) == {60} and set(np.bincount(drawn.test.labels)) == {15}
    assert len(glyphs.TRAIN_FONTS) == 12 and len(glyphs.TEST_FONTS) == 4
    assert not set(glyphs.TRAIN_FONTS) & set(glyphs.TEST_FONTS)
    everything = torch.cat([drawn.train.images, drawn.test.images])
    ink = everything.float().mean((1, 2, 3)) / 255
    assert ink.min() > 0.015 and ink.max() < 0.6
    assert len(torch.unique(everything.flatten(1), dim=0)) == 7500


def test_glyphs_are_the_same_every_time(drawn):
    again = data.load("glyphs")
    assert torch.equal(drawn.train.images, again.train.images) and torch.equal(drawn.test.images, again.test.images)


def test_domains_are_the_first_classes_of_three_sets_one_after_the_other(drawn):
    loaded = data.load("domains")
    assert [loaded.class_names[i] for i in (0, 9, 10, 19, 20, 29)] == [
        *("digits 0", "digits 9", "glyphs A", "glyphs J", "fractals family 01 a", "fractals family 10 a"),
    ]
    assert np.bincount(loaded.train.labels)[10:].tolist() == [60] * 20 and len(loaded.train) == 1438 + 1200
    assert np.bincount(loaded.test.labels)[10:].tolist() == [15] * 10 + [20] * 10
    of_b = torch.from_numpy(drawn.test.labels == 1)
    assert torch.equal(loaded.test.images[torch.from_numpy(loaded.test.labels == 11)], drawn.test.images[of_b])
    third = fractals.load()
    assert torch.equal(loaded.train.images[-60:], torch.from_numpy(third[1][third[2] == 36]))


def test_no_two_glyphs_look_alike():
    """Cut out and brought to one size, no two characters of a font coincide (A and Greek Alpha would: 1.0)."""
    for font in (*glyphs.TRAIN_FONTS, *glyphs.TEST_FONTS):
        shapes = []
        for master in glyphs._masters(font):
            cut = master.crop(master.getbbox())
            zoom = 28 / max(cut.size)
            cut = cut.resize([max(1, round(side * zoom)) for side in cut.size], Image.Resampling.BOX)
            frame = Image.new("L", (32, 32))
            frame.paste(cut, ((32 - cut.width) // 2, (32 - cut.height) // 2))
            shapes.append(np.asarray(frame, dtype=float).ravel())
        shapes = np.stack(shapes) / np.linalg.norm(shapes, axis=1, keepdims=True)
        alike = shapes @ shapes.T
        for i, j in itertools.combinations(range(100), 2):
            assert alike[i, j] < 0.975, (font, glyphs.CHARACTERS[i], glyphs.CHARACTERS[j])


def test_a_missing_font_is_named(monkeypatch):
    monkeypatch.setattr(glyphs, "TEST_FONTS", ("DejaVuSans-Gone",))
    with pytest.raises(ValueError, match=r"DejaVuSans-Gone\.ttf is missing; it ships inside matplotlib"):
        glyphs.load()


def test_a_font_without_a_character_is_named(monkeypatch):
    monkeypatch.setattr(glyphs, "CHARACTERS", "A∞")
    with pytest.raises(ValueError, match=r"STIXGeneralItalic\.ttf lacks ∞"):
        glyphs._masters("STIXGeneralItalic")


def check_cifar(loaded, pixels, labels, classes):
    assert loaded.class_names == [f"class{k}" for k in range(classes)]
    images = torch.from_numpy(pixels.reshape(-1, 3, 32, 32))
    assert torch.equal(loaded.train.images, images[:10]) and torch.equal(loaded.test.images, images[10:])
    assert loaded.train.labels.tolist() == labels[:10].tolist()
    assert loaded.test.labels.tolist() == labels[10:].tolist()


def test_cifar100_binary(tmp_path, few):
    write_binary(tmp_path, *few, classes=100)
    for name, kind in (("cifar100", "cifar"), ("cifar224", "imagenet")):
        assert data.missing(name, root=tmp_path) is None
        loaded = data.load(name, root=tmp_path)
        check_cifar(loaded, *few, classes=100)
        assert (loaded.name, loaded.transforms) == (name, kind)


def test_cifar10_binary(tmp_path, few):
    pixels, labels = few[0], few[1] % 10
    write_binary(tmp_path, pixels, labels, classes=10)
    check_cifar(data.load("cifar10", root=tmp_path), pixels, labels, classes=10)


def test_cifar100_python_version(tmp_path, few):
    write_python(tmp_path, *few)
    check_cifar(data.load("cifar100", root=tmp_path), *few, classes=100)


def test_cifar_python_version_as_python_2_wrote_it(tmp_path, few):
    """The official files are protocol 2 of Python 2: byte strings are plain strings and numpy is numpy.core."""
    folder = write_python(tmp_path, *few)
    pixels = few[0][:10]
    reduced = pixels.__reduce__()[2]
    shape, raw = reduced[1], reduced[4]
    labels = b"".join(b"K" + bytes([k]) for k in few[1][:10].tolist())
    (folder / "train").write_bytes(
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K" + bytes([shape[0]]) + b"M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + len(raw).to_bytes(4, "little") + raw + b"tbU\x0bfine_labels](" + labels + b"eu."
    )  # fmt: skip
    check_cifar(data.load("cifar100", root=tmp_path), *few, classes=100)


class _Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_refused_before_it_acts(tmp_path, few):
    folder = write_python(tmp_path, *few)
    for name in ("train", "test", "meta"):
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(pickle.dumps({"data": _Evil(tmp_path / "hacked")}, protocol=2))
        with pytest.raises(
            ValueError, match=rf"{name}: is not an official CIFAR batch file \(it asks for \w+\.mkdir\)"
        ):
            data.load("cifar100", root=tmp_path)
        (folder / name).write_bytes(good)
    assert not (tmp_path / "hacked").exists()


# An array of shape (8,), its dtype and its content, as numpy pickles it.
DTYPE = (
    b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x08\x85cnumpy\ndtype\n"
    b"%sK\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x01tb\x89%stb."
)


@pytest.mark.parametrize(
    "payload",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\nK\x01\x85U\x01btR.",
        b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x04\x00\x00\x00utf8tR.",
        b"",
        b"\x80\x02",
        b"garbage",
        b"\x80\x02K\x01.",
        b"\x80\x02G\x00.",
        b"\x80\x02cnumpy\nndarray\n((\x8a\x06\x00\x00\x00\x00\x00\x01tU\x02u1tR.",  # an array of 10^12 bytes
        b"\x80\x05\x96\x00\x00\x00\x00\x00\x01\x00\x00.",  # the same as a bytearray
        DTYPE % (b"U\x02O8", b"U\x08AAAAAAAA"),  # bytes as pointers to objects
        DTYPE % (b"U\x02u1", b"U\x09AAAAAAAAA"),  # 9 bytes for 8
        DTYPE % (b"U\x02u1", b"cos\nsystem\n"),
    ],
)
def test_other_pickles_are_refused(tmp_path, payload):
    path = tmp_path / "train"
    path.write_bytes(payload)
    with pytest.raises(ValueError, match=str(path)):
        cifar_pickle.read(path)


def test_a_damaged_index_takes_no_memory(tmp_path):
    path = tmp_path / "train"
    path.write_bytes(b"\x80\x02}r\xff\xff\xff\x07.")  # the dict as memo entry 134,217,727: 2 GB of an array
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert cifar_pickle.read(path) == {}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_damaged_cifar_is_refused(tmp_path, few):
    folder = write_binary(tmp_path, *few, classes=100)
    whole = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"train\.bin: 30739 bytes are not a whole number of 3074-byte records"):
        data.load("cifar100", root=tmp_path)
    (folder / "train.bin").write_bytes(whole[:-3074])
    with pytest.raises(ValueError, match=r"9 training images .+ expected 10"):
        data.load("cifar100", root=tmp_path)
    (folder / "train.bin").write_bytes(whole[:1] + b"\x64" + whole[2:])
    with pytest.raises(ValueError, match=r"training labels \d+\.\.100 .+ expected 0\.\.99"):
        data.load("cifar100", root=tmp_path)
    (folder / "train.bin").write_bytes(whole)
    (folder / "fine_label_names.txt").write_text("one\n")
    with pytest.raises(ValueError, match=r"1 class names .+ expected 100"):
        data.load("cifar100", root=tmp_path)


def test_python_batches_of_the_wrong_shape_are_refused(tmp_path, few):
    folder = write_python(tmp_path, *few)
    good = {"data": few[0][:10], "fine_labels": few[1][:10].tolist()}
    for key, value, message in (
        ("data", few[0][:10, :5], r"should be uint8 \[N, 3072\]"),
        ("data", few[0][:10].astype(float), r"should be uint8 \[N, 3072\]"),
        ("data", "x", "it is str"),
        ("fine_labels", [1], "a list of 10 whole numbers"),
        ("fine_labels", ["x"] * 10, "a list of 10 whole numbers"),
    ):
        (folder / "train").write_bytes(pickle.dumps(good | {key: value}, protocol=2))
        with pytest.raises(ValueError, match=message):
            data.load("cifar100", root=tmp_path)


def test_missing_cifar_says_where_it_looked(tmp_path):
    message = data.missing("cifar224", root=tmp_path)
    assert message and f"--data fetch cifar224 --data-root {tmp_path}` fetches it (170 MB)" in message
    assert "toronto.edu" in message and str(tmp_path) in message
    with pytest.raises(FileNotFoundError, match="neither cifar-100-binary nor cifar-100-python is complete"):
        data.load("cifar100", root=tmp_path)
    assert "data_root" in str(data.missing("cifar10"))
    with pytest.raises(ValueError, match="data_root"):
        data.load("cifar10")
