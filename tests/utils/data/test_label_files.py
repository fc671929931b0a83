"""utils/data/label_files.py: labels from CSV files and lists of lines, every fault by its line."""

import pytest
from PIL import Image

from utils import data


@pytest.fixture
def images(tmp_path):
    """A folder with x/0.png .. x/7.png."""
    (tmp_path / "images" / "x").mkdir(parents=True)
    for k in range(8):
        Image.new("RGB", (2, 2), (k, 0, 0)).save(tmp_path / "images" / "x" / f"{k}.png")
    return tmp_path / "images"


def load(images, labels):
    return data.load("folder", path=images, labels=labels)


def rows(loaded):
    """[(number of the image, class name)] of each part."""
    return [
        [
            (int(path[-5]), loaded.class_names[label])
            for path, label in zip(part.paths, part.labels.tolist(), strict=True)
        ]
        for part in (loaded.train, loaded.test)
    ]


def test_a_csv_with_parts(images, tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text(
        "Split,filename,Label\ntrain,x/0.png,cat\nTRAINING,x/1.png,dog\n\ntest,x/2.png,dog\ntest,x/3.png,cat\nval,x/4.png,cat\n"
    )
    loaded = load(images, table)
    assert rows(loaded) == [[(0, "cat"), (1, "dog")], [(3, "cat"), (2, "dog")]]
    assert loaded.notes == ("the part val is not used (1 image), test is the test set",)
    assert data.count_classes("folder", path=images, labels=table) == 2
    assert data.missing("folder", path=images, labels=table) is None


def test_a_csv_without_parts_is_split_by_the_ratio(images, tmp_path):
    (tmp_path / "labels.tsv").write_text("path\tlabel\n" + "".join(f"x/{k}.png\t{k % 2}\n" for k in range(8)))
    loaded = load(images, tmp_path / "labels.tsv")
    assert (len(loaded.train), len(loaded.test), loaded.class_names) == (6, 2, ["0", "1"])


def test_lists_of_lines(images, tmp_path):
    (tmp_path / "train.txt").write_text("# path label\nx/0.png 10\nx/1.png 9\n")
    (tmp_path / "val.txt").write_text("x/2.png 9\nx/3.png 10\n")
    loaded = load(images, tmp_path)
    assert loaded.class_names == ["9", "10"]  # whole numbers in their order
    assert rows(loaded) == [[(1, "9"), (0, "10")], [(2, "9"), (3, "10")]]
    with pytest.raises(
        ValueError, match=r"has the training images alone, and val\.txt lies beside it; set data_split to the"
    ):
        load(images, tmp_path / "train.txt")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "file,class\nx/0.png,a\nx/9.png,b\nx/8.png,b\n", ["a.csv line 3: no image", "a.csv line 4: no image"]),
        ("a.csv", "path,label\nx/0.png,a\nx/0.png,b\nx/1.png,b\n", ['a.csv line 3: "x/0.png" stands in a.csv line 2 already']),
        ("a.csv", "path,label\nx/0.png\n,b\nx/1.png,\n", ["line 2: 1 cells", "line 3: no path", "line 4: no label"]),
        ("a.csv", "path,label,split\nx/0.png,a,tests\nx/1.png,a,\n", ['line 2: split "tests" is not known', "line 3: split"]),
        ("a.csv", "image;target\n", ["names no image"]),
        ("a.csv", "x/0.png,a\n", ["line 1 should name the columns path, label", "no column for path"]),
        ("a.csv", "path,label,split\nx/0.png,a,train\nx/1.png,b,test\n", ["image for 1 class of its test images: b"]),
        ("a.txt", "x/0.png a\nx/1.png\n", ["a.txt line 2: `path label` is expected"]),
        ("a.txt", "x/0.png a\nx/1.png a\nx/2.png b\n", ["class b has one image"]),
        ("a.json", "{}", ["should end in .csv .tsv .txt"]),
    ],
)  # fmt: skip
def test_every_fault_is_named_by_its_line(name, text, words, images, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as caught:
        load(images, tmp_path / name)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_missing_file_names_the_nearest(images, tmp_path):
    (tmp_path / "labels.csv").write_text("path,label\n")
    with pytest.raises(FileNotFoundError, match=r"lables\.csv: No such file or directory; did you mean 'labels\.csv'"):
        load(images, tmp_path / "lables.csv")
    assert "No such file" in data.missing("folder", path=images, labels=tmp_path / "lables.csv")
