"""utils/data: folders of images as people have them are read right, or refused with what is wrong and what to do."""

import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from utils import data
from utils.data import batches, duplicates
from utils.data.images import ImageArray
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


# ---------------------------------------------------------------- parts of a split, and what only looks like them


def parts(root, *names, classes=("a", "b")):
    for k, part in enumerate(names):
        for name in classes:
            for i in range(2):
                picture(root / part / name / f"{i}.png", value=10 * k + i)
    return root


@pytest.mark.parametrize(
    ("names", "used", "note"),
    [
        (("Train", "Test"), ("Train", "Test"), "Train/ is read as the training set and Test/ as the test set"),
        (("training", "testing"), ("training", "testing"), "training/ is read as the training set"),
        (("train", "val"), ("train", "val"), "val/ is the test set, since there is no test/"),
        (("train", "val", "test"), ("train", "test"), "val/ is not used, test/ is the test set; to score on val/, set"),
        (("train", "test", "birds"), ("train", "test"), "not read, since it lies beside train/: birds"),
        (("train", "test", "Training"), ("train", "test"), "not read, since it lies beside train/: Training"),
    ],
)
def test_parts_by_their_names(names, used, note, tmp_path):
    loaded = data.load("folder", path=parts(tmp_path, *names))
    assert loaded.class_names == ["a", "b"] and data.count_classes("folder", path=tmp_path) == 2
    for images, part in zip((loaded.train, loaded.test), used, strict=True):
        assert images.paths[0] == str(tmp_path / part / "a" / "0.png") and len(images) == 4
    (line,) = loaded.notes
    assert line.startswith(note)


def test_an_unlabelled_test_folder_is_no_test_set(tmp_path):
    parts(tmp_path, "train")
    picture(tmp_path / "test" / "0.png")
    with pytest.raises(
        FileNotFoundError, match=r"test/ has no class folders; or set data_path to .+/train: then a share"
    ):
        data.load("folder", path=tmp_path)
    parts(tmp_path, "val")
    assert "val" in data.load("folder", path=tmp_path).test.paths[0]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (("train/0.png", "train/1.png", "test/0.png", "test/1.png"), r"test, train are called like parts of a split"),
        (("images/a/0.png", "images/b/0.png"), r"has one folder, images, which holds 2 folders \(a, b\); set data_path"),
        (("x/train/a/0.png", "x/test/a/0.png"), r"has one folder, x, .+; set data_path to .+/x"),
        (("Train/a/0.png", "TRAIN/a/0.png"), "two folders for train; remove one"),
    ],
)  # fmt: skip
def test_what_only_looks_like_classes_is_refused(files, words, tmp_path):
    for file in files:
        picture(tmp_path / file)
    with pytest.raises(ValueError, match=words) as caught:
        data.load("folder", path=tmp_path)
    assert data.missing("folder", path=tmp_path) == str(caught.value)


def test_folders_that_hold_the_same_folders_get_a_note(tmp_path):
    parts(tmp_path, "fold1", "fold2")
    note = data.load("folder", path=tmp_path).notes[0]
    assert note.startswith("fold1, fold2 are read as 2 classes, and each holds the same 2 folders (a, b): if those are")
    picture(tmp_path / "fold2" / "c" / "0.png", value=99)
    assert not any(note.startswith("fold1") for note in data.load("folder", path=tmp_path).notes)


# ---------------------------------------------------------------- what lies beside images, and odd names


def test_what_systems_put_there_is_no_data_and_other_files_are_counted(tmp_path):
    two_parts(tmp_path, ["a", "b"])
    for path in (
        "train/@eaDir/x/0.png",
        "train/a/@eaDir/0.png/THUMB.png",
        "train/__MACOSX/a/0.png",
        "test/@eaDir/0.png",
    ):
        picture(tmp_path / path)
    for path in ("train/a/Thumbs.db", "train/a/desktop.ini", "train/b/notes.txt", "test/b/a.TXT", "test/a/x.heic"):
        (tmp_path / path).write_bytes(b"x")
    picture(tmp_path / "train" / "loose.png")
    loaded = data.load("folder", path=tmp_path)
    assert names_of(loaded.train) == ["0.png", "1.png"] * 2 and loaded.class_names == ["a", "b"]
    loose, skipped = [note for note in loaded.notes if "byte for byte" not in note]
    assert loose == f"not read, since outside of class folders: 1 image in {tmp_path / 'train'}"
    assert skipped.startswith("3 files in class folders skipped") and skipped.endswith(": 2 .txt, 1 .heic")


def test_names_that_are_not_utf_8(tmp_path):
    two_parts(tmp_path, ["a", "b"])
    for part in ("train", "test"):
        os.rename(tmp_path / part / "a", os.fsencode(tmp_path / part) + b"/caf\xe9")
    os.rename(tmp_path / "train" / "b" / "0.png", os.fsencode(tmp_path / "train" / "b") + b"/\xe9.png")
    loaded = data.load("folder", path=tmp_path)
    assert loaded.class_names == ["b", "caf\\xe9"] == data.class_names("folder", path=tmp_path)
    assert loaded.train.image(1).shape == (3, 2, 2) and loaded.train.image(2).shape == (3, 2, 2)
    source = batches.Source(loaded.train, None, None, 0, 0)
    assert len(source.digest) == 16


def test_names_that_look_alike_are_told_apart(tmp_path):
    for part, form in (("train", "NFC"), ("test", "NFD")):
        picture(tmp_path / part / unicodedata.normalize(form, "café") / "0.png")
    with pytest.raises(ValueError, match=r"'caf\\xe9' and 'cafe\\u0301' look alike and differ in their Unicode form"):
        data.load("folder", path=tmp_path)


