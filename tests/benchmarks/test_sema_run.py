"""The plain SEMA that the whole run is timed against learns what the shipped learner learns."""

import pytest
import torch

from benchmarks import plain_sema, sema_run
from models.learner.start_values import SeededInit
from tests.helpers.toy import toy_backbone, toy_settings, toy_stream


@pytest.mark.parametrize(
    ("optimizer", "plan"), [("sgd", None), ("adam", None), ("sgd", {1: [2], 2: [1, 2]}), ("sgd", {})]
)
def test_the_plain_way_learns_the_same(optimizer, plan):
    cfg = toy_settings("sema", optimizer=optimizer, weight_decay=5e-4)
    double = [toy_backbone().double() for _ in range(2)]
    plain, expected = plain_sema.run(cfg, double[0], toy_stream(), SeededInit(1), plan)
    learner, outcome = sema_run.ours(cfg, double[1], toy_stream(), SeededInit(1), plan)
    assert outcome.losses == pytest.approx(expected.losses, rel=1e-9) and len(outcome.losses) >= 8
    assert outcome.accuracy == expected.accuracy and len(outcome.accuracy) == 3
    counts = [len(layer.adapters) for layer in plain.layers]
    assert learner.adapters_per_layer() == counts
    assert counts == {"None": [1, 3, 3], "{}": [1, 1, 1]}.get(str(plan), [1, 2, 3])
    same(plain.head, learner.head)
    for n, layer in enumerate(plain.layers):
        slot = learner._layer(n)
        for theirs, ours in ((layer.adapters, slot.adapters), (layer.descriptors, slot.descriptors)):
            same(theirs, ours)
        same(layer.columns, slot.router.columns)


def same(plain, ours):
    """Parameters and records, by name."""
    theirs, shipped = plain.state_dict(), ours.state_dict()
    assert theirs.keys() == shipped.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(shipped[name], value, rtol=1e-8, atol=1e-10)
