"""utils/data/torchvision_sets.py on small files in the published forms; and whether a split is the published one."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image

import main
from utils import data
from utils.data.dataset import DataFaults


def image(path, shade=0, size=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (shade, 0, 255 - shade)).save(path)


def idx(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    head = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    path.write_bytes(head + values.astype(np.uint8).tobytes())


def mnist_like(root, folder, names, classes, count=3):
    """`count` images of each class for training and one for test; the class is the grey value of the upper left corner."""
    for part, (images, labels), each in zip(("train", "test"), names, (count, 1), strict=True):
        of_class = np.repeat(np.arange(classes), each)
        pixels = np.zeros((len(of_class), 28, 28), np.uint8)
        pixels[:, 0, 0], pixels[:, 0, 1] = of_class + 1, 200 + (part == "test")
        idx(root / folder / "raw" / images, pixels)
        idx(root / folder / "raw" / labels, of_class)


MNIST_NAMES = [(f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte") for part in ("train", "t10k")]
EMNIST_NAMES = [
    (f"emnist-balanced-{part}-images-idx3-ubyte", f"emnist-balanced-{part}-labels-idx1-ubyte")
    for part in ("train", "test")
]


@pytest.mark.parametrize(
    ("name", "folder", "files", "classes", "first"),
    [
        ("mnist", "MNIST", MNIST_NAMES, 10, "0"),
        ("fashion_mnist", "FashionMNIST", MNIST_NAMES, 10, "T-shirt/top"),
        ("kmnist", "KMNIST", MNIST_NAMES, 10, "o"),
        ("emnist", "EMNIST", EMNIST_NAMES, 47, "0"),
    ],
)
def test_sets_in_the_form_of_mnist(name, folder, files, classes, first, tmp_path):
    mnist_like(tmp_path, folder, files, classes)
    loaded = data.load(name, root=tmp_path)
    assert len(loaded.class_names) == classes and loaded.class_names[0] == first
    assert loaded.train.labels.tolist() == sorted([*range(classes)] * 3) and loaded.test.labels.tolist() == [
        *range(classes)
    ]
    assert loaded.train.images.shape == (3 * classes, 3, 32, 32) and loaded.transforms == "small"
    assert torch.equal(loaded.train.images[:, 1, 2, 2], torch.from_numpy(loaded.train.labels + 1).to(torch.uint8))
    row, column = (3, 2) if name == "emnist" else (2, 3)  # EMNIST's files have rows and columns exchanged
    assert (loaded.train.images[:, :, row, column] == 200).all() and (
        loaded.test.images[:, :, row, column] == 201
    ).all()
    assert (loaded.train.images[:, :, :2] == 0).all() and not loaded.as_published
    train, test = data.DATASETS[name].counts
    expected = f"{3 * classes} training and {classes} test images here, {train:,} and {test:,} there"
    assert loaded.notes[-1].startswith(f"not the published split of {name}: {expected}")


def test_svhn(tmp_path, monkeypatch):
    parts = {}
    for part, count in (("train", 20), ("test", 10)):
        pixels = np.random.default_rng(count).integers(0, 256, (32, 32, 3, count), np.uint8)
        labels = np.arange(count) % 10 + 1  # the digit 0 has the label 10
        (tmp_path / "svhn").mkdir(exist_ok=True)
        scipy.io.savemat(tmp_path / "svhn" / f"{part}_32x32.mat", {"X": pixels, "y": labels[:, None].astype(np.uint8)})
        parts[part] = pixels
    with pytest.raises(
        ValueError, match=r"dataset svhn: its files under .+corrupted.+remove them and run `python main\.py"
    ):
        data.load("svhn", root=tmp_path)  # torchvision compares checksums
    splits = {part: ["", f"{part}_32x32.mat", None] for part in parts}
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", splits)
    loaded = data.load("svhn", root=tmp_path)
    assert loaded.train.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] * 2
    assert np.array_equal(loaded.test.images.numpy(), parts["test"].transpose(3, 2, 0, 1))
    assert loaded.class_names == [str(k) for k in range(10)]


def gtsrb(root):
    base = root / "gtsrb" / "GTSRB"
    rows = [{"Filename": f"{k:05}.ppm", "ClassId": 42 - k} for k in range(43)]
    for k in range(43):
        for n in range(2):
            image(base / "Training" / f"{k:05}" / f"{n}.ppm", shade=k + 100 * n)
        image(base / "Final_Test" / "Images" / f"{k:05}.ppm", shade=50 + k)
    with open(root / "gtsrb" / "GT-final_test.csv", "w", newline="") as file:
        table = csv.DictWriter(file, ["Filename", "ClassId"], delimiter=";")
        table.writeheader()
        table.writerows(rows)


def dtd(root):
    base = root / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for n, part in enumerate(("train", "val", "test")):
        names = [f"texture{k:02}/{part}{k}.jpg" for k in range(47)]
        for name in names:
            image(base / "images" / name, shade=n)
        (base / "labels" / f"{part}1.txt").write_text("\n".join(names) + "\n")


def flowers102(root):
    base = root / "flowers-102"
    for number in range(1, 307):
        image(base / "jpg" / f"image_{number:05}.jpg", shade=number % 256)
    numbers = np.arange(1, 307)
    scipy.io.savemat(base / "imagelabels.mat", {"labels": (numbers - 1) % 102 + 1})
    scipy.io.savemat(base / "setid.mat", {"trnid": numbers[:102], "valid": numbers[102:204], "tstid": numbers[204:]})


def oxford_pets(root):
    base = root / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for part in ("trainval", "test"):
        lines = [f"breed_{k:02}_{part} {k + 1} 1 1" for k in range(37)]
        (base / "annotations" / f"{part}.txt").write_text("\n".join(lines) + "\n")
        for line in lines:
            image(base / "images" / f"{line.split()[0]}.jpg", shade=len(part))


def food101(root):
    base = root / "food-101"
    (base / "meta").mkdir(parents=True)
    for part in ("train", "test"):
        lists = {f"dish{k:03}": [f"dish{k:03}/{part}{k}"] for k in range(101)}
        (base / "meta" / f"{part}.json").write_text(json.dumps(lists))
        for (name,) in lists.values():
            image(base / "images" / f"{name}.jpg", shade=len(part))


def stanford_cars(root):
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    names = np.array([f"Car {k}" for k in range(196)], dtype=object)
    scipy.io.savemat(base / "devkit" / "cars_meta.mat", {"class_names": names})
    for part, path in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = [(f"{k:05}.jpg", k + 1) for k in range(196)]
        table = np.array(rows, dtype=[("fname", object), ("class", object)])
        scipy.io.savemat(base / path, {"annotations": table})
        for name, k in rows:
            image(base / f"cars_{part}" / name, shade=k)


def fgvc_aircraft(root):
    base = root / "fgvc-aircraft-2013b" / "data"
    base.mkdir(parents=True)
    (base / "variants.txt").write_text("\n".join(f"Plane {k}" for k in range(100)) + "\n")
    for part, first in (("trainval", 0), ("test", 100)):
        lines = [f"{first + k:07} Plane {k}" for k in range(100)]
        (base / f"images_variant_{part}.txt").write_text("\n".join(lines) + "\n")
        for k in range(100):
            image(base / "images" / f"{first + k:07}.jpg", shade=k + first)


def eurosat(root):
    for k in range(10):
        for n in range(10):
            image(root / "eurosat" / "2750" / f"Land{k}" / f"Land{k}_{n}.jpg", shade=n)


def country211(root):
    for part in ("train", "valid", "test"):
        for k in range(211):
            image(root / "country211" / part / f"C{k:03}" / f"{part}.jpg", shade=len(part))


FILES = {  # name: (writer, first class, training and test images of each class)
    "gtsrb": (gtsrb, "0", 2, 1),
    "dtd": (dtd, "texture00", 2, 1),
    "flowers102": (flowers102, "pink primrose", 2, 1),
    "oxford_pets": (oxford_pets, "Breed 00", 1, 1),
    "food101": (food101, "dish000", 1, 1),
    "stanford_cars": (stanford_cars, "Car 0", 1, 1),
    "fgvc_aircraft": (fgvc_aircraft, "Plane 0", 1, 1),
    "eurosat": (eurosat, "Land0", 8, 2),
    "country211": (country211, "C000", 2, 1),
}


@pytest.mark.parametrize("name", FILES)
def test_sets_of_files(name, tmp_path, monkeypatch):
    write, first, train, test = FILES[name]
    write(tmp_path)
    if name == "flowers102":  # torchvision compares the checksums of the lists
        lists = {key: (file, None) for key, (file, _) in torchvision.datasets.Flowers102._file_dict.items()}
        monkeypatch.setattr(torchvision.datasets.Flowers102, "_file_dict", lists)
    info = data.DATASETS[name]
    assert data.missing(name, root=tmp_path) is None
    loaded = data.load(name, root=tmp_path)
    assert len(loaded.class_names) == info.num_classes and loaded.class_names[0] == first
    assert np.bincount(loaded.train.labels).tolist() == [train] * info.num_classes
    assert np.bincount(loaded.test.labels).tolist() == [test] * info.num_classes
    assert not set(loaded.train.paths) & set(loaded.test.paths)
    assert loaded.train.image(0).shape == (3, 8, 8)
    assert loaded.notes[-1].startswith(f"not the published split of {name}: ") and not loaded.as_published
    # a test image lies where its list says, under its label
    row = loaded.test.labels.tolist().index(3)
    expected = {"gtsrb": "00039.ppm", "flowers102": "image_00208.jpg", "stanford_cars": "00003.jpg"}
    expected |= {"fgvc_aircraft": "0000103.jpg", "dtd": "test3.jpg", "food101": "test3.jpg", "country211": "test.jpg"}
    assert loaded.test.paths[row].endswith(expected.get(name, ".jpg"))

    counts = info.num_classes * train, info.num_classes * test
    monkeypatch.setitem(data.DATASETS, name, replace(info, counts=counts))
    again = data.load(name, root=tmp_path)
    assert again.as_published and again.test.paths == loaded.test.paths
    gone = loaded.train.paths[1]
    (tmp_path / gone).unlink()
    if name == "country211":  # its class folders are the list, and this one is empty now
        with pytest.raises(ValueError, match=r"cannot be read .+C00"):
            data.load(name, root=tmp_path)
    elif name in ("gtsrb", "eurosat"):
        assert not data.load(name, root=tmp_path).as_published
    else:
        with pytest.raises(DataFaults, match=f"{gone}: cannot be read: No such file"):
            data.load(name, root=tmp_path)


def test_damaged_lists_and_labels_are_refused(tmp_path):
    mnist_like(tmp_path, "KMNIST", MNIST_NAMES, 11)
    with pytest.raises(
        ValueError, match=r"dataset kmnist: its files under .+ cannot be read \(labels 0\.\.10, expected 0\.\.9\)"
    ):
        data.load("kmnist", root=tmp_path)
    mnist_like(tmp_path, "KMNIST", MNIST_NAMES, 10)
    file = tmp_path / "KMNIST" / "raw" / MNIST_NAMES[0][0]
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"remove them and run `python main\.py --data fetch kmnist --data-root"):
        data.load("kmnist", root=tmp_path)
    food101(tmp_path)
    (tmp_path / "food-101" / "meta" / "test.json").write_text("{")
    with pytest.raises(ValueError, match=r"dataset food101: its files under .+ cannot be read \(Expecting"):
        data.load("food101", root=tmp_path)
    (tmp_path / "food-101" / "meta" / "test.json").write_text(json.dumps({"dish000": ["dish000/train0"]}))
    with pytest.raises(DataFaults, match="class dish001: no test image"):
        data.load("food101", root=tmp_path)


def test_a_missing_set_names_the_command_that_fetches_it(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        data.load("gtsrb", root=tmp_path)
    command = f"`python main.py --data fetch gtsrb --data-root {tmp_path}` fetches it (276 MB)"
    assert f"no {tmp_path}/gtsrb/GTSRB/Training and 2 more; {command}" in str(caught.value)
    cars = data.missing("stanford_cars", root=tmp_path)
    assert cars and "cannot be fetched: cars by make, model and year; no longer online" in cars
    assert "data_root" in str(data.missing("mnist"))


def test_check_says_whether_the_split_is_pilots(tmp_path, monkeypatch, capsys):
    for part, each in (("train", 2), ("test", 1)):
        for k in range(200):
            for n in range(each):
                image(
                    tmp_path / "cub" / part / f"{k:03}.bird" / f"{n}.png",
                    shade=k + (10 if part == "test" else n * 20),
                    size=4,
                )
    config = tmp_path / "x.json"
    settings = {
        "model_name": "simplecil",
        "dataset": "cub",
        "init_cls": 20,
        "increment": 20,
        "data_root": str(tmp_path),
    }
    config.write_text(json.dumps(settings))
    assert main.main(["--config", str(config), "--check"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "note: not the published split of cub: 400 training and 200 test images here, 9,430 and 2,358 there" in shown
    monkeypatch.setitem(data.DATASETS, "cub", replace(data.DATASETS["cub"], counts=(400, 200)))
    assert main.main(["--config", str(config), "--check"]) == 0
    shown = capsys.readouterr().out
    assert "not the published split" not in shown
    assert "  split           the published one by its numbers of images (LAMDA-PILOT's)" in shown
