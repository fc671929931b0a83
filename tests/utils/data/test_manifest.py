"""The manifest of a data set: cheap, exact, and the contents of its files compared when they are read."""

import os

import numpy as np
import pytest
import torch

from tests.helpers.toy import toy_dataset
from utils.data import manifest
from utils.data.dataset import Dataset
from utils.data.images import ImageFiles
from utils.data.tasks import TaskStream


def files(tmp_path, count=6):
    """A data set of `count` training and two test images of two classes; every file has the same size."""
    from PIL import Image

    sets = []
    tmp_path.mkdir(exist_ok=True)
    for split, number in (("train", count), ("test", 2)):
        (tmp_path / split).mkdir(exist_ok=True)
        paths = [tmp_path / split / f"{i}.bmp" for i in range(number)]
        for i, path in enumerate(paths):
            if not path.exists():
                Image.new("RGB", (8, 8), (20 * i, 5, len(split))).save(path)
        sets.append(ImageFiles(paths, [i % 2 for i in range(number)]))
    return Dataset("folder", ["a", "b\udce9"], *sets, "small")


def test_it_comes_back_and_names_no_place(tmp_path):
    first = manifest.of(files(tmp_path / "x"))
    manifest.write(tmp_path / "deep" / "files", first)
    again = manifest.read(tmp_path / "deep" / "files")
    assert (again.digest, again.stamp, again.root, again.names) == (first.digest, first.stamp, first.root, first.names)
    assert first.names[0] == os.path.join("train", "0.bmp") and first.place(0) == str(
        tmp_path / "x" / "train" / "0.bmp"
    )
    os.rename(tmp_path / "x", tmp_path / "y")
    moved = manifest.of(files(tmp_path / "y"))
    assert moved.digest == first.digest and moved.stamp == first.stamp and moved.root != first.root
    content = bytearray((tmp_path / "deep" / "files").read_bytes())
    content[-3] ^= 1
    for damaged in (bytes(content), b"", bytes(content[:20])):
        (tmp_path / "deep" / "files").write_bytes(damaged)
        assert manifest.read(tmp_path / "deep" / "files") is None
    assert manifest.read(tmp_path / "absent") is None


def test_images_in_memory_are_digested_whole():
    one, same = toy_dataset(), toy_dataset()
    assert manifest.of(one).digest == manifest.of(same).digest == manifest.of(one).stamp
    same.test.images[-1, 0, 0, 0] ^= 1
    assert manifest.of(one).digest != manifest.of(same).digest
    same.test.images[-1, 0, 0, 0] ^= 1
    same.train.labels[0] = 1 - same.train.labels[0]
    assert manifest.of(one).digest != manifest.of(same).digest


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("ab", "ab", ""),
        ("ab", "ba", "the same 2 classes come in another order"),
        ("ab", "ac", "class 'b' is now 'c', or was replaced by it (2 classes)"),
        ("ab", "abcdef", "added 'c', 'd', 'e' and 1 more (2 classes then, 6 now)"),
        ("abc", "xc", "added 'x' and removed 'a', 'b' (3 classes then, 2 now)"),
        ("a", ["a\x1b"], "class 'a' is now 'a\\x1b', or was replaced by it (1 classes)"),
    ],
)
def test_classes_that_changed_are_named(old, new, text):
    assert manifest.classes_differ(list(old), list(new)) == text


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_is_compared_when_it_is_first_read_also_by_loader_processes(workers, tmp_path):
    def passed(known=None):
        dataset = files(tmp_path)
        contents = manifest.Contents(manifest.of(dataset), known)
        contents.watch(dataset)
        stream = TaskStream(dataset, init_cls=2, increment=1, seed=1, image_size=8, num_workers=workers, shuffle=False)
        for _ in range(2):  # the second pass digests nothing
            pixels = torch.cat([images for images, *_ in stream.task(0).train.batches(2, augment=False, shuffle=False)])
        return contents, pixels

    plain = TaskStream(files(tmp_path), init_cls=2, increment=1, seed=1, image_size=8, shuffle=False).task(0).train
    contents, pixels = passed()
    assert torch.equal(pixels, next(iter(plain.batches(6, augment=False, shuffle=False)))[0])
    known = contents.known().copy()
    assert (known[:6] != 0).all() and (known[6:] == 0).all()  # the test images were not read
    assert contents.news()[0] == list(range(6)) and contents.news() == ([], [])
    manifest.write_contents(tmp_path / "contents", known)
    assert np.array_equal(manifest.read_contents(tmp_path / "contents"), known)
    whole = contents.complete()
    assert passed(known)[0].complete() == whole
    path = tmp_path / "train" / "3.bmp"
    facts = os.stat(path)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # the manifest cannot see it
    with pytest.raises(ValueError, match=r"3\.bmp: the image has another content than when this run read it first"):
        passed(known)


def test_an_image_that_changes_while_the_run_goes_on_is_noticed(tmp_path):
    dataset = files(tmp_path)
    contents = manifest.Contents(manifest.of(dataset))
    contents.watch(dataset)
    first = dataset.train.image(2)
    assert torch.equal(dataset.train.image(2), first)
    (tmp_path / "train" / "2.bmp").write_bytes((tmp_path / "train" / "3.bmp").read_bytes())
    with pytest.raises(manifest.Changed, match="--resume never"):
        dataset.train.image(2)
    (tmp_path / "train" / "4.bmp").write_bytes(b"no image")
    for _ in range(2):  # a damaged file does not count as read
        with pytest.raises(ValueError, match="is not a readable image"):
            dataset.train.image(4)
    assert contents.known()[4] == 0
    (tmp_path / "train" / "4.bmp").unlink()
    with pytest.raises(FileNotFoundError, match="the image is gone"):
        dataset.train.image(4)
