"""benchmarks/published.py end to end on generated folders in the form of CIFAR-100 and ImageNet-R, with a tiny ViT."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import published
from utils.data import cifar
from utils.report import page


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The two sets under one data root: two training images and a test image of each class."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    for part, each in (("train", 2), ("test", 1)):
        records = rng.integers(0, 256, (100 * each, 3074), np.uint8)
        records[:, 1] = np.repeat(np.arange(100), each)
        records.tofile(folder / f"{part}.bin")
    (folder / "fine_label_names.txt").write_text("\n".join(f"class{k}" for k in range(100)))
    monkeypatch.setattr(cifar, "TRAIN_IMAGES", 200)
    monkeypatch.setattr(cifar, "TEST_IMAGES", 100)
    for part, each in (("train", 2), ("test", 1)):
        for k in range(200):
            (tmp_path / "imagenet-r" / part / f"n{k:03}").mkdir(parents=True)
            for n in range(each):
                image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
                image.save(tmp_path / "imagenet-r" / part / f"n{k:03}" / f"{n}.png")
    return tmp_path


def test_published_numbers_have_sources():
    rows = json.loads(published.NUMBERS.read_text())["numbers"]
    assert {row["method"] for row in rows} == set(published.METHODS) and {row["set"] for row in rows} == set(
        published.SETS
    )
    for row in rows:
        assert row["source"] and row["weights"] and 50 < row["last"] < (row["average"] or 100) < 100.1
    for name in published.SETS:
        for method in published.METHODS:
            assert (published.ROOT / "exps" / f"{method}_{name}.json").is_file()


def test_the_table():
    rows = [{"set": "cifar", "method": "sema", "last": 86.98, "average": 91.37, "weights": "W", "source": "S | T"}]
    run = {"set": "cifar", "method": "sema", "average": 91.0}
    lines = published.table([run | {"last": 86.0}, run | {"last": 88.0}], rows, ["cifar"], same=True).split("\n")
    assert lines[5] == "| CIFAR-100 | `sema` | 86.98 | 91.37 | 87.00 ± 1.41 | 91.00 ± 0.00 | +0.02 | 2 | S \\| T; W |"
    assert lines[2] == "| CIFAR-100 | `simplecil` | - | - | not run | not run | - | 0 | no number is published |"
    assert "| - | 2 | S" in published.table([run | {"last": 86.0}] * 2, rows, ["cifar"], same=False)
    assert published.comparable(["seed=[1]", "device=cpu"]) and not published.comparable(["seed=1", "epochs=1"])


def test_both_sets_and_all_methods_end_to_end(root, monkeypatch, capsys):
    """Runs over a ViT of one block; what is finished is not run again."""
    monkeypatch.setattr(page, "write_report", lambda *args, **options: None)
    out = root / "out"
    short = ["simplecil:eval_batch_size=99", "ranpac:tuned_epoch=1", "ranpac:M=20", "slca:epochs=1", "slca:ca_epochs=1"]
    short += [
        "sema:func_epoch=1",
        "sema:rd_epoch=1",
        "sema:rd_dim=4",
        "sema:adapt_start_layer=0",
        "sema:adapt_end_layer=0",
    ]
    for method in ("nested_lora", "moe_parallel"):
        short += [f"{method}:epochs=1", f"{method}:head_projection_dim=20"]
        short += [f"{method}:adapt_start_layer=0", f"{method}:adapt_end_layer=0"]
    shared = ["image_size=16", "backbone_type=vit_tiny_patch16_224", "backbone_weights=random", "backbone_depth=1"]
    shared += ["init_cls=100", "increment=100", "device=cpu", "batch_size=128"]
    words = [
        "--seeds",
        "3",
        "--data-root",
        str(root),
        "--out",
        str(out),
        *(w for c in (*shared, *short) for w in ("--set", c)),
    ]
    assert published.main([*words, "--sets", "cifar"]) == 0
    first = {p: p.stat().st_mtime_ns for p in out.rglob("results.json")}
    assert len(first) == 6 and "| ImageNet-R |" not in (out / "published.md").read_text()
    capsys.readouterr()
    assert published.main([*words, "--methods", "simplecil", "slca"]) == 0
    assert capsys.readouterr().out.count("is finished") == 2  # those on CIFAR-100
    assert {p: p.stat().st_mtime_ns for p in first} == first and len([*out.rglob("results.json")]) == 8
    runs = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    assert [(run["set"], run["method"], len(run["top1_curve"])) for run in runs] == [
        *[("cifar", "simplecil", 1), ("cifar", "slca", 1), ("inr_10task", "simplecil", 2), ("inr_10task", "slca", 2)],
    ]
    for run in runs:
        card = json.loads((out / "cards" / f"{run['method']}_{run['set']}.json").read_text())
        assert card["settings"] == run["settings"] and card["top1_curve"] == {str(run["seed"]): run["top1_curve"]}
        assert card["weights"] == run["weights"] and run["last"] == run["top1_curve"][-1]
    assert len([*(out / "cards").iterdir()]) == 8
    text = (out / "published.md").read_text()
    assert "These runs are not the published experiments" in text and "`image_size=16`" in text
    row = next(line for line in text.splitlines() if line.startswith("| ImageNet-R | `slca`"))
    assert row.startswith(
        f"| ImageNet-R | `slca` | 77.00 | 81.17 | {runs[3]['last']:.2f} | {runs[3]['average']:.2f} | - | 1 |"
    )
