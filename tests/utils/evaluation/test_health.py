"""Signs that something does not work: each shows at its threshold, not before, and is told once."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from utils.evaluation import health
from utils.run.log import RunLog


def epoch(task, loss, **other):
    return {"kind": "epoch", "task": task, "phase": "func", "epoch": 1, "loss": loss, **other}


def gates(task, gate, entropy=None, samples=(4, 4)):
    """A `gates` row of one layer and two classes with these mean gates."""
    of_class = [[math.log(len(gate)) if entropy is None else entropy]] * 2
    fields = {"layers": [7], "experts": list(range(len(gate))), "samples": list(samples), "entropy": of_class}
    return {"kind": "gates", "task": task, "gate": [[gate]] * 2, **fields}


def novelty(task, best, reason="similar", spawn=False):
    return {"kind": "novelty", "task": task, "best": best, "threshold": 0.1, "reason": reason, "spawn": spawn}


def test_a_loss_of_0_in_the_first_epoch():
    assert health.zero_loss([epoch(0, 1e-7)], 0, 2) == (
        "task 1, phase func: the loss is 0 in the first epoch, so nothing is learned from it; look at the labels and at what "
        'is masked, or set head to "ncm" or "ridge"'
    )
    one = "task 2, phase func: the task_loss is 0 in the first epoch, so nothing is learned from it; the task has one class"
    assert health.zero_loss([epoch(1, 0.3, task_loss=0.0)], 1, 1).startswith(one)
    assert health.zero_loss([epoch(0, 2e-7)], 0, 2) is None  # small, but a gradient
    assert health.zero_loss([epoch(0, 0.0)], 1, 2) is None  # another task
    assert health.zero_loss([epoch(0, 0.0, task_loss=0.7)], 0, 2) is None  # terms that cancel out


def test_gates_that_fall_when_experts_mature():
    mature, dense = {"kind": "mature", "expert": 0}, gates(0, [0.5, 0.5])
    text = health.fallen_gates([dense, mature, gates(1, [0.5, 0.0])], 1)
    assert text.startswith("after task 2 the gates of layer 7 add up to 0.50, and to 1.00 before")
    assert "about 1 / 2 where the router is undecided; set top_k_experts to 2" in text
    assert health.fallen_gates([dense, mature, gates(1, [0.7, 0.05])], 1) is not None  # 0.75
    assert health.fallen_gates([dense, mature, gates(1, [0.76, 0.0])], 1) is None  # a sure router
    assert health.fallen_gates([dense, gates(1, [0.5, 0.0])], 1) is None  # top-1 from the start
    assert health.fallen_gates([mature, dense], 1) is None and health.fallen_gates([mature], 0) is None
    # within the first task: the first epoch was dense, and after it an expert was mature
    use = {"kind": "experts", "task": 0, "epoch": 1, "layer": 7, "gate": [0.5, 0.5]}
    assert health.fallen_gates([use, mature, gates(0, [0.5, 0.0])], 0) is not None


def test_experts_that_were_never_added():
    first = {"kind": "novelty", "task": 0, "best": None, "spawn": True}
    text = health.no_expert_added([first, novelty(1, 0.9), novelty(2, 0.12, "uncertain")])
    assert text.startswith("no expert was added in 2 tasks after the first (decided by similar, uncertain)")
    assert "Nearest was task 3: similarity 0.120, threshold 0.100." in text
    assert health.no_expert_added([first, novelty(1, 0.9), novelty(2, 0.0, "novel", True)]) is None
    assert health.no_expert_added([first, novelty(1, 0.0, "full")]) is None  # no room was asked for
    assert health.no_expert_added([first]) is None and health.no_expert_added([]) is None


def test_adapters_that_were_never_added():
    def scan(task, *scores):
        return {"kind": "detect", "task": task, "layer": 3 + task, "scores": list(scores), "threshold": 2.0}

    text = health.no_adapter_added([scan(1, 1.4, 0.2), scan(2, 0.9), scan(3, None)])
    assert "Nearest was layer 5 in task 3: score 0.90, threshold 2.00. To add adapters, lower exp_threshold" in text
    assert health.no_adapter_added([scan(1, 1.4), {"kind": "expand", "task": 1}]) is None
    assert health.no_adapter_added([]) is None


def test_routers_that_stay_undecided():
    one, undecided, decided = gates(0, [1.0], 0.0), gates(1, [0.5, 0.5]), gates(2, [0.6, 0.4], 0.98 * math.log(2))
    text = health.undecided_routers([one, undecided, gates(2, [0.5, 0.5], 0.9901 * math.log(2))])
    assert "the entropy of their softmax was at least 99.0 % of log E" in text and "Raise router_lr" in text
    assert health.undecided_routers([one, undecided, decided]) is None
    assert health.undecided_routers([one]) is None  # a single expert has nothing to decide


def test_rows_of_the_head_with_unequal_norms():
    def after(*norms):
        return [
            {"kind": "head_norms", "task": 0, "norms": [9.0]},
            {"kind": "head_norms", "task": 1, "norms": list(norms)},
        ]

    assert "0.50 on average for the classes of the first task, 1.00 for those of the last" in health.unequal_rows(
        after(0.5, 3.0, 1.0)
    )
    assert "taken for classes of the newest task" in health.unequal_rows(after(1.0, 1.5))
    assert "taken for classes of the oldest task" in health.unequal_rows(after(1.5, 1.0))
    for fine in ([1.0, 1.49], [1.49, 1.0], [0.0, 1.0], [1.0]):
        assert health.unequal_rows(after(*fine)) is None
    assert health.unequal_rows([]) is None


def test_norms_of_the_heads_rows_by_task():
    head = nn.Linear(2, 4)
    head.weight.data = torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0], [9.0, 9.0]])
    learner = SimpleNamespace(head=head, statistics=None)
    assert health.head_norms(learner, [2, 1]) == [3.0, 10.0]  # the last row is of a class that did not come yet
    assert health.head_norms(SimpleNamespace(head=head, statistics=object()), [2, 1]) is None
    assert health.head_norms(SimpleNamespace(statistics=None), [2, 1]) is None


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_sign_is_told_once_and_not_if_the_settings_said_so(tmp_path, capsys, foreseen):
    cfg = SimpleNamespace(classes_in_loss=lambda sizes: sizes if foreseen else ())
    with RunLog(tmp_path) as log:
        learner = SimpleNamespace(cfg=cfg, log=log, head=None, statistics=None)
        for task in range(3):
            log.row("epoch", task=task, phase="func", epoch=1, epochs=2, loss=0.0)
            log.row("epoch", task=task, phase="func", epoch=2, epochs=2, loss=0.0)
            health.tell(learner, [1, 1, 1], task)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    about = [(row["task"], row["about"]) for row in rows if row["kind"] == "warning"]
    assert about == ([] if foreseen else [(0, "zero_loss")])
    assert capsys.readouterr().err.count("the loss is 0 in the first epoch") == len(about)
    assert [row["epoch"] for row in health.recall(tmp_path / "metrics.jsonl") if row["kind"] == "epoch"] == [1, 1, 1]
