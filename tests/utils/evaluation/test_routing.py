"""Which expert serves which class: means by class, lasting numbers, drift, controls, and that none of it changes a score."""

import math

import pytest
import torch

import models
from backbone.experts.router import Routing
from tests.helpers.toy import learn_and_score, toy_backbone, toy_settings, toy_stream
from utils.evaluation import routing, routing_controls
from utils.evaluation import scores as evaluation
from utils.process import parallel
from utils.report.results import load_rows
from utils.run import checkpoint
from utils.run.log import RunLog
from utils.run.provenance import Identity
from utils.run.record import RunRecord, results_json

CPU = torch.device("cpu")


def chosen(gates, experts):
    gates = torch.tensor(gates)
    return Routing(gates, torch.full_like(gates, 0.5), gates.log(), torch.tensor(experts))


# ---------------------------------------------------------------- means by class


def test_gates_by_class_are_means_over_tokens_and_images():
    found = routing.ClassGates([4, 5], classes=2)
    tokens = chosen([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.0, 1.0]], [[0.25, 0.75], [0.25, 0.75]]],
                    [[[0], [1]], [[1], [1]], [[1], [1]]])  # fmt: skip
    samples = chosen([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], [[0], [1], [0]])
    found.add([tokens, samples], torch.tensor([0, 1, 0]))
    row = found.row()
    assert row["layers"] == [4, 5] and row["samples"] == [2, 1]
    assert row["gate"] == [[[0.5, 0.5], [0.75, 0.25]], [[0.0, 1.0], [0.0, 1.0]]]
    assert row["share"] == [[[0.25, 0.75], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]]
    assert row["entropy"] == [[round(math.log(2), 4)] * 2] * 2


def test_the_batches_do_not_matter():
    torch.manual_seed(0)
    gates, labels = torch.rand(6, 5, 3).softmax(-1), torch.tensor([0, 1, 2, 2, 1, 0])
    whole = Routing(gates, gates, gates.log(), gates.argsort(dim=-1)[..., 1:])
    rows = []
    for parts in ([slice(0, 6)], [slice(0, 1), slice(1, 4), slice(4, 6)]):
        found = routing.ClassGates([0], classes=3)
        for part in parts:
            found.add([Routing(*(tensor[part] for tensor in whole))], labels[part])
        rows.append(found.row())
    assert rows[0] == rows[1]


# ---------------------------------------------------------------- lasting numbers and drift


def gates_row(task, experts, gate):
    return {"kind": "gates", "task": task, "experts": experts, "layers": [2], "gate": gate, "samples": [4] * len(gate)}


def merge_row(task, expert, into):
    return {"kind": "merge", "task": task, "expert": expert, "into": into}


def test_experts_keep_their_numbers_when_others_are_merged_away():
    assert routing.numbered([], 0, 2) == ([0, 1], {})
    rows = [gates_row(0, [0, 1], [])]
    assert routing.numbered(rows, 1, 3) == ([0, 1, 2], {})  # one was added
    rows += [gates_row(1, [0, 1, 2], []), merge_row(2, expert=0, into=3), merge_row(2, expert=2, into=0)]
    # 0 joins the new 3; of [1, 2, 3] then 3 joins 1, and with it what was 0
    assert routing.numbered(rows, 2, 2) == ([1, 2], {0: 1, 3: 1})
    assert routing.numbered([*rows, gates_row(2, [1, 4], [])], 3, 3) == ([1, 4, 5], {})  # a number is given once


def test_what_is_read_back_has_the_last_gates_and_of_older_ones_the_experts_alone(log):
    for task in range(3):
        log.row("epoch", task=task, loss=0.5, note="gates")
        log.row("gates", task=task, experts=[task, task + 1], gate=[[[0.5, 0.5]]])
        log.row("merge", task=task, expert=0, into=1)
    rows = routing.recall(log.folder / "metrics.jsonl", 3)
    assert [row["kind"] for row in rows] == ["gates", "merge"] * 3
    assert [row.get("gate") for row in rows if row["kind"] == "gates"] == [None, None, [[[0.5, 0.5]]]]
    whole = load_rows(log.folder / "metrics.jsonl")
    assert routing.numbered(rows, 3, 3) == routing.numbered(whole, 3, 3)
    assert routing.of_task(rows, "gates", 2) == routing.of_task(whole, "gates", 2)


