"""utils/data: folders of images as people have them are read right, or refused with what is wrong and what to do."""

import os

import numpy as np
import pytest
from PIL import Image

from utils import data
from utils.data.listing import IMAGE_SUFFIXES


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2), (value, 0, 0)).save(path, format="PNG")


def two_parts(root, classes, count=2):
    for part in ("train", "test"):
        for name in classes:
            for k in range(count):
                picture(root / part / name / f"{k}.png", value=k)
    return root


def names_of(images):
    return [os.path.basename(path) for path in images.paths]


def test_pilot_layout(tmp_path, monkeypatch):
    for name, info in data.DATASETS.items():
        if info.kind == "folders" and info.folder:
            place = tmp_path / info.folder
            message = data.missing(name, root=tmp_path)
            assert message and str(place) in message and "LAMDA-PILOT" in message
            with pytest.raises(FileNotFoundError, match=str(place)):
                data.load(name, root=tmp_path)
    two_parts(tmp_path / "vtab", [f"{k}" for k in range(50)], count=1)
    assert data.missing("vtab", root=tmp_path) is None
    loaded = data.load("vtab", root=tmp_path)
    assert loaded.class_names == sorted(str(k) for k in range(50)) and loaded.transforms == "imagenet"
    assert loaded.train.labels.tolist() == loaded.test.labels.tolist() == list(range(50))
    assert loaded.train.paths[3] == str(tmp_path / "vtab" / "train" / "11" / "0.png")


def test_a_wrong_class_count_names_both_numbers(tmp_path):
    two_parts(tmp_path / "vtab", ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"vtab/train has 3 class folders, expected 50") as error:
        data.load("vtab", root=tmp_path)
    assert data.missing("vtab", root=tmp_path) == str(error.value)


def test_missing_lists_folders_and_opens_no_image(tmp_path):
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
    assert data.missing("folder", path=tmp_path) is None  # whether they hold images is for load to see
    (tmp_path / "alone").mkdir()
    assert "alone: has no class folders" in str(data.missing("folder", path=tmp_path / "alone"))
    (tmp_path / "train" / "c").symlink_to(tmp_path / "gone")
    assert "train/c: is a dangling link" in str(data.missing("folder", path=tmp_path))


def test_an_unreadable_folder_is_a_line_not_a_traceback(tmp_path, monkeypatch):
    two_parts(tmp_path, ["a"])

    def refuse(place):
        raise PermissionError(13, "Permission denied", str(place))

    monkeypatch.setattr(os, "listdir", refuse)
    message = data.missing("folder", path=tmp_path)
    assert message == f"dataset folder: {tmp_path} cannot be read: Permission denied"


def test_folder_with_train_and_test(tmp_path):
    two_parts(tmp_path, ["b", "a", "C"])
    assert data.count_classes("folder", path=tmp_path) == 3
    loaded = data.load("folder", path=tmp_path)
    assert loaded.class_names == ["C", "a", "b"]
    assert loaded.train.labels.tolist() == [0, 0, 1, 1, 2, 2] and names_of(loaded.train) == ["0.png", "1.png"] * 3
    assert [int(loaded.train.image(k)[0, 0, 0]) for k in range(2)] == [0, 1]


def test_folder_split_by_ratio(tmp_path):
    for name, count in (("a", 10), ("b", 2), ("c", 5)):
        for k in range(count):
            picture(tmp_path / name / f"{k}.png")
    assert data.missing("folder", path=tmp_path) is None and data.count_classes("folder", path=tmp_path) == 3
    loaded = data.load("folder", path=tmp_path, test_ratio=0.3)
    assert np.bincount(loaded.train.labels).tolist() == [7, 1, 3]
    assert np.bincount(loaded.test.labels).tolist() == [3, 1, 2]
    assert len({*loaded.train.paths, *loaded.test.paths}) == 17
    assert data.load("folder", path=tmp_path, test_ratio=0.3).test.paths == loaded.test.paths
    assert names_of(loaded.test) == ["4.png", "5.png", "8.png", "1.png", "1.png", "3.png"]  # always the same share
    with pytest.raises(ValueError, match=r"test_ratio: must lie between 0 and 1, got 1\.5"):
        data.load("folder", path=tmp_path, test_ratio=1.5)
    picture(tmp_path / "d" / "alone.png")
    with pytest.raises(ValueError, match=r"alone\.png: is the only image of class d"):
        data.load("folder", path=tmp_path)


def test_a_class_may_be_called_train(tmp_path):
    for name in ("bus", "train", "test"):
        picture(tmp_path / name / "0.png")
        picture(tmp_path / name / "1.png")
    assert data.load("folder", path=tmp_path).class_names == ["bus", "test", "train"]
    assert data.count_classes("folder", path=tmp_path) == 3


