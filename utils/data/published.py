"""The published data sets: facts, licences, numbers of images, and the files that `--data fetch` downloads.

Addresses and MD5 sums are those of torchvision 0.29; sizes are rounded, and only announce a download and check the room on
the disk. Numbers of images: of torchvision's sets as their authors state them, of LAMDA-PILOT's own splits the totals in
Zhou et al., IJCV 2024 (arXiv 2303.07338) and McDonnell et al., NeurIPS 2023 (arXiv 2307.02251), which state none by class.
"""

from __future__ import annotations

from utils.data.dataset import DatasetInfo, File

_KB, _MB = 10**3, 10**6
_PILOT = "train/<class> and test/<class> as LAMDA-PILOT packs it: https://github.com/LAMDA-CL/LAMDA-PILOT#datasets"
_TORONTO = "https://www.cs.toronto.edu/~kriz/"
_OXFORD = "https://www.robots.ox.ac.uk/~vgg/data/"
_IDX = (
    *(("train-images-idx3-ubyte", 47 * _MB), ("train-labels-idx1-ubyte", 60 * _KB)),
    *(("t10k-images-idx3-ubyte", 8 * _MB), ("t10k-labels-idx1-ubyte", 10 * _KB)),
)


def _idx_files(base: str, folder: str, sizes: tuple[int, ...], md5s: tuple[str, ...]) -> tuple[File, ...]:
    """The four files of MNIST and of the sets in its form."""
    return tuple(
        File(f"{base}{name}.gz", size, md5, {f"{name}.gz": f"{folder}/raw/{name}"}, unpacked)
        for (name, unpacked), size, md5 in zip(_IDX, sizes, md5s, strict=True)
    )


def _cifar(classes: int, md5: str, folder: str) -> tuple[File, ...]:
    return (File(f"{_TORONTO}cifar-{classes}-binary.tar.gz", 170 * _MB, md5, {folder: folder}, 185 * _MB),)


_CIFAR10 = _cifar(10, "c32a1d4ab5d03f1284b67883e8d87530", "cifar-10-batches-bin")
_CIFAR100 = _cifar(100, "03b5dce01913d631647c71ecec9e9cb8", "cifar-100-binary")
_CIFAR_PAGE = f"{_TORONTO}cifar.html"
_EMNIST = tuple(
    f"emnist-balanced-{part}-{kind}-ubyte" for part in ("train", "test") for kind in ("images-idx3", "labels-idx1")
)
_GTSRB = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/"
_RESEARCH = "for non-commercial research"


def _set(
    name: str,
    classes: int,
    size: int,
    what: str,
    counts: tuple[int, int],
    licence: str,
    reader: str,
    files: tuple[File, ...],
    needs: tuple[str, ...] = (),
) -> DatasetInfo:
    """A set that a class of torchvision lists. Digits and letters are not flipped, so small sets but CIFAR have `small`."""
    transforms = "imagenet" if not size else "small" if reader else "cifar"
    return DatasetInfo(
        name, classes, size, what, "torchvision", None, transforms, counts, licence, files, reader, needs
    )


def _pilot(name: str, classes: int, what: str, folder: str, counts: tuple[int, int], licence: str) -> DatasetInfo:
    return DatasetInfo(name, classes, 0, f"{what}, {_PILOT}", "folders", folder, "imagenet", counts, licence)


