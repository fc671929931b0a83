"""Class orders: as a list, checked, and the extreme ones of the stress test."""

import json

import pytest
import torch

import main
from benchmarks import class_orders
from tests.helpers.runs import tiny_experiment
from tests.helpers.toy import toy_stream


def test_chains_follow_the_nearest_or_the_farthest_class_left():
    similarity = torch.tensor([
        [1.0, 0.9, 0.1, 0.5],
        [0.9, 1.0, 0.4, 0.2],
        [0.1, 0.4, 1.0, 0.3],
        [0.5, 0.2, 0.3, 1.0],
    ])  # fmt: skip
    assert class_orders.chain(similarity, True) == [0, 1, 2, 3]  # 0-1 is the nearest pair; of 2 and 3, 2 is nearer to 1
    assert class_orders.chain(similarity, False) == [0, 2, 3, 1]


def test_a_given_order_is_taken(tmp_path, monkeypatch):
    assert toy_stream(class_order=[5, 4, 3, 2, 1, 0]).order == [5, 4, 3, 2, 1, 0]
    with pytest.raises(ValueError, match=r"each of the 6 classes 0\.\.5 is expected once"):
        toy_stream(class_order=[0, 1])
    order = [9, 1, 2, 3, 4, 5, 6, 7, 8, 0]
    run = [*tiny_experiment("simplecil", tmp_path, monkeypatch, class_order=order), "--out", str(tmp_path / "logs")]
    assert main.main(run) == 0
    (results,) = tmp_path.glob("logs/simplecil/*/seed_3/results.json")
    result = json.loads(results.read_text())
    assert result["class_order"] == order and result["task_classes"] == [order[:5], order[5:]]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"class_order": [0, 1, 1]}, "class_order: each class number 0..n-1 is expected once"),
        ({"class_order": [0, 1, 2]}, "class_order: has 3 classes, digits has 10"),
        ({"class_order": list(range(10)), "class_order_seed": 1}, "class_order_seed: has no effect beside class_order"),
        ({"class_order": list(range(10)), "shuffle": False}, "shuffle: has no effect beside class_order"),
        ({"class_order_seed": 1, "shuffle": False}, "class_order_seed: has no effect beside shuffle false"),
    ],
)
def test_an_order_that_makes_no_sense_is_refused(changes, fault, tmp_path, monkeypatch, capsys):
    assert main.main([*tiny_experiment("simplecil", tmp_path, monkeypatch, **changes), "--check"]) == 2
    assert fault in capsys.readouterr().err


@pytest.mark.parametrize(
    "keys", [{}, {"shuffle": False}, {"class_order_seed": 3}], ids=["shuffled", "natural", "seeded"]
)
def test_the_stress_test_is_a_sweep_that_checks(keys, tmp_path, monkeypatch, capsys):
    _, path = tiny_experiment("simplecil", tmp_path, monkeypatch, **keys)
    out = tmp_path / "orders.json"
    monkeypatch.setattr("sys.argv", ["class_orders", path, "--out", str(out), "--random", "4"])
    class_orders.main()
    arms = json.loads(out.read_text())["sweep"]
    assert [arm["prefix"] for arm in arms] == ["random order 4", "similar neighbours", "dissimilar neighbours"]
    assert sorted(arms[1]["class_order"]) == sorted(arms[2]["class_order"]) == list(range(10))
    assert arms[1]["class_order"] != arms[2]["class_order"]
    assert main.main(["--config", str(out), "--check"]) == 0
    assert "3 cells of 1 seed: 3 runs" in capsys.readouterr().out