def test_the_experts_of_a_task_include_those_merged_at_its_end():
    rows = [gates_row(0, [0, 1], []), gates_row(1, [1, 2], []), {"kind": "experts", "task": 1, "gate": [0.5, 0.3, 0.2]}]
    assert routing.numbers_in(rows, 1) == [0, 1, 2]
    assert routing.numbers_in(rows[2:], 1) == [0, 1, 2]  # a fixed routing has no gates rows
    assert routing.numbers_in([{"kind": "experts", "task": 0, "gate": [1.0]}], 0) == [0]


def test_drift_is_the_total_variation_of_the_mean_gates():
    before = gates_row(0, [0, 1], [[[1.0, 0.0]], [[0.5, 0.5]]])
    after = gates_row(1, [0, 1, 2], [[[0.5, 0.0, 0.5]], [[0.25, 0.75, 0.0]], [[0.0, 0.0, 1.0]]])
    row = routing.drift(before, after, {})
    assert row["distance"] == [[0.5], [0.25]] and row["mean"] == [0.375]
    assert row["before"] == [[0], [0]] and row["after"] == [[0], [1]]
    assert row["changed"] == [1]  # a tie is no change
    assert (row["added"], row["merged"], row["layers"]) == ([2], [], [2])
    assert routing.in_words(row) == (
        "routing of 2 old classes moved by 0.375 (0 not at all, 1 completely), most in layer 2 with 0.375; "
        "in 1 of 2 cases (class and layer) another expert serves now; expert 2 is new"
    )


def test_a_merged_expert_counts_as_the_one_it_joined():
    before = gates_row(3, [0, 1, 2], [[[0.5, 0.25, 0.25]], [[0.0, 1.0, 0.0]]])
    after = gates_row(4, [1, 2], [[[0.25, 0.75]], [[0.0, 1.0]], [[1.0, 0.0]]])
    row = routing.drift(before, after, {0: 2})
    assert row["distance"] == [[0.0], [1.0]] and row["merged"] == [[0, 2]]
    assert row["before"] == [[2], [1]] and row["after"] == [[2], [2]] and row["changed"] == [1]
    assert routing.in_words(row).endswith("expert 0 was merged into expert 2")


def test_gates_that_do_not_add_up_to_one_are_compared_by_their_parts():
    row = routing.drift(gates_row(0, [0, 1], [[[0.3, 0.1]]]), gates_row(1, [0, 1], [[[0.4, 0.4]]]), {})
    assert row["distance"] == [[0.25]]


# ---------------------------------------------------------------- whole runs


def record_of(learner, stream):
    classes = [[stream.order[c] for c in span] for span in evaluation.spans(stream.sizes)]
    return RunRecord(learner.cfg.model_name, "toy", 1, stream.order, classes)


def told(learner, kind):
    return [row for row in load_rows(learner.log.folder / "metrics.jsonl") if row["kind"] == kind]


def whole_run(learner, stream):
    record = record_of(learner, stream)
    for index in range(len(stream)):
        learn_and_score(learner, stream, index, record)
    return results_json(record)


RUNS = {
    "sparse": ("sparse_moe", {"init_lr": 0.5}),
    "sparse top-1 samples": ("sparse_moe", {"top_k_experts": 1, "router_granularity": "sample", "init_lr": 0.5}),
    "spawning": ("dylora_moe", {"novelty_threshold_mode": "fixed", "novelty_threshold": 2.0}),
    "own routers": (
        "dylora_moe",
        {"novelty_threshold_mode": "fixed", "novelty_threshold": 2.0, "router_scope": "layer", "top_k_experts": 1},
    ),
    "linear layers": (
        "dylora_moe",
        {"novelty_threshold_mode": "fixed", "novelty_threshold": 2.0, "lora_target": ("qkv", "fc1")},
    ),
    "ridge": ("sparse_moe", {"head": "ridge"}),
}
every_run = pytest.mark.parametrize(("method", "keys"), RUNS.values(), ids=RUNS)


