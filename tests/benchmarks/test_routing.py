"""The routing benchmarks compare what they say: equal networks, exact memory, honest verdicts, and a difference is seen."""

import re
import shutil

import pytest
import torch
from torch import nn

from backbone.experts import routed
from backbone.experts.router import one_expert
from benchmarks import routing, validate_routing
from tests.helpers.runs import few_digits, tiny_run
from tests.helpers.toy import toy_backbone, toy_stream
from utils import data

CPU = torch.device("cpu")
IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


# benchmarks.routing ---------------------------------------------------------------------------------------------------


def test_every_phase_and_count_is_measured_and_told():
    ks, rounds = [2, 4], 2
    rows = routing.measure(toy_backbone().vit, 2, ks, batch=2, rounds=rounds, device=CPU)
    assert [(row.phase, row.count) for row in rows] == [(p, k) for p in routing.PHASES for k in ks]
    for row in rows:
        assert [len(of_way) for of_way in row.seconds] == [rounds] * 3 and min(
            min(of_way) for of_way in row.seconds
        ) > 0
        assert min(row.peak) > 0
    forward, trained = rows[0], rows[2]
    assert trained.peak[2] > forward.peak[2]  # activations for the backward pass
    lines = routing.table(rows).split("\n")
    assert len(lines) == 2 + len(rows) and {line.count("|") for line in lines} == {12}
    assert len(routing.verdicts(rows)) == 2 * 3


def test_verdicts_follow_from_the_figures():
    # faster than N passes 8 / 2, 9 / 3 and 7 / 2 -> 3.5; over a single adapter 2 / 2, 3 / 2, 2 / 1 -> 1.5
    row = routing.Row("forward", 4, [[8.0, 9.0, 7.0], [2.0, 3.0, 2.0], [2.0, 2.0, 1.0]], [2000, 1040, 1000])
    assert (row.faster, row.slower, row.larger) == (3.5, 0.5, pytest.approx(0.04))
    assert [line.rpartition(": ")[2] for line in routing.verdicts([row])] == ["met", "NOT MET", "met"]
    assert routing.verdicts([routing.Row("forward", 2, row.seconds, row.peak)]) == []
    (cells,) = routing.table([row]).split("\n")[2:]
    assert "| forward | 4 | 8000.0 | 2000.0 | 2000.0 | 3.50x | +50.0 % |" in cells


def test_runs_take_turns_and_each_round_begins_with_another():
    called = []
    seconds = routing.interleaved([lambda n=n: called.append(n) for n in range(3)], 3, CPU)
    assert called == [0, 1, 2, 1, 2, 0, 2, 0, 1]
    assert [len(of_run) for of_run in seconds] == [3, 3, 3]


def test_peak_memory_is_exact_and_leaves_out_what_was_there():
    there = [torch.ones(10_000)]

    def run():
        first = torch.empty(1000)
        second = torch.empty(2000)  # 12,000 bytes of float32 together
        del first
        there.clear()
        return second, torch.empty(500)

    assert routing.peak_memory(run, CPU) == 12_000


def test_networks_that_are_compared_are_the_same_function():
    """In float64, as one network sums its experts' outputs otherwise than the others."""
    vit = toy_backbone().vit.double()
    experts = [[expert.double() for expert in layers] for layers in routing.make_experts(16, 2, 3)]
    singles = [routing.with_slots(vit, layers).double() for layers in experts]
    together, images = routing.routed_network(vit, experts).double(), IMAGES.double()
    with torch.no_grad():
        outputs = [single(images) for single in singles]
        for e, output in enumerate(outputs):
            one_hot = together(images, route=lambda x, e=e: [one_expert(x, 3, e).gates] * routing.LAYERS)
            torch.testing.assert_close(one_hot, output, rtol=1e-9, atol=1e-9)
        assert (outputs[0] - outputs[1]).abs().max() > 1e-3
        gates = together.router(torch.randn(2, 5, 16).double())[0]
    assert gates.std() > 1e-3  # not all alike
    assert all(single.vit is vit for single in [*singles, together])


