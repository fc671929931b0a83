"""Parallel competition: every expert learns as it would alone, the best on held-out training data wins, and what follows."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import models
from models.learner import fit
from tests.helpers.nested import Sum, faults_of, images_of, largest, learn, rows, state
from tests.helpers.toy import toy_backbone, toy_dataset, toy_stream
from utils.data.batches import TaskData

RATE, MULTIPLIERS = 0.05, (1.0, 0.5, 0.25)


@pytest.fixture
def contest(toy_learner):
    """A moe_parallel learner in float64 with K = 3; its adapters are away from their start values."""

    def build(method="moe_parallel", *, layers=(1, 2), stirred=True, **settings):
        backbone = toy_backbone(class_token=False, global_pool="avg").double()
        span = {"adapt_start_layer": layers[0], "adapt_end_layer": layers[1]}
        learner = toy_learner(method, backbone=backbone, **span | settings)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for adapter in (a for nested in learner.backbone.slots.values() for a in nested.adapters() if stirred):
                nn.init.normal_(adapter.up_proj.weight, std=0.1, generator=generator)
        return learner

    return build


def logits(learner, k=None, head=None):
    """All scores [B, 6] of slow and fast expert k, or of what is shown."""
    learner.eval()
    for nested in learner.backbone.slots.values():
        if k is not None:
            nested.use("combined", [k])
    with torch.no_grad():
        return (head or learner.head)(learner.backbone(images_of(toy_stream())))


def tensors(learner, k):
    """Slow, fast expert k and its head, as copies."""
    heads = learner.heads()
    parts = [a for nested in learner.backbone.slots.values() for a in (nested.slow, nested.fast[k])]
    return [p.detach().clone() for part in (*parts, heads[min(k, len(heads) - 1)]) for p in part.parameters()]


def solo(contest, together, k, **settings):
    """A run of expert k alone, from the same start values."""
    alone = contest(
        num_experts=1, **{"nested_lora_lr_fast": RATE * MULTIPLIERS[k], "nested_lora_lr_slow": RATE} | settings
    )
    alone.head.load_state_dict(together.heads()[min(k, len(together.heads()) - 1)].state_dict())
    for own, theirs in zip(alone.backbone.slots.values(), together.backbone.slots.values(), strict=True):
        own.slow.load_state_dict(theirs.slow.state_dict())
        own.fast[0].load_state_dict(theirs.fast[k].state_dict())
    return alone


def train(learner, task=1):
    """Learns one task as it comes from the stream, without what the selection then does to the heads."""
    learner._select = lambda *_: None
    learner.learn(toy_stream().task(task))
    return learner


# Every expert as if alone ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(1, 2), (0, 2), (2, 2)])
def test_with_slow_fixed_and_heads_of_their_own_every_expert_equals_its_solo_run(layers, contest):
    keys = {"layers": layers, "epochs": 3, "moe_heads": "per_expert", "nested_lora_lr_slow": 0.0}
    keys |= {"weight_decay": 0.05, "moe_val_ratio": 0.2}
    together = contest(**keys)
    alone = [solo(contest, together, k, **keys) for k in range(3)]
    starts = [tensors(together, k) for k in range(3)]
    train(together)
    ends = [tensors(train(learner), 0) for learner in alone]  # 3 epochs of 16 images, momentum 0.9
    for k in range(3):
        for ours, expected in zip(tensors(together, k), ends[k], strict=True):
            assert largest(ours - expected) < 1e-12
        assert largest(starts[k][-2] - ends[k][-2]) > 1e-3 and largest(starts[k][-6] - ends[k][-6]) > 1e-4
        assert largest(ends[k][-2] - ends[k - 1][-2]) > 1e-6  # experts went different ways


def one_step(**other):
    once = {"epochs": 1, "batch_size": 100, "weight_decay": 0.0, "moe_val_ratio": 0.2, "nested_lora_lr_slow": RATE}
    return once | other


def changes(learner, count):
    """By how much one step moves (slow, fast expert, head) of every expert."""
    before = [tensors(learner, k) for k in range(count)]
    train(learner)
    return [[b - a for a, b in zip(before[k], tensors(learner, k), strict=True)] for k in range(count)]


def test_what_is_shared_gets_the_mean_of_the_branches_gradients(contest):
    together = contest(**one_step())
    alone = [changes(solo(contest, together, k, **one_step()), 1)[0] for k in range(3)]
    ours = changes(together, 3)
    layers = 2
    for i, own in enumerate(ours[0]):
        fast = i < 8 * layers and i % 8 >= 4
        if fast:  # an expert of its own: as alone
            assert all(largest(ours[k][i] - alone[k][i]) < 1e-12 for k in range(3))
        else:  # slow, and the shared head
            assert largest(own - sum(a[i] for a in alone) / 3) < 1e-12
    moved = [largest(change) for change in ours[0]]
    assert all(moved[i] > 1e-6 for i in (2, 6, 10, 14, 16))


def test_the_mean_loss_gives_every_expert_a_kth_of_the_gradient(contest):
    by_sum, by_mean = (changes(contest(**one_step(moe_loss=loss)), 3) for loss in ("sum", "mean"))
    for k in range(3):
        for i, (a, b) in enumerate(zip(by_sum[k], by_mean[k], strict=True)):
            factor = 3 if i < 16 and i % 8 >= 4 else 1  # shared parameters have the mean of the branches in both
            assert largest(a - factor * b) < 1e-12
        assert largest(by_sum[k][6]) > 1e-6


def test_rates_and_groups_of_the_experts(contest, monkeypatch):
    seen, real = [], fit.optimizer_for

    def watched(learner, groups, cfg, **how):
        seen.append(list(groups))
        return real(learner, groups, cfg, **how)

    monkeypatch.setattr(fit, "optimizer_for", watched)
    for heads, more in (("shared", {}), ("per_expert", {"fast_lr_multipliers": (3.0, 1.0, 0.2)})):
        learner = contest(moe_heads=heads, nested_lora_lr_fast=0.08, nested_lora_lr_slow=0.01, epochs=1, **more)
        learner.learn(toy_stream().task(0))
        names = ["head"] if heads == "shared" else ["head 0", "head 1", "head 2"]
        fast = [0.24, 0.08, 0.016] if more else [0.08, 0.04, 0.02]
        assert [g.name for g in seen[-1]] == ["slow", "fast 0", "fast 1", "fast 2", *names]
        assert [g.lr for g in seen[-1]] == pytest.approx([0.01, *fast] + [RATE] * len(names))
        every = [id(p) for g in seen[-1] for p in g.parameters]
        assert len(set(every)) == len(every)
        assert set(every) == set(learner.trained) == {id(p) for p in learner.parameters() if p.requires_grad}
        assert learner.planned_parameters()[0] == ("every task", sum(p.numel() for p in learner.trained.values()))


# Selection ----------------------------------------------------------------------------------------------------------------


def voting(learner, votes):
    """Expert k gives class votes[k][0] the score votes[k][1] and all others 0, whatever the image."""

    def scores(images, count):
        made = torch.zeros(count, len(images), learner.num_classes, dtype=torch.float64)
        for k, (label, score) in enumerate(votes):
            made[k, :, label] = score
        return made

    learner._branch_scores = scores
    return learner


@pytest.mark.parametrize(
    ("votes", "winner", "accuracies", "margin"),
    [
        ([(0, 9.0), (2, 1.0), (1, 1.0)], 1, [0, 50, 0], 50),  # 0 and 1 are old classes: these are never right
        ([(2, 3.0), (3, 1.0), (0, 9.0)], 1, [50, 50, 0], 0),  # as right as expert 0, but less sure of what is wrong
        ([(0, 9.0), (2, 1.0), (2, 1.0)], 1, [0, 50, 50], 0),  # alike in everything: the lowest index
        (
            [(2, 9.0), (2, 2.0), (5, 99.0)],
            1,
            [50, 50, 0],
            0,
        ),  # 5 is not seen yet: 2 then says nothing, class 0 comes first
    ],
)
def test_the_highest_accuracy_wins_then_the_lowest_loss_then_the_lowest_index(
    votes, winner, accuracies, margin, contest
):
    learner = voting(contest(epochs=0), votes)
    learner.learn(toy_stream().task(1))
    (facts,) = learner.selections()
    assert (facts["winner"], learner.winner) == (winner, winner)
    assert facts["accuracies"] == accuracies and facts["margin"] == margin
    assert (facts["task"], facts["split"], facts["samples"]) == (1, "validation", 2)
    label, score = votes[winner]
    table = torch.zeros(4, dtype=torch.float64)
    table[label] = score
    assert facts["losses"][winner] == pytest.approx((table.logsumexp(0) - score / 2).item())  # right for every second
    (row,) = rows(learner, "selection")
    assert {k: row[k] for k in facts} == facts
    text = (Path(learner.log.folder) / "run.log").read_text()
    assert f"expert {winner} wins on 2 validation images" in text and f"margin {margin:.1f}" in text


def trained_rows(monkeypatch):
    """Rows of the data set that training batches were drawn from, task by task."""
    seen, real = [], TaskData.batches

    def watched(self, *args, **other):
        if other.get("stream") == "func":
            seen.append(self.rows.tolist())
        return real(self, *args, **other)

    monkeypatch.setattr(TaskData, "batches", watched)
    return seen


def test_held_out_samples_are_stratified_seeded_logged_and_never_trained_on(contest, monkeypatch):
    seen = trained_rows(monkeypatch)
    dataset = toy_dataset()

    def held_of(seed):
        stream = toy_stream(dataset, seed=seed, class_order_seed=1)
        learner = learn(contest(moe_val_ratio=0.3, epochs=1), stream, 2)
        return stream, [r["samples"] for r in rows(learner, "held_out")][-2:]

    stream, held = held_of(1)
    for index in range(2):
        everything = stream.task(index).train
        assert sorted(held[index] + seen[index]) == everything.rows.tolist()
        labels = dataset.train.labels[held[index]]
        assert sorted(labels.tolist()) == sorted(stream.task(index).class_ids * 3)  # 3 of 10 each
    assert held_of(1)[1] == held and held_of(2)[1] != held


def test_selection_is_the_accuracy_of_each_branch_on_the_held_out_images(contest):
    learner = contest(moe_val_ratio=0.5, moe_heads="per_expert", eval_batch_size=7, epochs=6)
    kept = {}
    learner._keep_winners_head = lambda task: None  # so that the heads can be looked at
    learner.learn(toy_stream().task(0))
    _, held = toy_stream().task(0).train.split(0.5, draw="selection")
    images, labels, _ = next(iter(held.batches(100, augment=False, shuffle=False)))
    learner.eval()
    for k, head in enumerate(learner.heads()):
        for nested in learner.backbone.slots.values():
            nested.use("combined", [k])
        with torch.no_grad():
            scores = head(learner.backbone(images))[:, :2]
        kept[k] = (
            100 * (scores.argmax(1) == labels).double().mean().item(),
            nn.functional.cross_entropy(scores, labels),
        )
    (facts,) = learner.selections()
    assert facts["samples"] == 10 and facts["accuracies"] == pytest.approx([kept[k][0] for k in range(3)])
    assert facts["losses"] == pytest.approx([kept[k][1].item() for k in range(3)], abs=1e-9)


def rig(learner, winner):
    """Makes `winner` win: the others predict the opposite of what it does. Training is untouched."""
    real = learner._branch_scores

    def scores(images, count):
        made = real(images, count)
        if not learner.training:
            made = torch.stack([made[winner] if k == winner else -made[winner] for k in range(count)])
        return made

    learner._branch_scores = scores
    return learner


@pytest.mark.parametrize("heads", ["shared", "per_expert"])
@pytest.mark.parametrize("reset", ["all", "winner"])
def test_the_winner_is_merged_and_evaluated(heads, reset, contest):
    stream = toy_stream()
    learner = rig(contest(moe_heads=heads, moe_reset=reset, moe_val_ratio=0.3, epochs=8, init_lr=0.1), 2)
    own, take = [], learner._keep_winners_head

    def keep(task):
        own.extend(copy.deepcopy(learner.heads()))
        take(task)

    learner._keep_winners_head = keep
    learner.learn(stream.task(0))
    assert learner.selections()[0]["winner"] == 2 and len(own) == (3 if heads == "per_expert" else 0)
    expected = logits(learner, 2, own[2] if own else None)
    losers = [tensors(learner, k)[4:8] for k in (0, 1)]
    learner.consolidate(stream.task(0))
    with torch.no_grad():
        shown = learner.eval().logits(images_of(stream))
    assert largest(shown - expected[:, :2]) < 1e-12  # concat with alpha 1: slow is now slow + winner, with its own head
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    for nested in learner.backbone.slots.values():
        silent = [not fast(x).any() for fast in nested.fast]
        assert silent == ([True] * 3 if reset == "all" else [False, False, True])
        downs = [fast.down_proj.weight for fast in nested.fast]
        assert not any(torch.equal(a, b) for i, a in enumerate(downs) for b in downs[:i])
    if reset == "winner":
        for k in (0, 1):
            assert all(torch.equal(a, b) for a, b in zip(tensors(learner, k)[4:8], losers[k], strict=True))
    merged = rows(learner, "consolidation")
    assert [(r["layer"], r["expert"], r["merged"]) for r in merged] == [(1, 2, True), (2, 2, True)]


def test_every_head_takes_the_winners_rows(contest):
    stream = toy_stream()
    learner = rig(contest(moe_heads="per_expert", moe_val_ratio=0.3, epochs=8, init_lr=0.1), 1)
    for index in range(2):
        start = [head.weight.detach().clone() for head in learner.heads()]
        assert all(torch.equal(start[0], w) for w in start[1:])
        learn(learner, stream, index + 1, first=index)
        first, total = 2 * index, 2 * index + 2
        for head in learner.heads():
            assert torch.equal(head.weight, learner.head.weight) and torch.equal(head.bias, learner.head.bias)
            assert torch.equal(head.weight[:first], start[0][:first])
            assert not torch.equal(head.weight[first:total], start[0][first:total])


def test_recalibrated_rows_reach_every_head(contest):
    """Otherwise the heads of the others would meet the next selection with rows of another function."""
    settings = {"head_recalibration": True, "nested_lora_consolidation_alpha": 0.5, "moe_heads": "per_expert"}
    learner = contest(**settings)
    task = toy_stream().task(0)
    learner.learn(task)
    before = learner.head.weight.detach().clone()
    learner.consolidate(task)
    assert not torch.equal(before, learner.head.weight)
    assert all(torch.equal(head.weight, learner.head.weight) for head in learner.heads())


@pytest.mark.parametrize("which", ["winner", "sum"])
def test_which_fast_experts_are_evaluated_before_a_merge(which, contest):
    stream = toy_stream()
    learner = rig(contest(moe_eval=which, nested_lora_consolidation_interval=2, moe_val_ratio=0.3, epochs=8), 2)
    learn(learner, stream, 1)
    assert learner.winner == 2 and not any(r["merged"] for r in rows(learner, "consolidation"))
    shown = logits(learner)
    for layer, nested in list(learner.backbone.slots.items()):
        fast = [nested.fast[2]] if which == "winner" else list(nested.fast)
        learner.backbone.slots[layer] = Sum([nested.slow, *fast])
    assert largest(logits(learner) - shown) < 1e-12


def test_learning_and_merging_are_the_same_whatever_is_evaluated(contest):
    """The compression is fitted on what a layer reads with slow and the winner, not with the part that is shown."""
    keys = {"nested_lora_consolidation_rank": 3, "epochs": 4}
    shows = [{}, {"nested_lora_eval": "slow"}, {"nested_lora_eval": "fast"}, {"moe_eval": "sum"}]
    first, *others = [learn(contest(**keys | show), toy_stream(), 2).own_state() for show in shows]
    assert all(torch.equal(v, other[k]) for other in others for k, v in first.items())


def test_one_expert_needs_no_selection(contest):
    learner = learn(contest(num_experts=1, moe_val_ratio=0.0), toy_stream(), 2)
    assert learner.selections() == [] and learner.winner == 0 and not rows(learner, "held_out")
    alone = learn(contest(num_experts=1, moe_val_ratio=0.2), toy_stream(), 1)
    assert alone.selections()[0]["margin"] is None and len(alone.selections()[0]["accuracies"]) == 1


def test_one_expert_is_the_chain(contest):
    """K = 1 without held-out data learns exactly what nested_lora learns."""
    one = learn(contest(num_experts=1, moe_val_ratio=0.0, stirred=False), toy_stream(), 3)
    chain = learn(contest("nested_lora", stirred=False), toy_stream(), 3)
    assert all(largest(v - one.own_state()[k]) < 1e-12 for k, v in chain.own_state().items())


def test_selection_on_test_data_is_asked_for_warned_about_and_told(contest):
    plain = contest()
    assert not plain.uses_test and toy_stream().task(1).test is None
    learner = contest(selection_split="test")
    assert learner.uses_test
    task = toy_stream().task(1, with_test=learner.uses_test)
    learner.learn(task)
    (facts,) = learner.selections()
    assert (facts["split"], facts["samples"]) == ("test", 16)  # all test images of both tasks
    assert "selected on TEST data" in (Path(learner.log.folder) / "run.log").read_text()
    assert rows(learner, "held_out") == []
    with pytest.raises(AssertionError, match="the runner gives the test data"):
        learner.learn(toy_stream().task(1))


# Mode task ----------------------------------------------------------------------------------------------------------------


def test_in_mode_task_each_task_trains_the_expert_it_belongs_to(contest):
    stream = toy_stream()
    learner = contest(moe_mode="task", num_experts=2, nested_lora_lr_slow=0.0, moe_heads="per_expert", stirred=False)
    assert len(learner.heads()) == 1
    for index, expert in enumerate((0, 1, 0)):
        before = [tensors(learner, k)[4:8] for k in range(2)]
        learn(learner, stream, index + 1, first=index, consolidate=False)
        moved = [
            any(not torch.equal(a, b) for a, b in zip(before[k], tensors(learner, k)[4:8], strict=True)) for k in (0, 1)
        ]
        assert moved == [k == expert for k in range(2)] and learner.winner == expert
        assert learner.selections() == [] and rows(learner, "held_out") == []
        learner.consolidate(stream.task(index))
    assert [r["expert"] for r in rows(learner, "consolidation") if r["layer"] == 1] == [0, 1, 0]


def test_in_mode_task_a_merge_leaves_the_experts_of_other_tasks_alone(contest):
    """They are no losers: what they hold is not merged yet."""
    stream = toy_stream()
    learner = contest(moe_mode="task", num_experts=2, nested_lora_consolidation_interval=2, stirred=False)
    learn(learner, stream, 1)
    kept = tensors(learner, 0)[4:8]
    assert kept[2].any()
    learn(learner, stream, 2, first=1)
    assert all(torch.equal(a, b) for a, b in zip(kept, tensors(learner, 0)[4:8], strict=True))
    assert not tensors(learner, 1)[6].any()


# Settings and resume ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"num_experts": 0}, "num_experts: "),
        ({"num_experts": 3, "fast_lr_multipliers": [1.0, 0.5]}, "fast_lr_multipliers: 2 values for num_experts 3"),
        ({"fast_lr_multipliers": []}, "fast_lr_multipliers: 0 values for num_experts 4"),
        ({"num_experts": 2, "fast_lr_multipliers": [1.0, 0.0]}, "every value must be above 0; got [1.0, 0.0]"),
        ({"num_experts": 2, "fast_lr_multipliers": [1.0, 1e308]}, "1e+308 times the fast rate 0.01 is above 100"),
        ({"moe_val_ratio": 0.0}, "moe_val_ratio: 0 leaves nothing to select among 4 experts on"),
        ({"moe_val_ratio": 1.0}, "moe_val_ratio: "),
        ({"moe_mode": "task", "selection_split": "test"}, "selection_split: nothing is selected"),
        ({"moe_mode": "task", "moe_heads": "per_expert"}, "moe_heads: there is one head"),
        ({"nested_lora_levels": 1}, "competition needs fast experts, so at least 2"),
        ({"init_lr": 0.1, "min_lr": 0.05}, "min_lr: 0.05 is above 0.0125, the rate of the slowest expert"),
        ({"router_lr": 0.1}, "router_lr: unknown key of moe_parallel, it belongs to dylora_moe, sema"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(values, expected):
    found = faults_of("moe_parallel", **values)
    assert [fault for fault in found if expected in fault], found


def test_default_multipliers_halve():
    assert models.settings_of("moe_parallel")(
        model_name="moe_parallel", dataset="digits", init_cls=2, increment=2
    ).multipliers() == (1, 0.5, 0.25, 0.125)


@pytest.mark.parametrize(
    "settings",
    [
        {"moe_heads": "per_expert", "nested_lora_consolidation_interval": 2},
        {"moe_reset": "winner", "moe_eval": "sum"},
        {"moe_mode": "task", "nested_lora_levels": 3},
    ],
    ids=["not merged yet", "losers go on", "task mode"],
)
def test_a_state_with_a_winner_other_than_0_is_restored_exactly(settings, contest):
    stream = toy_stream()

    def build():
        learner = contest(moe_val_ratio=0.3, epochs=6, **settings)
        return learner if settings.get("moe_mode") == "task" else rig(learner, 1)

    whole = learn(build(), stream, 2)
    assert whole.winner == 1
    structure, saved = json.loads(json.dumps(whole.structure())), state(whole)
    fresh = build()
    fresh.restore(structure)
    fresh.load_own_state(saved)
    assert torch.equal(logits(fresh), logits(whole)) and fresh.winner == 1
    for learner in (whole, fresh):
        learn(learner, stream, 3, first=2)
    assert fresh.selections() == whole.selections()
    assert all(torch.equal(v, fresh.own_state()[k]) for k, v in whole.own_state().items())


@pytest.mark.parametrize(("head", "own_classes"), [("linear", False), ("ncm", True)])
def test_where_statistics_predict_the_linear_head_judges_among_the_tasks_classes(head, own_classes, contest):
    """In the second task the heads' scores are rigged: old classes above all, expert 1 alone right among the new ones."""
    stream = toy_stream()
    learner = contest(head=head, moe_val_ratio=0.5, epochs=0)
    learner.learn(stream.task(0))
    task = stream.task(1)
    _, held = task.train.split(0.5, draw="selection")
    labels = held.labels

    def scores(images, count):
        made = torch.zeros(count, len(images), 6, dtype=torch.float64)
        made[:, :, 0] = 9.0
        for k in range(count):
            made[k].scatter_(1, (labels if k == 1 else 5 - labels)[:, None], 1.0)
        return made

    learner._branch_scores = scores
    learner.learn(task)
    (facts,) = learner.selections()
    assert facts["accuracies"] == ([0.0, 100.0, 0.0] if own_classes else [0.0, 0.0, 0.0])


def test_keys_that_do_not_act_are_told():
    from tests.helpers.toy import toy_settings

    told = list(
        toy_settings("moe_parallel", moe_mode="task", moe_val_ratio=0.2, fast_lr_multipliers=(1.0, 0.5, 0.2)).remarks()
    )
    assert told == ["these keys do not act with moe_mode task: moe_val_ratio, fast_lr_multipliers"]
    assert not list(toy_settings("moe_parallel", moe_val_ratio=0.2).remarks())
    (told,) = toy_settings("moe_parallel", moe_mode="task", moe_reset="winner").remarks()
    assert told == "these keys do not act with moe_mode task: moe_reset"
    (told,) = toy_settings("moe_parallel", nested_lora_use_consolidation=False, moe_reset="winner").remarks()
    assert told == "these keys do not act with nested_lora_use_consolidation false: moe_reset"
    told = list(toy_settings("moe_parallel", selection_split="test", moe_val_ratio=0.2).remarks())
    assert told == ["these keys do not act with selection_split test: moe_val_ratio"]