@every_run
def test_scores_are_bit_equal_and_each_image_passes_once(method, keys, toy_learner):
    stream, learner = toy_stream(), toy_learner(method, routing_controls=False, **keys)
    record = record_of(learner, stream)
    for index in range(2):
        learn_and_score(learner, stream, index, record)
    real, calls = learner.backbone.forward, []
    learner.backbone.forward = lambda images, *rest: calls.append(len(images)) or real(images, *rest)
    plain = evaluation.evaluate(learner, stream, 1, CPU)
    assert sum(calls) == 16
    gates = routing_controls.gates_of(learner, stream, 1)
    assert evaluation.evaluate(learner, stream, 1, CPU, gates=gates) == plain
    assert sum(calls) == 32
    images = torch.cat([batch[0] for task in (0, 1) for batch in stream.test(task).batches(3, augment=False)])
    with torch.inference_mode():
        scores = learner.logits(images)
        with learner.collecting():
            assert torch.equal(learner.logits(images), scores)


@every_run
def test_the_rows_of_a_run(method, keys, toy_learner):
    stream, learner = toy_stream(), toy_learner(method, **keys)
    results = whole_run(learner, stream)
    gates, moves, (control,) = (told(learner, kind) for kind in ("gates", "routing_drift", "routing_controls"))
    assert [row["task"] for row in gates] == [0, 1, 2] and [row["task"] for row in moves] == [1, 2]
    assert [row["samples"] for row in gates] == [[4] * 2, [4] * 4, [4] * 6]
    grown = method == "dylora_moe"
    assert [row["experts"] for row in gates] == ([[0], [0, 1], [0, 1, 2]] if grown else [[0, 1, 2]] * 3)
    assert [row["added"] for row in moves] == ([[1], [2]] if grown else [[], []])
    for row in gates:
        assert row["layers"] == [1, 2] == learner.routed_layers()
        for by_layer in row["gate"]:
            for parts in by_layer:
                assert len(parts) == len(row["experts"]) and 0 < sum(parts) < 1.001
    last = gates[-1]
    for label in (0, 5):  # by hand, image after image
        task = stream.test(label // 2)
        own = [i for i, found in enumerate(task.labels.tolist()) if found == label]
        seen = []
        for images, *_ in task.subset(own).batches(1, augment=False, shuffle=False):
            with torch.inference_mode(), learner.collecting() as found:
                learner.logits(images)
            seen.append([r.gates.double().flatten(0, -2).mean(dim=0) for r in found])
        for layer in (0, 1):
            mean = torch.stack([one[layer] for one in seen]).mean(dim=0)
            assert last["gate"][label][layer] == pytest.approx(mean.tolist(), abs=6e-5)
    # the controls
    assert results["test_evaluations"] == 3 + 3 + 2
    assert control["accuracy"]["learned"] == [a / 100 for a in results["accuracy_matrix"][-1]]
    assert control["accuracy"]["oracle"] == [max(column) for column in zip(*control["single"], strict=True)]
    assert [control["single"][e][t] for t, e in enumerate(control["oracle"])] == control["accuracy"]["oracle"]
    for how, values in [("uniform", control["accuracy"]["uniform"]), *enumerate(control["single"])]:
        for task in range(3):
            images, labels, _ = next(iter(stream.test(task).batches(100, augment=False, shuffle=False)))
            with torch.inference_mode(), learner.forced(how, seed=1):
                right = (learner.logits(images).argmax(1) == labels).float().mean()
            assert values[task] == pytest.approx(float(right))
    if given := learner.task_experts():
        assert control["accuracy"]["own"] == [control["single"][given[t]][t] for t in range(3)]
    else:
        assert "own" not in control["accuracy"]


def test_controls_change_no_result_and_can_be_left_out(toy_learner):
    with_controls, without = (
        whole_run(toy_learner("sparse_moe", routing_controls=on, init_lr=0.5), toy_stream()) for on in (True, False)
    )
    assert with_controls["accuracy_matrix"] == without["accuracy_matrix"]
    assert (with_controls["test_evaluations"], without["test_evaluations"]) == (8, 3)


def test_random_routing_draws_other_experts_on_each_rank(toy_learner, monkeypatch):
    """Each computes its own part of a batch: the first as a run alone does, the others not the same choices again."""
    learner, stream = toy_learner("sparse_moe", routing_controls=True), toy_stream()
    whole_run(learner, stream)
    scores, _ = evaluation.evaluate(learner, stream, 2, torch.device("cpu"))
    seeds = []
    real = learner.forced
    monkeypatch.setattr(learner, "forced", lambda how, seed: seeds.append(seed) or real(how, seed))
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank_seed", lambda rank=rank: ("rank", rank) if rank else ())
        routing_controls.routing_controls(learner, stream, [0, 1, 2], torch.device("cpu"), scores, 5)
    used = [set(seeds[5 * rank : 5 * rank + 5]) for rank in range(3)]
    assert used[0] == {5} and all(len(one) == 1 for one in used) and len(set.union(*used)) == 3


def test_merged_experts_keep_their_numbers_in_a_run(toy_learner):
    learner = toy_learner(
        "dylora_moe", novelty_threshold_mode="fixed", novelty_threshold=2.0, merge_below=0.999, num_experts=3
    )
    whole_run(learner, toy_stream())
    assert [(row["task"], row["expert"], row["into"]) for row in told(learner, "merge")] == [(2, 1, 0)]
    gates, moves, (control,) = (told(learner, kind) for kind in ("gates", "routing_drift", "routing_controls"))
    assert [row["experts"] for row in gates] == [[0], [0, 1], [0, 2]]
    assert [(row["added"], row["merged"]) for row in moves] == [([1], []), ([2], [[1, 0]])]
    assert {expert for by_layer in moves[1]["before"] for expert in by_layer} == {0}
    assert control["experts"] == [0, 2] and set(control["oracle"]) <= {0, 2}
    own = [control["single"][0][0], control["single"][0][1], control["single"][1][2]]  # task 2's expert is 0 by now
    assert control["accuracy"]["own"] == own


@pytest.mark.parametrize(
    ("method", "keys", "says"),
    [
        ("finetune", {}, False),
        ("sema", {}, False),
        ("sparse_moe", {"fixed_routing": "uniform"}, True),
        ("dylora_moe", {"use_moe_routing": False}, True),
    ],
)
def test_methods_without_a_learned_router_have_no_rows(method, keys, says, toy_learner):
    learner = toy_learner(method, epochs=1, func_epoch=1, rd_epoch=1, **keys)
    assert whole_run(learner, toy_stream())["test_evaluations"] == 3
    assert not any(told(learner, kind) for kind in ("gates", "routing_drift", "routing_controls"))
    assert ("the method learned no router" in (learner.log.folder / "run.log").read_text(encoding="utf-8")) == says


def test_one_expert_has_gates_and_no_controls(toy_learner):
    learner = toy_learner("sparse_moe", num_experts=1, top_k_experts=1, epochs=1)
    assert whole_run(learner, toy_stream())["test_evaluations"] == 3
    assert [row["mean"] for row in told(learner, "routing_drift")] == [[0.0, 0.0]] * 2
    assert "with one expert" in (learner.log.folder / "run.log").read_text(encoding="utf-8")


def test_a_resumed_run_writes_the_same_rows(tmp_path):
    cfg = toy_settings("dylora_moe", novelty_threshold_mode="fixed", novelty_threshold=2.0)

    def begin(log):
        return models.build(cfg, toy_backbone(), 6, 1, log)

    def timeless(folder):
        times = ("time", "seconds")
        return [{k: v for k, v in row.items() if k not in times} for row in load_rows(folder / "metrics.jsonl")]

    stream = toy_stream()
    for name, stops in (("whole", ()), ("cut", (1, 2))):
        folder = tmp_path / name
        record = None
        for end in (*stops, 3):
            with RunLog(folder, console=False) as log:
                learner = begin(log)
                saved = checkpoint.resume(folder, learner, log, Identity("hash"))
                record = RunRecord.from_dict(saved.record) if saved else record_of(learner, stream)
                log.truncate_rows(saved.rows if saved else 0)
                for index in range(len(record.correct), end):
                    learn_and_score(learner, stream, index, record)
                    checkpoint.save(folder, index, learner, record.to_dict(), log, Identity("hash"))
                log.row("gates", task=end, experts=[9], gate=[[[1.0]]])  # after the checkpoint: cut back
    rows = [[row for row in timeless(tmp_path / name) if row.get("experts") != [9]] for name in ("whole", "cut")]
    assert [row for row in rows[0] if "rout" in row["kind"]] and rows[0] == rows[1]


def test_a_lost_row_is_told(toy_learner):
    learner, stream = toy_learner("sparse_moe", epochs=1), toy_stream()
    record = record_of(learner, stream)
    learn_and_score(learner, stream, 0, record)
    learner.log.truncate_rows(0)
    learn_and_score(learner, stream, 1, record)
    assert told(learner, "routing_drift") == []
    assert "lost the `gates` row" in (learner.log.folder / "run.log").read_text(encoding="utf-8")
