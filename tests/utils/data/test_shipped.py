"""The sets that ship as files: what is in them, who drew it, and the scripts that make the files again."""

import gzip
import io
import json
import re
import tarfile

import numpy as np
import pytest

from utils import data
from utils.data import fashion, icons
from utils.data.shipped import make_fashion, make_icons


def test_icons_of_a_designer_are_on_one_side():
    loaded = data.load("icons")
    assert loaded.class_names == make_icons.CLASSES and len(loaded.class_names) == 100
    assert (len(loaded.train), len(loaded.test)) == (4339, 1089)
    assert np.bincount(loaded.train.labels, minlength=100).min() == 24
    assert np.bincount(loaded.test.labels, minlength=100).min() == 4
    with np.load(icons.FILE, allow_pickle=False) as file:
        sets = file["sets"].tolist()
    is_test = {name: icons.digest_of_designer(name) % 4 == 0 for name in sets}
    assert sum(is_test[name] for name in sets) == 1089
    assert is_test["heroicons"] == is_test["heroicons-outline"] == is_test["heroicons-solid"]
    image = loaded.train.image(0)
    assert image.shape == (3, 32, 32) and image[:, 0, 0].tolist() == [255, 255, 255]
    assert image.min() < 64  # black on white


def test_every_set_of_icons_has_its_author_and_licence():
    with np.load(icons.FILE, allow_pickle=False) as file:
        counts = dict(zip(*np.unique(file["sets"], return_counts=True), strict=True))
    text = (make_icons.HERE / "icons-licences.md").read_text(encoding="utf-8")
    rows = [re.split(r" \| ", line.strip("| ")) for line in text.splitlines() if line.startswith("| ")][1:]
    assert {row[0]: int(row[5]) for row in rows} == counts
    assert all(row[2] and row[3] in make_icons.LICENCES for row in rows)


def test_fashion_has_300_and_100_of_each_class_in_a_border():
    loaded = data.load("fashion")
    assert loaded.class_names == make_fashion.CLASSES
    assert np.bincount(loaded.train.labels).tolist() == [300] * 10
    assert np.bincount(loaded.test.labels).tolist() == [100] * 10
    image = loaded.test.image(5)
    assert image[:, :2].max() == 0 and image[:, :, -2:].max() == 0 and image[:, 2:-2, 2:-2].max() > 100
    assert "Zalando" in (make_fashion.HERE / "fashion-licence.md").read_text(encoding="utf-8")


def test_the_script_takes_the_first_images_of_each_class(tmp_path, monkeypatch):
    monkeypatch.setattr(make_fashion, "CLASSES", ["a", "b"])
    monkeypatch.setattr(make_fashion, "TRAIN_PER_CLASS", 2)
    monkeypatch.setattr(make_fashion, "TEST_PER_CLASS", 1)
    for split, labels in (("train", [1, 0, 1, 1, 0, 0]), ("t10k", [1, 1, 0])):
        images = np.arange(len(labels), dtype=np.uint8).repeat(28 * 28)
        (tmp_path / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + images.tobytes()))
        (tmp_path / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + bytes(labels)))
    make_fashion.make(tmp_path, tmp_path)
    monkeypatch.setattr(fashion, "FILE", tmp_path / "fashion.npz")
    names, train, train_labels, test, test_labels = fashion.load()
    assert names == ["a", "b"] and train_labels.tolist() == [0, 0, 1, 1] and test_labels.tolist() == [0, 1]
    assert train[:, 0, 16, 16].tolist() == [1, 4, 0, 2] and test[:, 0, 16, 16].tolist() == [2, 0]


def package_with(tmp_path, **sets):
    """An npm package with these sets {name: (licence, category, icons)}."""
    collections, files = {}, {}
    for name, (licence, category, drawings) in sets.items():
        about = {"name": name.title(), "author": {"name": f"{name}'s author"}, "category": category}
        collections[name] = about | {"license": {"spdx": licence, "url": f"https://example.org/{name}"}}
        files[f"json/{name}.json"] = {"prefix": name, "icons": {icon: {"body": icon} for icon in drawings}}
    path = tmp_path / "package.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in {"collections.json": collections, "package.json": {"version": "9.9"}, **files}.items():
            text = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    return path


def test_the_script_takes_one_icon_a_set_and_permissive_sets_alone(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        make_icons, "drawn", lambda icon, rest: seen.append(icon["body"]) or np.zeros((32, 32), np.uint8)
    )
    package = package_with(
        tmp_path,
        second=("MIT", "UI 24px", ["sun-outline-24", "sun-01", "camera-fill", "camera-logo", "elephant"]),
        first=("ISC", "UI 16px", ["camera"]),
        closed=("CC-BY-NC-4.0", "UI 24px", ["sun"]),
        marks=("MIT", "Logos", ["apple"]),
        nothing=("MIT", "UI 24px", ["elephant"]),
    )
    make_icons.make(package, tmp_path)
    with np.load(tmp_path / "icons.npz", allow_pickle=False) as file:
        classes, labels, sets = (file[key] for key in ("classes", "labels", "sets"))
    found = [(str(classes[label]), str(name)) for label, name in zip(labels, sets, strict=True)]
    assert found == [("camera", "first"), ("camera", "second"), ("sun", "second")]
    assert seen == ["camera", "camera-fill", "sun-01"]
    notices = (tmp_path / "icons-licences.md").read_text(encoding="utf-8")
    assert "3 icons of 2 sets" in notices and "@iconify/json` 9.9" in notices
    assert "| second | Second | second's author | MIT | https://example.org/second | 2 |" in notices
    assert "closed" not in notices and "marks" not in notices and "nothing" not in notices


@pytest.mark.parametrize(
    ("name", "expected"), [("camera-outline-24", "camera"), ("credit-card-fill", "credit-card"), ("24", "")]
)
def test_words_of_style_do_not_count(name, expected):
    assert make_icons.concept(name) == expected