# ---------------------------------------------------------------- broken images


def broken_set(root):
    """Two classes of six images, of which two each cannot be read."""
    for k in range(12):
        picture(root / "ab"[k % 2] / f"{k // 2}.png", value=k)
    whole = (root / "a" / "0.png").read_bytes()
    (root / "a" / "0.png").write_bytes(whole[: len(whole) // 2])
    (root / "a" / "1.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0")
    (root / "b" / "2.png").write_bytes(b"")
    (root / "b" / "3.png").unlink()
    (root / "b" / "3.png").symlink_to("gone")
    return root


def test_all_broken_images_are_named_at_once(tmp_path):
    (broken_set(tmp_path) / "c").mkdir()
    with pytest.raises(data.DataFaults) as caught:
        data.load("folder", path=tmp_path)
    lines = str(caught.value).split("\n  - ")
    assert lines[0] == "dataset folder: 5 faults (skip_broken=true leaves such files out and counts them)"
    for line, words in zip(
        lines[1:],
        (
            "c: is a class folder without images",
            "b/2.png: is an empty file",
            "b/3.png: is a dangling link",
            "a/0.png: is not a readable image (",
            "a/1.png: is not a readable image (its content is PostScript (EPS)",
        ),
        strict=True,
    ):
        assert words in line


def test_skip_broken_leaves_them_out_and_counts_them(tmp_path):
    loaded = data.load("folder", path=broken_set(tmp_path), skip_broken=True)
    assert len(loaded.train) + len(loaded.test) == 8 and sum(loaded.left_out.values()) == 4
    (note,) = loaded.notes
    assert note.startswith("skip_broken: 4 of 12 images left out: ")
    assert data.load("folder", path=tmp_path, skip_broken=True).test.paths == loaded.test.paths
    for k in range(6):
        (tmp_path / "a" / f"{k}.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="class a: no train image of it can be read"):
        data.load("folder", path=tmp_path, skip_broken=True)


def test_a_damaged_middle_is_found_by_decoding_alone(tmp_path):
    two_parts(tmp_path, ["a"])
    path = tmp_path / "train" / "a" / "0.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = bytearray(path.read_bytes())
    whole[3000:3400] = bytes(400)
    path.write_bytes(whole)
    data.load("folder", path=tmp_path)
    with pytest.raises(ValueError, match=r"a/0\.png: is not a readable image"):
        data.load("folder", path=tmp_path, full=True)


def test_the_list_of_faults_is_bounded(tmp_path):
    for k in range(30):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / f"{k:02d}.png").write_bytes(b"x")
    with pytest.raises(data.DataFaults) as caught:
        data.load("folder", path=tmp_path)
    assert len(caught.value.faults) == 30 and str(caught.value).endswith("and 10 more in the data")


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_the_depth_of_grey_is_asked_for_where_images_would_be_black(bits, tmp_path):
    for k in range(4):
        folder = tmp_path / "ab"[k % 2]
        folder.mkdir(exist_ok=True)
        image = Image.new("I;16", (2, 2), k)
        image.putpixel((1, 1), 2**bits - 1 - k)
        image.save(folder / f"{k}.png")
    if bits <= 12:
        with pytest.raises(ValueError, match=rf"values up to {2**bits - 1:,} of 65,535 .+: set grey_bits={bits}, or"):
            data.load("folder", path=tmp_path)
        assert data.load("folder", path=tmp_path, grey_bits=16).train.image(0).max() <= 16
    else:
        assert bool(data.load("folder", path=tmp_path).notes) == (bits == 14)
    loaded = data.load("folder", path=tmp_path, grey_bits=bits)
    assert max(loaded.train.image(k).max() for k in range(2)) >= 250


# ---------------------------------------------------------------- the same image on both sides


def test_test_images_that_are_training_images_are_counted(tmp_path):
    parts(tmp_path, "train", "test")
    assert data.load("folder", path=tmp_path).notes == ()
    for k in range(2):
        picture(tmp_path / "test" / "b" / f"{k}.png", value=1)  # the content of train/*/1.png
    (note,) = data.load("folder", path=tmp_path).notes
    assert note.startswith("2 of 4 test images are also training images, byte for byte (test/b/0.png is train/a/1.png")


def test_the_same_for_images_in_memory():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 4, 4), dtype=np.uint8)
    train, test = ImageArray(pixels[:4], [0] * 4), ImageArray(pixels[3:], [0] * 3)
    assert duplicates.note(train, test)[0].startswith(
        "1 of 3 test images is also a training image, byte for byte (test image 0 is training image 3)"
    )
    assert duplicates.note(train, ImageArray(pixels[4:], [0] * 2)) == []


def test_several_folders_follow_each_other(tmp_path):
    one, two = two_parts(tmp_path / "one", ["b", "d"]), two_parts(tmp_path / "two", ["a", "c"])
    alone, both = data.load("folder", path=one), data.load("folder", path=(one, two))
    assert both.class_names == data.class_names("folder", path=(one, two)) == ["b", "d", "a", "c"]
    assert both.train.paths[:4] == alone.train.paths and both.test.paths[:4] == alone.test.paths
    assert both.train.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert data.is_absent("folder", path=(one, tmp_path / "three")) and not data.is_absent("folder", path=(one, two))
    two_parts(tmp_path / "again", ["d", "e"])
    assert "class d is in" in (data.missing("folder", path=(one, tmp_path / "again")) or "")
    picture(tmp_path / "whole" / "f" / "1.png")
    picture(tmp_path / "whole" / "f" / "2.png")
    with pytest.raises(ValueError, match="whole has no test images of its classes and another folder has; split all"):
        data.load("folder", path=(one, tmp_path / "whole"))