PUBLISHED = (
    _set("cifar10", 10, 32, f"CIFAR-10, {_CIFAR_PAGE}", (50_000, 10_000), "not stated", "", _CIFAR10),
    _set("cifar100", 100, 32, f"CIFAR-100, {_CIFAR_PAGE}", (50_000, 10_000), "not stated", "", _CIFAR100),
    DatasetInfo(
        *("cifar224", 100, 32, f"CIFAR-100 enlarged, {_CIFAR_PAGE}", "torchvision", None, "imagenet"),
        *((50_000, 10_000), "not stated", _CIFAR100),
    ),
    _set(
        *("mnist", 10, 32, "handwritten digits, https://yann.lecun.com/exdb/mnist/", (60_000, 10_000)),
        *("CC BY-SA 3.0", "MNIST"),
        _idx_files(
            *("https://ossci-datasets.s3.amazonaws.com/mnist/", "MNIST"),
            (9912 * _KB, 29 * _KB, 1649 * _KB, 5 * _KB),
            (
                *("f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432"),
                *("9fb629c4189551a2d022fa330f9573f3", "ec29112dd5afa0611ce80d1b7f02629c"),
            ),
        ),
    ),
    _set(
        *("fashion_mnist", 10, 32, "all of Fashion-MNIST, https://github.com/zalandoresearch/fashion-mnist"),
        *((60_000, 10_000), "MIT", "FashionMNIST"),
        _idx_files(
            *("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", "FashionMNIST"),
            (26422 * _KB, 30 * _KB, 4422 * _KB, 5 * _KB),
            (
                *("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe"),
                *("bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310"),
            ),
        ),
    ),
    _set(
        *("kmnist", 10, 32, "cursive Japanese letters, https://github.com/rois-codh/kmnist", (60_000, 10_000)),
        *("CC BY-SA 4.0", "KMNIST"),
        _idx_files(
            *("http://codh.rois.ac.jp/kmnist/dataset/kmnist/", "KMNIST"),
            (18165 * _KB, 30 * _KB, 3041 * _KB, 5 * _KB),
            (
                *("bdb82020997e1d708af4cf47b453dcf7", "e144d726b3acfaa3e44228e80efcd344"),
                *("5c965bf0a639b31b8f53240b1b52f4d7", "7320c461ea6c1c855c0b718fb2a4b134"),
            ),
        ),
    ),
    _set(
        *(
            "emnist",
            47,
            32,
            "handwritten letters and digits, split balanced, https://www.nist.gov/itl/products-and-services/emnist-dataset",
        ),
        *((112_800, 18_800), "of NIST, free to use", "EMNIST"),
        (
            File(
                *(
                    "https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip",
                    562 * _MB,
                    "58c8d27c78d21e728a6bc7b3cc06412e",
                ),
                {f"gzip/{name}.gz": f"EMNIST/raw/{name}" for name in _EMNIST},
                104 * _MB,
            ),
        ),
    ),
    _set(
        *("svhn", 10, 32, "house numbers, http://ufldl.stanford.edu/housenumbers/"),
        *((73_257, 26_032), _RESEARCH, "SVHN"),
        (
            File(
                *("http://ufldl.stanford.edu/housenumbers/train_32x32.mat", 182 * _MB),
                *("e26dedcc434d2e4c54c9b2d4a06d8373", {"train_32x32.mat": "svhn/train_32x32.mat"}),
            ),
            File(
                *("http://ufldl.stanford.edu/housenumbers/test_32x32.mat", 64 * _MB),
                *("eb5a983be6a315427106f1b164d9cef3", {"test_32x32.mat": "svhn/test_32x32.mat"}),
            ),
        ),
    ),
    _set(
        *("gtsrb", 43, 0, "German traffic signs, https://benchmark.ini.rub.de/", (26_640, 12_630)),
        *("not stated", "GTSRB"),
        (
            File(
                *(f"{_GTSRB}GTSRB-Training_fixed.zip", 187 * _MB, "513f3c79a4c5141765e10e952eaa2478"),
                {"GTSRB/Training": "gtsrb/GTSRB/Training"},
            ),
            File(
                *(f"{_GTSRB}GTSRB_Final_Test_Images.zip", 89 * _MB, "c7e4e6327067d32654124b0fe9e82185"),
                {"GTSRB/Final_Test": "gtsrb/GTSRB/Final_Test"},
            ),
            File(
                *(f"{_GTSRB}GTSRB_Final_Test_GT.zip", 100 * _KB, "fe31e9c9270bbcd7b84b7f21a9d9d9e5"),
                {"GT-final_test.csv": "gtsrb/GT-final_test.csv"},
                500 * _KB,
            ),
        ),
    ),
    _set(
        *(
            "dtd",
            47,
            0,
            f"textures, {_OXFORD}dtd/ (split 1; its val is trained on)",
            (3_760, 1_880),
            "for research",
            "DTD",
        ),
        (
            File(
                *(f"{_OXFORD}dtd/download/dtd-r1.0.1.tar.gz", 625 * _MB, "fff73e5086ae6bdbea199a49dfb8a4c1"),
                {"dtd": "dtd/dtd"},
            ),
        ),
    ),
    _set(
        *("flowers102", 102, 0, f"flowers, {_OXFORD}flowers/102/ (its val is trained on)", (2_040, 6_149)),
        *("not stated", "Flowers102"),
        (
            File(
                *(f"{_OXFORD}flowers/102/102flowers.tgz", 345 * _MB, "52808999861908f626f3c1f4e79d11fa"),
                {"jpg": "flowers-102/jpg"},
            ),
            *(
                File(f"{_OXFORD}flowers/102/{name}", size, md5, {name: f"flowers-102/{name}"})
                for name, size, md5 in (
                    ("imagelabels.mat", 502, "e0620be6f572b9609742df49c70aed4d"),
                    ("setid.mat", 15 * _KB, "a5357ecc9cb78c4bef273ce3793fc85c"),
                )
            ),
        ),
    ),
    _set(
        *(
            "oxford_pets",
            37,
            0,
            f"cats and dogs by breed, {_OXFORD}pets/",
            (3_680, 3_669),
            "CC BY-SA 4.0",
            "OxfordIIITPet",
        ),
        tuple(
            File(f"{_OXFORD}pets/data/{name}.tar.gz", size, md5, {name: f"oxford-iiit-pet/{name}"})
            for name, size, md5 in (
                ("images", 792 * _MB, "5c4f3ee8e5d25df40f4fd59a7f44e54c"),
                ("annotations", 19 * _MB, "95a8c909bbe2e81eed6a22bccdf3f68f"),
            )
        ),
    ),
    _set(
        *("food101", 101, 0, "dishes, https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/", (75_750, 25_250)),
        *("photographs of Foodspotting's users, for research", "Food101"),
        (
            File(
                *("http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz", 4_996 * _MB, "85eeb15f3717b99a5da872d97d918f87"),
                {"food-101": "food-101"},
            ),
        ),
    ),
    _set(
        "stanford_cars",
        196,
        0,
        "cars by make, model and year; no longer online, how to get it: https://github.com/pytorch/vision/issues/7545",
        (8_144, 8_041),
        _RESEARCH,
        "StanfordCars",
        (),
        (
            *("stanford_cars/devkit/cars_meta.mat", "stanford_cars/devkit/cars_train_annos.mat"),
            *("stanford_cars/cars_test_annos_withlabels.mat", "stanford_cars/cars_train", "stanford_cars/cars_test"),
        ),
    ),
    _set(
        *("fgvc_aircraft", 100, 0, f"aircraft by variant, {_OXFORD}fgvc-aircraft/ (its val is trained on)"),
        *((6_667, 3_333), _RESEARCH, "FGVCAircraft"),
        (
            File(
                *(f"{_OXFORD}fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz", 2_753 * _MB, None),
                {"fgvc-aircraft-2013b": "fgvc-aircraft-2013b"},
            ),
        ),
    ),
    _set(
        *(
            "eurosat",
            10,
            0,
            "satellite images, https://github.com/phelber/eurosat (no published split: a fifth of each class)",
        ),
        *((21_600, 5_400), "MIT", "EuroSAT"),
        (
            File(
                "https://huggingface.co/datasets/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip",
                *(94 * _MB, "c8fa014336c82ac7804f0398fcb19387", {"2750": "eurosat/2750"}),
            ),
        ),
    ),
    _set(
        *("country211", 211, 0),
        "photographs by country, https://github.com/openai/CLIP/blob/main/data/country211.md (its valid is trained on)",
        *((42_200, 21_100), "Creative Commons licences of the photographers", "Country211"),
        (
            File(
                *("https://openaipublic.azureedge.net/clip/data/country211.tgz", 11_300 * _MB),
                *("84988d7644798601126c29e9877aab6a", {"country211": "country211"}),
            ),
        ),
    ),
    _pilot("imagenetr", 200, "ImageNet-R", "imagenet-r", (24_000, 6_000), "MIT; the images are their makers'"),
    _pilot("imageneta", 200, "ImageNet-A", "imagenet-a", (5_981, 1_519), "MIT; the images are their makers'"),
    _pilot("vtab", 50, "five VTAB sets", "vtab", (1_796, 8_619), "those of its five sets"),
    _pilot("cub", 200, "CUB-200-2011", "cub", (9_430, 2_358), _RESEARCH),
    _pilot("omnibenchmark", 300, "OmniBenchmark", "omnibenchmark", (89_697, 5_985), _RESEARCH),
    _pilot("objectnet", 200, "ObjectNet", "objectnet", (26_509, 6_628), "its licence allows tests alone, not training"),
)
