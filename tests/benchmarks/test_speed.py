"""The speed benchmarks compare equal things and say what they measured."""

import argparse

import pytest
import torch

from benchmarks import competition, evaluation, gpu, kernel, measure, overhead
from benchmarks.measure import Measured, Way
from tests.helpers.toy import toy_backbone

CPU = torch.device("cpu")


@pytest.fixture
def results(monkeypatch):
    """What each way returned, by name, in place of being timed."""
    outputs = {}

    def once(ways, rounds, device, clock):
        for way in ways:
            way.prepare()
            outputs[way.name] = way.run()
        return []

    monkeypatch.setattr(measure, "compare", once)
    monkeypatch.setattr(measure, "random_vit", lambda model, size: toy_backbone().vit)
    return outputs


def sizes(**values):
    """The arguments of a benchmark over the toy ViT, one round."""
    toy = {"model": "toy", "image_size": 8, "layers": 2, "rounds": 1, "clock": "wall"}
    return argparse.Namespace(**toy, **values)


def test_each_way_runs_once_a_round_after_its_preparation_and_ratios_are_by_round(monkeypatch):
    done = []
    ways = [Way(n, lambda n=n: done.append(n), lambda n=n: done.append(n.upper())) for n in "ab"]
    plain, ours = measure.compare(ways, 2, CPU, "wall")
    assert "".join(done) == "AaAaBbBbAaBbBbAa"  # two to warm up, one of them for the memory
    assert len(plain.seconds) == len(ours.seconds) == 2
    first, second = Measured("loop", [8.0, 9.0, 7.0], 2**20), Measured("kernel", [2.0, 3.0, 2.0], 2**21)
    assert second.faster(first) == 3.5
    lines = measure.table({"forward": [first, second]}).split("\n")[2:]
    assert lines == ["| forward | loop | 8000.0 | - | 1.00 |", "| forward | kernel | 2000.0 | 3.50x | 2.00 |"]
    assert measure.verdict("x", 3.5, 4).endswith("3.50x, at least 4x required: NOT MET")
    assert measure.verdict("x", 4.0, 4).endswith(": met")


def test_loop_and_kernel_agree(results):
    kernel.compare(2, 3, 8, 2, 4, 1, CPU, "wall")
    loop, ours = results["loop"], results["kernel"]  # of the phase that came last, the gradients
    assert len(loop) == 2 + 4 * 4
    for a, b in zip(loop, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_network_with_adapters_is_one_network_twice(results):
    overhead.compare(sizes(batch=2, rank=2, count=4), CPU)
    bare, ours, whole = results.values()
    torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-5)
    assert (bare - ours).abs().max() > 1e-4


def test_all_ways_of_competition_take_the_same_step(results):
    competition.compare(sizes(batch=2, rank=2, count=4), CPU)
    plain, ours, cached = results.values()
    assert ours == pytest.approx(plain, rel=1e-5) and cached == pytest.approx(plain, rel=1e-5)


def test_all_ways_of_evaluation_give_the_same_scores(results):
    evaluation.compare(sizes(tasks=4, images=3, count=3), CPU)
    counts = [[score.correct for score in scores] for scores, _ in results.values()]
    assert len(counts) == 3 and counts[0] == counts[1] == counts[2] and len(counts[0]) == 4


def test_the_gpu_benchmark_takes_its_steps_on_a_cpu(monkeypatch):
    monkeypatch.setattr(measure, "random_vit", lambda model, size: toy_backbone().vit)
    rows = gpu.throughput("toy", 8, 2, 3, 1, CPU, "fp32", 1e9)
    assert [name for name, *_ in rows] == ["bare frozen forward", "training, one adapter", "training, 3 competing"]
    assert all(speed > 0 and share > 0 for _, speed, share, _ in rows)
    a = torch.ones(4, 5)
    assert gpu.operations(lambda: a @ a.T) == 2 * 4 * 5 * 4
    vit = toy_backbone().vit
    for backbone, branches in gpu.networks(vit, 3, CPU).values():
        before = [p.detach().clone() for p in backbone.slots.parameters()]
        gpu.step(backbone, torch.rand(2, 3, 8, 8), branches)()
        assert any(not torch.equal(p, q) for p, q in zip(backbone.slots.parameters(), before, strict=True))
        assert all(p.grad is None for p in backbone.vit.parameters())