def test_a_training_step_moves_the_networks_own_parts_alone():
    vit, experts = toy_backbone().vit.double(), routing.make_experts(16, 2, 2)
    experts = [[expert.double() for expert in layers] for layers in experts]
    single = routing.with_slots(vit, [routing.copy_of(e) for e in experts[0]]).double()
    lone, both = (routing.routed_network(vit, experts[:k]).double() for k in (1, 2))
    head, labels = torch.randn(16, routing.CLASSES).double(), torch.arange(4)
    before = {k: v.clone() for k, v in vit.state_dict().items()}
    columns = [c.clone() for r in routed.routers_of(both) for c in r.columns]
    losses = [routing.training(b, IMAGES.double(), labels, head)() for b in (single, lone, both)]
    # a router over one expert gives gate 1, so that this routed network takes the single adapter's step
    assert losses[0] == pytest.approx(losses[1], rel=1e-10) and losses[2] != pytest.approx(losses[0], rel=1e-6)
    for alone, slot, start in zip(single.slots.values(), routed.routed_layers(lone), experts[0], strict=True):
        for ours, theirs, old in zip(alone.parameters(), slot.parameters(), start.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
            assert not torch.equal(ours, old) and ours.grad is None
    moved = [c for r in routed.routers_of(both) for c in r.columns]
    assert all(not torch.equal(a, b) for a, b in zip(columns, moved, strict=True))
    assert all(torch.equal(v, before[k]) for k, v in vit.state_dict().items())


def test_the_command_prints_a_table_and_verdicts(monkeypatch, capsys):
    words = "--model vit_tiny_patch16_224 --image-size 32 --batch 1 --rounds 1 --ks 4 --rank 2 --device cpu"
    monkeypatch.setattr("sys.argv", ["routing", *words.split()])
    routing.main()
    printed = capsys.readouterr().out
    assert "vit_tiny_patch16_224 at 32 px, experts of rank 2 in the last 3 layers, batch 1" in printed
    assert len(re.findall(r"^\| (?:forward|training) \| 4 \|", printed, re.MULTILINE)) == 2
    assert len(re.findall(r"^- .*: (?:met|NOT MET)$", printed, re.MULTILINE)) == 6


# benchmarks.validate_routing ------------------------------------------------------------------------------------------

CHOICES = [
    ("dylora_moe", {}),
    ("dylora_moe", {"router_granularity": "sample", "top_k_experts": 1, "maturity_steps": 1}),
    ("dylora_moe", {"router_scope": "layer"}),
    ("dylora_moe", {"router_scope": "layer", "router_granularity": "sample"}),
    ("dylora_moe", {"use_moe_routing": False}),
    ("dylora_moe", {"lora_target": ["qkv", "proj", "fc1", "fc2"]}),
    ("dylora_moe", {"lora_target": ["fc1"], "router_scope": "layer", "router_granularity": "sample"}),
    ("sparse_moe", {"top_k_experts": 1}),
    ("sparse_moe", {"top_k_experts": 2, "router_granularity": "sample", "moe_dispatch": "loop"}),
    ("sparse_moe", {"fixed_routing": "uniform", "moe_dispatch": "dense"}),
]


@pytest.mark.parametrize(("method", "settings"), CHOICES, ids=str)
def test_one_pass_equals_the_loop_for_every_way_to_route(method, settings, toy_learner):
    spawning = (
        {"novelty_threshold_mode": "fixed", "novelty_threshold": 2.0, "novelty_confidence": 0.0}
        if method == "dylora_moe"
        else {}
    )
    learner, stream = toy_learner(method, init_lr=0.5, **spawning, **settings), toy_stream()
    for index in range(2):
        learner.begin_task()
        learner.learn(stream.task(index))
        learner.consolidate(stream.task(index))
    learner.eval()
    before = {k: v.clone() for k, v in learner.state_dict().items()}
    differences = validate_routing.compare(learner.backbone, IMAGES, torch.float64)
    count = 2 if method == "dylora_moe" else 3
    assert [name.split(":")[0] for name in differences] == ["layer 1", "layer 2", *["features"] * count]
    assert all(d.relative <= validate_routing.LIMIT for d in differences.values())
    assert all(torch.equal(v, before[k]) for k, v in learner.state_dict().items())  # on a copy
    assert "fixed_routing" in settings or all(
        getattr(s, "fixed", None) is None for s in learner.backbone.slots.values()
    )


def test_a_wrong_expert_or_gate_is_seen(toy_learner):
    """Every comparison answers to a change of one side alone."""
    learner, stream = toy_learner("sparse_moe", init_lr=0.5), toy_stream()
    learner.learn(stream.task(0))
    learner.eval()
    moe = learner.experts()[1]
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        y, loop = moe(x), validate_routing.by_loop(moe, (x,))
        assert validate_routing.difference(y, loop).relative < 1e-5
        moe.experts[1].up_proj.weight.mul_(1.01)
        assert validate_routing.difference(y, validate_routing.by_loop(moe, (x,))).relative > 1e-4
    assert validate_routing.difference(torch.tensor([1.0, -4.0]), torch.tensor([1.0, -5.0])) == (1.0, 0.2)
    assert validate_routing.difference(torch.zeros(2), torch.zeros(2)) == (0.0, 0.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        place, dataset = tmp_path_factory.mktemp("runs"), few_digits()
        folders = {m: tiny_run(m, place, patch)[0] for m in ("sparse_moe", "finetune")}
        folders["dylora_moe"] = tiny_run(
            "dylora_moe", place, patch, novelty_threshold_mode="fixed", novelty_threshold=2.0
        )[0]
        patch.setattr(data, "load", lambda *args, **options: dataset)
        yield folders


@pytest.mark.parametrize("method", validate_routing.METHODS)
def test_a_finished_run_is_validated(method, runs, capsys):
    assert validate_routing.main([str(runs[method]), "--images", "4", "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    assert f"{method} on digits after task 2 of 2: 2 experts in layers 3, 4, 5" in printed
    assert len(re.findall(r"^\| layer [345]: ", printed, re.MULTILINE)) == 3
    assert len(re.findall(r"^\| features: one-hot gates, network of expert [01] alone", printed, re.MULTILINE)) == 2
    assert "| 2 passes, one expert each |" in printed and "within 1e-10." in printed


@pytest.mark.parametrize("damage", [1 + 1e-8, float("nan")])
def test_a_pass_that_differs_ends_with_1(damage, runs, monkeypatch, capsys):
    right = routed.mixture
    monkeypatch.setattr(routed, "mixture", lambda *args: right(*args) * damage)
    assert validate_routing.main([str(runs["dylora_moe"]), "--images", "2", "--rounds", "1"]) == 1
    assert "ABOVE 1e-10" in capsys.readouterr().out


def test_what_cannot_be_validated_ends_with_2(runs, tmp_path, capsys):
    assert validate_routing.main([str(runs["finetune"])]) == 2
    assert "is a run of finetune; routed experts are those of dylora_moe and sparse_moe" in capsys.readouterr().err
    assert validate_routing.main([str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err
    bare = shutil.copytree(runs["sparse_moe"], tmp_path / "seed_3")
    shutil.rmtree(bare / "checkpoints")
    assert validate_routing.main([str(bare)]) == 2
    assert "the run has no whole checkpoint" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no layer of routed experts"):
        validate_routing.routed_slots(toy_backbone())


def test_the_experts_of_a_network_with_one_only_are_those_of_the_run():
    backbone = routing.routed_network(toy_backbone().vit, routing.make_experts(16, 2, 2))
    alone = validate_routing.with_only(backbone, 1)
    assert alone.vit is backbone.vit and alone.router is None and len(alone.slots) == 3
    for single, slot in zip(alone.slots.values(), routed.routed_layers(backbone), strict=True):
        assert isinstance(single, nn.Module) and single is not slot.adapters[1]
        assert torch.equal(single.up_proj.weight, slot.adapters[1].up_proj.weight)
    assert isinstance(backbone.slots["0"], routed.RoutedLayer)