def test_half_a_layout_is_refused(tmp_path):
    picture(tmp_path / "one" / "train" / "a" / "0.png")
    with pytest.raises(FileNotFoundError, match=r"one/test; needed"):
        data.load("folder", path=tmp_path / "one")
    picture(tmp_path / "two" / "test" / "a" / "0.png")
    with pytest.raises(FileNotFoundError, match=r"two/train; needed"):
        data.load("folder", path=tmp_path / "two")
    with pytest.raises(FileNotFoundError, match=r"no folder .+three"):
        data.load("folder", path=tmp_path / "three")
    assert data.count_classes("folder", path=tmp_path / "three") is None
    with pytest.raises(ValueError, match="data_path"):
        data.load("folder")


def test_classes_of_one_part_only(tmp_path):
    two_parts(tmp_path, ["a", "b"])
    picture(tmp_path / "test" / "new" / "0.png")
    with pytest.raises(
        ValueError, match=r"1 class folder of .+test is not in .+train: new \(2 .+ train, 3 in test\)"
    ) as error:
        data.load("folder", path=tmp_path)
    assert data.missing("folder", path=tmp_path) == str(error.value)
    (tmp_path / "test" / "new").rename(tmp_path / "train" / "old")
    with pytest.raises(ValueError, match=r"1 class folder of .+train is not in .+test: old") as error:
        data.load("folder", path=tmp_path)
    assert data.missing("folder", path=tmp_path) == str(error.value)


def test_what_counts_as_an_image(tmp_path):
    two_parts(tmp_path, ["a"])
    folder = tmp_path / "train" / "a"
    picture(folder / "UPPER.PNG")
    picture(folder / "deeper" / "2.png")
    picture(folder / ".hidden.png")
    picture(folder / ".cache" / "3.png")
    (folder / "notes.txt").write_text("x")
    (tmp_path / "train" / "README").write_text("x")
    (tmp_path / "train" / ".git").mkdir()
    loaded = data.load("folder", path=tmp_path)
    assert names_of(loaded.train) == ["0.png", "1.png", "UPPER.PNG", "2.png"]


def test_a_class_folder_without_images(tmp_path):
    two_parts(tmp_path, ["a", "b"])
    folder = tmp_path / "test" / "b"
    for k in range(2):
        (folder / f"{k}.png").rename(folder / f"{k}.txt")
    with pytest.raises(ValueError, match=r"test/b: is a class folder without images \(2 \.txt skipped\)"):
        data.load("folder", path=tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none: has no class folders"):
        data.load("folder", path=tmp_path / "none")


def test_an_empty_file(tmp_path):
    two_parts(tmp_path, ["a"])
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train/a/0\.png: is an empty file"):
        data.load("folder", path=tmp_path)


def test_links(tmp_path):
    two_parts(tmp_path / "set", ["a"])
    classes = tmp_path / "set" / "train"
    picture(tmp_path / "elsewhere" / "x.png")
    (classes / "a" / "linked.png").symlink_to(tmp_path / "elsewhere" / "x.png")
    (classes / "a" / "more").symlink_to(tmp_path / "elsewhere")
    (classes / "b").symlink_to(tmp_path / "elsewhere")
    picture(tmp_path / "set" / "test" / "b" / "0.png")
    loaded = data.load("folder", path=tmp_path / "set")
    assert names_of(loaded.train) == ["0.png", "1.png", "linked.png", "x.png", "x.png"]

    for target in (classes, classes / "a"):
        (classes / "a" / "loop").symlink_to(target)
        with pytest.raises(ValueError, match=r"train/a/loop: is a link to a folder that contains it; remove it"):
            data.load("folder", path=tmp_path / "set")
        (classes / "a" / "loop").unlink()

    (classes / "c").symlink_to(tmp_path / "set")
    with pytest.raises(ValueError, match=r"train/c: is a link to a folder that contains it"):
        data.load("folder", path=tmp_path / "set")
    (classes / "c").unlink()
    for target in (tmp_path / "gone", classes / "c"):
        (classes / "c").symlink_to(target)
        with pytest.raises(ValueError, match=r"train/c: is a dangling link"):
            data.load("folder", path=tmp_path / "set")
        (classes / "c").unlink()
    (classes / "a" / "z.png").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"a/z\.png: is a dangling link"):
        data.load("folder", path=tmp_path / "set")


def test_every_suffix_is_one_pillow_knows():
    Image.init()
    assert set(IMAGE_SUFFIXES) <= set(Image.registered_extensions())
