"""SEMA's own rules and each named correction: that it does what it says, and that the default does not."""

import json

import pytest
import torch

from tests.helpers.toy import toy_backbone, toy_stream


def learned(learner, stream, tasks):
    for index in range(tasks):
        learner.begin_task()
        learner.learn(stream.task(index))
        learner.consolidate(stream.task(index))
    return learner


def rows(learner, kind):
    lines = (learner.log.folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def test_first_task_has_one_adapter_in_every_layer_and_parts_only_in_range(toy_learner):
    learner = toy_learner("sema")
    assert learner.adapters_per_layer() == [1, 1, 1]
    assert [len(learner._layer(n).descriptors) for n in range(3)] == [0, 1, 1]
    assert [len(learner._layer(n).router) for n in range(3)] == [0, 1, 1]


def test_a_threshold_out_of_reach_trains_the_head_alone(toy_learner):
    stream = toy_stream()
    learner = learned(toy_learner("sema", exp_threshold=1e9), stream, 1)
    before = {k: v.clone() for k, v in learner.own_state().items()}
    learner.begin_task()
    learner.learn(stream.task(1))
    changed = {k for k, v in learner.own_state().items() if not torch.equal(v, before[k])}
    assert changed == {"head.weight", "head.bias"}
    assert {id(p) for p in learner.head.parameters()} == set(learner.trained)


def test_an_expansion_leaves_old_adapters_descriptors_and_columns_untouched(toy_learner):
    stream = toy_stream()
    learner = learned(toy_learner("sema", exp_threshold=0.0), stream, 1)
    before = {k: v.clone() for k, v in learner.own_state().items() if not k.startswith("head")}
    learner.begin_task()
    learner.learn(stream.task(1))
    assert learner.adapters_per_layer() == [1, 2, 2]  # at most one a layer and task, lowest layer first
    assert [(r["layer"], r["adapter"]) for r in rows(learner, "expand")] == [(1, 1), (2, 1)]
    assert all(torch.equal(v, learner.own_state()[k]) for k, v in before.items())


def test_one_func_phase_and_one_rd_phase_for_each_expansion(toy_learner):
    stream = toy_stream()
    learner = learned(toy_learner("sema", exp_threshold=0.0, func_epoch=1, rd_epoch=1), stream, 2)
    assert [(r["task"], r["phase"]) for r in rows(learner, "epoch")] == [
        (0, "func"), (0, "rd"), (1, "func 1"), (1, "rd 1"), (1, "func 2"), (1, "rd 2"),
    ]  # fmt: skip


def test_unset_layers_are_the_backbones_last_three(toy_learner):
    assert toy_learner("sema", adapt_start_layer=None, adapt_end_layer=None).expandable == range(0, 3)
    assert toy_learner("sema", adapt_start_layer=None, adapt_end_layer=1).expandable == range(0, 2)
    assert toy_learner("sema", adapt_start_layer=2, adapt_end_layer=None).expandable == range(2, 3)


def test_rows_tell_expansions_with_the_scores_that_caused_them(toy_learner):
    stream = toy_stream()
    learner = learned(toy_learner("sema", exp_threshold=2.0, func_epoch=1, rd_epoch=1), stream, 1)
    scored(learner, [3.0, 9.0, 0.5, 1.0, 0.0, 0.0]).learn(stream.task(1))  # batches of scan 0, then of scan 1
    (grown,) = rows(learner, "expand")
    assert (grown["layer"], grown["scan"], grown["scores"]) == (1, 0, [3.0])
    told = [(r["scan"], r["layer"], r["scores"], r["expanded"]) for r in rows(learner, "detect")]
    assert told == [(0, 1, [3.0], True), (0, 2, [0.0], False), (1, 1, [1.0], False), (1, 2, [0.0], False)]


def test_scores_that_are_not_finite_are_logged_as_null_and_forgotten_by_the_next(toy_learner):
    stream = toy_stream()
    learner = learned(toy_learner("sema", exp_threshold=1e9, func_epoch=1, rd_epoch=1), stream, 1)
    scored(learner, [float("nan"), 0.5, float("nan")]).learn(stream.task(1))
    assert [r["scores"] for r in rows(learner, "detect")] == [[0.5], [0.0]]
    scored(learner, [float("inf"), 0.5, 0.5]).learn(stream.task(1))
    assert rows(learner, "expand")[-1]["scores"] == [None] and learner.adapters_per_layer() == [1, 2, 1]


def test_descriptors_train_without_gradients_through_the_network(toy_learner, monkeypatch):
    learner = toy_learner("sema")
    real = learner.backbone.mean_tokens

    def watched(images, tap):
        assert not torch.is_grad_enabled()
        return real(images, tap)

    monkeypatch.setattr(learner.backbone, "mean_tokens", watched)
    learned(learner, toy_stream(), 1)
    descriptor = learner._layer(1).descriptors[0]
    assert int(descriptor.count) == 30  # 2+2 epochs of 20 images fill a record of 30


def test_kept_views_train_descriptors_exactly_as_fresh_ones_while_they_last(toy_learner):
    """With as many views as epochs nothing is reused, so keeping them changes nothing; with one, every epoch sees it."""
    fresh, kept, one = (learned(toy_learner("sema", rd_views=n), toy_stream(), 1).own_state() for n in (0, 2, 1))
    assert all(torch.equal(v, kept[k]) for k, v in fresh.items())
    name = "backbone.slots.1.descriptors.0.encoder.weight"
    assert not torch.equal(fresh[name], one[name]) and torch.equal(fresh["head.weight"], one["head.weight"])


def test_router_column_of_the_first_adapter(toy_learner):
    def moved(flag):
        stream = toy_stream()
        learner = learned(
            toy_learner("sema", exp_threshold=0.0, weight_decay=0.0, train_first_router_column=flag), stream, 1
        )
        before = learner._layer(1).router.columns[0].weight.clone()
        learned_more = learner.learn(stream.task(1))
        assert learned_more is None
        return not torch.equal(before, learner._layer(1).router.columns[0].weight)

    assert not moved(False) and moved(True)


def scored(learner, scores):
    """Makes the scan see these per-batch scores, the same for layers 1 and 2."""
    feed = iter(scores)

    def fake(images):
        value = next(feed, 0.0)
        return {1: torch.tensor([value]), 2: torch.tensor([0.0])}

    learner._layer_scores = fake
    return learner


@pytest.mark.parametrize(("scope", "grows"), [("batch", True), ("task", False)])
def test_one_strange_partial_batch_expands_only_batchwise(scope, grows, toy_learner):
    stream = toy_stream()  # 20 images: batches of 8, 8, 4
    learner = learned(toy_learner("sema", detect_scope=scope, exp_threshold=2.0, func_epoch=1, rd_epoch=1), stream, 1)
    scored(learner, [0.0, 0.0, 3.0]).learn(stream.task(1))  # mean over samples: 3 * 4 / 20 = 0.6
    assert learner.adapters_per_layer() == ([1, 2, 1] if grows else [1, 1, 1])


def test_task_scope_averages_over_samples(toy_learner):
    stream = toy_stream()
    learner = toy_learner("sema", detect_scope="task")
    (only,) = scored(learner, [1.0, 2.0, 6.0])._scan(stream.task(0), 0)
    assert only[1].item() == pytest.approx((1 * 8 + 2 * 8 + 6 * 4) / 20)


@pytest.mark.parametrize(("sign", "expected"), [("absolute", 5.0), ("signed", -5.0)])
def test_better_reconstruction_counts_as_shift_only_in_absolute_scores(sign, expected, toy_learner):
    learner = toy_learner("sema", detect_sign=sign)
    descriptor = learner._layer(1).descriptors[0]
    images = next(iter(toy_stream().task(0).train.batches(4)))[0]
    with torch.no_grad():
        loss = descriptor(learner.backbone.eval().mean_tokens(images, [1])[1])
        descriptor.z_scores = lambda losses, floor, filled: torch.full_like(losses, -5.0)
    assert loss.shape == (4,)
    assert learner._layer_scores(learner._shifts(images))[1].tolist() == [expected]


def test_std_floor_keeps_a_constant_record_from_dividing_by_zero(toy_learner):
    images = next(iter(toy_stream().task(0).train.batches(4)))[0]
    for floor, finite in ((0.0, False), (0.5, True)):
        learner = toy_learner("sema", detect_std_floor=floor)
        learner._layer(1).descriptors[0].observe([torch.full((30,), 2.0)])
        assert bool(torch.isfinite(learner._layer_scores(learner._shifts(images))[1]).all()) is finite


def test_records_of_the_trained_descriptor_alone(toy_learner):
    stream = toy_stream()
    learner = learned(toy_learner("sema", record_when="end", buffer_size=20), stream, 1)
    descriptor = learner._layer(1).descriptors[0]
    with torch.no_grad():
        losses = [
            descriptor(learner.backbone.eval().mean_tokens(images, [1])[1])
            for images, *_ in stream.task(0).train.batches(8, draw="record")
        ]
    assert torch.equal(descriptor.record, torch.cat(losses))
    mixed = learned(toy_learner("sema", buffer_size=20), stream, 1)._layer(1).descriptors[0]
    assert mixed.record.mean() > descriptor.record.mean()  # early training losses are in it


def test_weight_decay_on_head_rows_of_other_tasks(toy_learner):
    def rows_of(flag):
        stream = toy_stream()
        learner = learned(toy_learner("sema", exp_threshold=1e9, decay_other_rows=flag, weight_decay=0.1), stream, 1)
        before = learner.head.weight.clone()
        learner.learn(stream.task(1))
        same = [torch.equal(a, b) for a, b in zip(before, learner.head.weight, strict=True)]
        return same

    assert rows_of(True) == [False] * 6
    assert rows_of(False) == [True, True, False, False, True, True]


def test_adapter_scale_and_dropout_are_applied_when_asked_for(toy_learner):
    learner = toy_learner("sema", ffn_adapter_scalar=0.1, ffn_adapter_dropout=0.5)
    slot = learner._layer(1)
    torch.nn.init.normal_(slot.adapters[0].up_proj.weight)
    x = torch.randn(2, 5, 16)
    learner.eval()
    plain = slot(x, slot.gates(x))
    slot.adapters[0].scale = 1.0
    torch.testing.assert_close(slot(x, slot.gates(x)), 10 * plain)
    learner.train()
    assert not torch.equal(slot(x, slot.gates(x)), slot(x, slot.gates(x)))


def test_a_layer_beyond_the_backbone_is_refused(toy_learner):
    with pytest.raises(
        ValueError, match=r"1\.\.9 do not lie within the backbone's layers 0\.\.2; the last three are 0 and 2"
    ):
        toy_learner("sema", adapt_end_layer=9)


def test_gates_are_a_softmax_of_the_mean_token(toy_learner):
    learner = toy_learner("sema")
    learner._grow(1)
    slot, x = learner._layer(1), torch.randn(3, 5, 16)
    mean = x.mean(1)
    logits = torch.stack([mean @ c.weight[0] + c.bias for c in slot.router.columns], dim=1)
    torch.testing.assert_close(slot.router(mean), logits.softmax(1))
    for adapter in slot.adapters:
        torch.nn.init.normal_(adapter.up_proj.weight)
    by_hand = sum(slot.router(mean)[:, i, None, None] * a(x) for i, a in enumerate(slot.adapters))
    torch.testing.assert_close(slot(x, slot.gates(x)), by_hand)


# Nested adapters in SEMA's place for the functional one ---------------------------------------------------------------


NESTED = {"ffn_adapter_type": "nested_lora", "exp_threshold": 0.0, "nested_lora_rank": 2}


def in_double(toy_learner, **settings):
    backbone = toy_backbone(class_token=False, global_pool="avg").double()
    return toy_learner("sema", backbone=backbone, **NESTED | settings)


def logits_of(learner, stream):
    images = next(iter(stream.test(0).batches(100, augment=False, shuffle=False)))[0]
    with torch.no_grad():
        return learner.eval().logits(images)


def nested_in(learner):
    """Every nested adapter by (layer, index)."""
    slots = {n: learner._layer(n).adapters for n in range(3)}
    return {(n, i): adapter for n, adapters in slots.items() for i, adapter in enumerate(adapters)}


def test_one_level_is_plain_sema(toy_learner):
    """A nested adapter of slow alone starts and learns as SEMA's own does, so all else can be compared number by number."""
    stream = toy_stream()
    plain = learned(in_double(toy_learner, ffn_adapter_type="adaptmlp", exp_threshold=0.3), stream, 3)
    count = len(rows(plain, "expand"))
    nested = learned(in_double(toy_learner, nested_lora_levels=1, exp_threshold=0.3), stream, 3)
    assert plain.adapters_per_layer() == nested.adapters_per_layer() != [1, 1, 1]
    first, second = rows(plain, "expand")[:count], rows(nested, "expand")[count:]
    assert [(r["task"], r["layer"]) for r in first] == [(r["task"], r["layer"]) for r in second]
    assert (logits_of(plain, stream) - logits_of(nested, stream)).abs().max() < 1e-12
    theirs = {k.replace(".slow.", "."): v for k, v in nested.own_state().items()}
    assert theirs.keys() == plain.own_state().keys()
    assert all((v - theirs[k]).abs().max() < 1e-11 for k, v in plain.own_state().items())
    assert rows(nested, "consolidation") == []


def test_descriptors_router_and_expansion_of_nested_adapters(toy_learner):
    stream = toy_stream()
    learner = learned(in_double(toy_learner), stream, 1)
    before = {k: v.clone() for k, v in learner.own_state().items() if not k.startswith("head")}
    learner.begin_task()
    learner.learn(stream.task(1))
    learner.consolidate(stream.task(1))
    assert learner.adapters_per_layer() == [1, 2, 2]
    assert [len(learner._layer(n).descriptors) for n in range(3)] == [0, 2, 2]
    assert [len(learner._layer(n).router) for n in range(3)] == [0, 2, 2]
    assert all(torch.equal(v, learner.own_state()[k]) for k, v in before.items())


@pytest.mark.parametrize("part", ["combined", "slow", "fast"])
def test_a_gate_weighs_slow_and_fast_alike(part, toy_learner):
    learner = in_double(toy_learner, nested_lora_levels=3)
    learner._grow(1)
    slot, x = learner._layer(1), torch.randn(3, 5, 16, dtype=torch.float64)
    for adapter in slot.adapters:
        for own in adapter.adapters():
            torch.nn.init.normal_(own.up_proj.weight)
        adapter.use(part)
    gates = slot.router(x.mean(1))
    chosen = {"combined": [0, 1, 2], "slow": [0], "fast": [2]}[part]
    by_hand = sum(
        gates[:, e, None, None] * sum(adapter.adapters()[i](x) for i in chosen)
        for e, adapter in enumerate(slot.adapters)
    )
    assert (slot(x, slot.gates(x)) - by_hand).abs().max() < 1e-12


def test_every_nested_adapter_is_merged_once(toy_learner):
    """After the task it was added in; with alpha 1 predictions stay, and slow alone then makes them."""
    stream = toy_stream()
    learner = in_double(toy_learner)
    for index in range(3):
        learner.begin_task()
        learner.learn(stream.task(index))
        before = logits_of(learner, stream)
        learner.consolidate(stream.task(index))
        assert (logits_of(learner, stream) - before).abs().max() < 1e-12
        learner._use("slow")
        assert (logits_of(learner, stream) - before).abs().max() < 1e-12
    found = [(r["task"], r["layer"], r["adapter"]) for r in rows(learner, "consolidation")]
    assert found == [(0, 0, 0), (0, 1, 0), (0, 2, 0), (1, 1, 1), (1, 2, 1), (2, 1, 2), (2, 2, 2)]
    assert all(r["merged"] and r["error"] < 1e-12 for r in rows(learner, "consolidation"))
    assert all(adapter.ranks() == [4, 2] for adapter in nested_in(learner).values()) and learner.unmerged == []


def test_nested_groups_have_their_rates(toy_learner):
    learner = in_double(
        toy_learner, nested_lora_lr_slow=0.001, nested_lora_lr_fast=0.02, router_lr=0.3, head_lr=0.4, func_epoch=1
    )
    learned(learner, toy_stream(), 2)
    first, second, third = (r["groups"] for r in rows(learner, "groups"))  # task 0, and each expansion of task 1
    rates = [("slow", 0.001), ("fast", 0.02), ("router", 0.3), ("head", 0.4)]
    assert all([(g["group"], g["lr"]) for g in told] == rates for told in (first, second, third))
    size = 2 * 16 * 2 + 2 + 16
    assert [g["parameters"] for g in first] == [3 * size, 3 * size, 2 * 17, 6 * 17]
    assert [g["parameters"] for g in third] == [size, size, 17, 6 * 17]


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("done", [1, 2])
def test_nested_adapters_are_restored_exactly_merged_or_not(interval, done, toy_learner):
    stream = toy_stream()

    def build():
        return in_double(toy_learner, nested_lora_consolidation_interval=interval, nested_lora_eval="slow")

    whole = learned(build(), stream, done)
    waiting = {(1, 1): [], (1, 2): [], (2, 1): [(0, 0), (1, 0), (2, 0)], (2, 2): []}[interval, done]
    assert whole.unmerged == waiting
    structure = json.loads(json.dumps(whole.structure()))
    state = {k: v.clone() for k, v in whole.own_state().items()}
    fresh = build()
    fresh.restore(structure)
    fresh.load_own_state(state)
    assert fresh.unmerged == waiting and torch.equal(logits_of(fresh, stream), logits_of(whole, stream))
    for learner in (whole, fresh):
        for index in range(done, 3):
            learner.begin_task()
            learner.learn(stream.task(index))
            learner.consolidate(stream.task(index))
    assert torch.equal(logits_of(fresh, stream), logits_of(whole, stream))
    assert all(torch.equal(v, fresh.own_state()[k]) for k, v in whole.own_state().items())
    assert fresh.structure() == whole.structure()


def test_an_interval_of_two_merges_what_two_tasks_added(toy_learner):
    learner = learned(in_double(toy_learner, nested_lora_consolidation_interval=2), toy_stream(), 3)
    merged = [(r["task"], r["layer"], r["adapter"]) for r in rows(learner, "consolidation") if r["merged"]]
    assert merged == [(1, 0, 0), (1, 1, 0), (1, 2, 0), (1, 1, 1), (1, 2, 1)]
    assert learner.unmerged == [(1, 2), (2, 2)]


def test_recalibration_after_a_merge_in_sema(toy_learner):
    def rows_of(flag):
        keys = {"nested_lora_consolidation_alpha": 0.3, "head_recalibration": flag, "decay_other_rows": False}
        stream = toy_stream()
        learner = learned(in_double(toy_learner, **keys), stream, 1)
        learner.learn(stream.task(1))
        before = learner.head.weight.detach().clone()
        learner.consolidate(stream.task(1))
        return [torch.equal(a, b) for a, b in zip(before, learner.head.weight, strict=True)]

    assert rows_of(False) == [True] * 6 and rows_of(True) == [True, True, False, False, True, True]


def test_with_three_levels_everything_reaches_slow_in_time(toy_learner):
    """At interval 1 a task's content moves one level down a task; an adapter waits until nothing is left above slow."""
    learner = in_double(toy_learner, nested_lora_levels=3, exp_threshold=1e9)
    stream = toy_stream()
    learned(learner, stream, 1)
    assert learner.unmerged == [(0, 0), (1, 0), (2, 0)]
    for index in (1, 2):
        learner.begin_task()
        learner.learn(stream.task(index))
        learner.consolidate(stream.task(index))
    assert learner.unmerged == []
    for adapter in nested_in(learner).values():
        assert not any(p.any() for part in adapter.adapters()[1:] for p in part.up_proj.parameters())
        assert adapter.slow.up_proj.weight.any()
