"""The chain of nested adapters: what a merge keeps, what starts anew, who trains at which rate, what is logged and restored."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from backbone.adapters.consolidation import METHODS
from models.families import nested as nesting
from models.learner import fit
from models.learner.layers import slot_inputs
from tests.helpers.nested import Sum, faults_of, images_of, largest, learn, rows, state
from tests.helpers.toy import toy_backbone, toy_settings, toy_stream

EXACT = {  # settings with which a merge of alpha 1 keeps the function
    "concat relu": {"nested_lora_consolidation_method": "concat"},
    "concat none": {"nested_lora_consolidation_method": "concat", "nested_lora_activation": "none"},
    "svd none": {
        "nested_lora_consolidation_method": "svd",
        "nested_lora_activation": "none",
        "nested_lora_consolidation_rank": 8,
    },
    "pam relu": {"nested_lora_consolidation_method": "pam"},
}


@pytest.fixture
def chain(toy_learner):
    """A nested_lora learner in float64 on a toy backbone that pools all tokens: its features tell the classes apart."""

    def build(**settings):
        backbone = toy_backbone(class_token=False, global_pool="avg").double()
        return toy_learner("nested_lora", backbone=backbone, **settings)

    return build


@torch.no_grad()
def logits(learner, part=None):
    for adapter in learner.backbone.slots.values():
        if part is not None:
            adapter.use(part)
    return learner.eval().logits(images_of(toy_stream()))


@pytest.fixture
def fits(monkeypatch):
    """The groups and the optimizer of every phase, with the optimizer's state as it was at its start."""
    seen, real = [], fit.optimizer_for

    def watched(learner, groups, cfg, **how):
        optimizer, scheduler = real(learner, groups, cfg, **how)
        seen.append((list(groups), optimizer, dict(optimizer.state)))
        return optimizer, scheduler

    monkeypatch.setattr(fit, "optimizer_for", watched)
    return seen


# Merging ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
def test_after_a_merge_with_alpha_1_slow_alone_is_what_both_were(name, chain):
    stream = toy_stream()
    learner = learn(chain(**EXACT[name]), stream, 2, consolidate=False)  # slow holds the first task already
    before, slow_before = logits(learner, "combined"), logits(learner, "slow")
    assert largest(before - slow_before) > 1e-3
    learner.consolidate(stream.task(1))
    after = logits(learner, "combined")
    assert largest(after - before) < 1e-12 and largest(logits(learner, "slow") - after) < 1e-12
    assert largest(logits(learner, "fast") - after) > 1e-3
    assert all(row["error"] < 1e-12 for row in rows(learner, "consolidation"))


def test_another_alpha_changes_the_function(chain):
    stream = toy_stream()
    learner = learn(chain(nested_lora_consolidation_alpha=0.5), stream, 1, consolidate=False)
    before = logits(learner)
    learner.consolidate(stream.task(0))
    assert largest(logits(learner) - before) > 1e-3
    (one, two) = rows(learner, "consolidation")
    assert one["error"] < 1e-12 and two["alpha"] == 0.5  # it is exact all the same: slow + fast / 2 is what was wanted


def test_an_interval_merges_every_second_task_only(chain):
    stream = toy_stream()
    learner = chain(nested_lora_consolidation_interval=2)
    for index in range(3):
        learn(learner, stream, index + 1, first=index, consolidate=False)
        before = state(learner)
        learner.consolidate(stream.task(index))
        same = all(k in learner.own_state() and torch.equal(v, learner.own_state()[k]) for k, v in before.items())
        assert same == (index != 1)
    assert [(r["task"], r["merged"]) for r in rows(learner, "consolidation") if r["layer"] == 1] == [
        (0, False), (1, True), (2, False),
    ]  # fmt: skip
    assert all(("error" in r) == r["merged"] for r in rows(learner, "consolidation"))


def test_without_consolidation_both_go_on(chain):
    learner = chain(nested_lora_use_consolidation=False)
    before = state(learn(learner, toy_stream(), 1, consolidate=False))
    learner.consolidate(toy_stream().task(0))
    assert all(torch.equal(v, learner.own_state()[k]) for k, v in before.items())
    assert not any(r["merged"] for r in rows(learner, "consolidation"))


@pytest.mark.parametrize("part", ["combined", "slow", "fast"])
def test_the_part_that_is_evaluated(part, chain):
    stream = toy_stream()
    learner = learn(chain(nested_lora_eval=part, nested_lora_consolidation_interval=2), stream, 1)
    ours = logits(learner)
    for layer, nested in list(learner.backbone.slots.items()):
        chosen = {"combined": [nested.slow, nested.fast[0]], "slow": [nested.slow], "fast": [nested.fast[0]]}[part]
        learner.backbone.slots[layer] = Sum(chosen)
    assert largest(ours - logits(learner)) < 1e-12
    assert largest(ours) > 1e-3


def test_training_sees_both_parts_whatever_is_evaluated(chain):
    runs = [learn(chain(nested_lora_eval=part), toy_stream(), 2) for part in ("combined", "slow", "fast")]
    assert all(torch.equal(v, other.own_state()[k]) for other in runs[1:] for k, v in runs[0].own_state().items())


def test_rank_grows_with_concat_up_to_the_cap(chain):
    stream = toy_stream()
    free, capped = chain(), chain(nested_lora_consolidation_rank=5)
    for learner in (free, capped):
        learn(learner, stream, 3)
    assert [r["rank"] for r in rows(free, "consolidation") if r["layer"] == 1][:3] == [4, 6, 8]
    assert [a.ranks() for a in free.backbone.slots.values()] == [[8, 2]] * 2
    assert [a.ranks() for a in capped.backbone.slots.values()] == [[5, 2]] * 2
    text = (Path(free.log.folder) / "run.log").read_text()
    assert "merged by concat with alpha 1, rank 8, largest difference to the wanted function" in text


@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_tells(method, activation, chain):
    if (method, activation) == ("ties", "relu"):
        return
    alpha = 0.5 if method == "ema" else 1.0
    learner = learn(
        chain(
            nested_lora_consolidation_method=method,
            nested_lora_consolidation_alpha=alpha,
            nested_lora_activation=activation,
        ),
        toy_stream(),
        3,
    )
    assert torch.isfinite(logits(learner)).all()
    found = rows(learner, "consolidation")
    assert [(r["task"], r["layer"]) for r in found] == [(t, n) for t in range(3) for n in (1, 2)]
    for r in found:
        assert (r["merged"], r["method"], r["alpha"], r["level"], r["expert"]) == (True, method, alpha, 1, 0)
        assert -1 <= r["cosine"] <= 1 and 0 < r["fast_share"] < 1 and r["error"] >= 0
        assert r["fast_share"] == pytest.approx(r["fast_output"] / (r["fast_output"] + r["slow_output"]))
        assert min(r["slow_norm"], r["fast_norm"], r["slow_norm_after"], r["fast_norm_after"]) > 0
        assert r["slow_output_after"] > 0 and r["fast_output_after"] == 0


def test_logged_sizes_against_the_adapters_themselves(chain):
    stream = toy_stream()
    learner = learn(chain(), stream, 1, consolidate=False)
    nested = learner.backbone.slots["1"]
    slow, fast = nested.slow, nested.fast[0]
    norms = [torch.cat([p.detach().flatten() for p in a.parameters()]).norm().item() for a in (slow, fast)]
    inputs = []
    hook = nested.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    with torch.no_grad():
        learner.eval().backbone(next(iter(stream.task(0).train.batches(100, augment=False)))[0])
    hook.remove()
    x = inputs[0].flatten(0, 1)  # all 20 images fit into the sample
    a, b = (adapter(x).detach() for adapter in (slow, fast))
    learner.consolidate(stream.task(0))
    row = rows(learner, "consolidation")[0]
    assert [row["slow_norm"], row["fast_norm"]] == pytest.approx(norms, rel=1e-9)
    sizes = [y.square().sum(1).mean().sqrt().item() for y in (a, b)]
    assert [row["slow_output"], row["fast_output"]] == pytest.approx(sizes, rel=1e-9)
    assert row["cosine"] == pytest.approx(((a * b).sum() / a.norm() / b.norm()).item(), rel=1e-9)
    assert row["slow_output_after"] == pytest.approx((a + b).square().sum(1).mean().sqrt().item(), rel=1e-9)


def test_pam_never_moves_the_shared_down_projection(chain):
    stream = toy_stream()
    learner = chain(nested_lora_consolidation_method="pam", weight_decay=0.1)
    start = [a.slow.down_proj.weight.clone() for a in learner.backbone.slots.values()]
    for index in range(3):
        learn(learner, stream, index + 1, first=index)
        for nested, down in zip(learner.backbone.slots.values(), start, strict=True):
            assert all(torch.equal(a.down_proj.weight, down) for a in nested.adapters())
            assert largest(nested.slow.up_proj.weight) > 0 and not nested.fast[0].up_proj.weight.any()
        moved = [p for a in learner.backbone.slots.values() for x in a.adapters() for p in x.down_proj.parameters()]
        assert not {id(p) for p in moved} & set(learner.trained)


# Starting anew ----------------------------------------------------------------------------------------------------------


def gradients(learner, stream, task):
    """Of the fast adapters, before and after one further step of SGD."""
    images, labels, _ = next(iter(stream.task(task).train.batches(20)))
    fast = [p for a in learner.backbone.slots.values() for p in a.fast[0].parameters()]
    for p in fast:
        p.requires_grad_(True)
    found = []
    for _ in range(2):
        loss = nn.functional.cross_entropy(learner.head(learner.backbone(images)), labels)
        found.append(torch.autograd.grad(loss, fast))
        with torch.no_grad():
            for p, g in zip(fast, found[-1], strict=True):
                p -= 0.1 * g
    return [[bool(g.any()) for g in step] for step in found]


def test_a_fresh_start_is_silent_and_every_factor_learns_within_a_step(chain):
    stream = toy_stream()
    learner = learn(chain(nested_lora_rank=8), stream, 1)
    inputs = torch.randn(2, 5, 16, dtype=torch.float64)
    assert all(not a.fast[0](inputs).any() for a in learner.backbone.slots.values())
    first, second = gradients(learner, stream, 1)  # per layer: down weight and bias, up weight and bias
    assert first == [False, False, True, True] * 2 and second == [True] * 8


def test_a_zero_start_learns_a_constant_only(chain):
    stream = toy_stream()
    learner = learn(chain(nested_lora_reset="zero"), stream, 1)
    first, second = gradients(learner, stream, 1)
    assert first == second == [False, False, False, True] * 2
    learn(learner, stream, 2, first=1, consolidate=False)
    for nested in learner.backbone.slots.values():
        down, up = nested.fast[0].down_proj, nested.fast[0].up_proj
        assert not any(p.any() for p in (down.weight, down.bias, up.weight)) and up.bias.any()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_no_momentum_survives_what_it_was_gathered_for(optimizer, chain, fits):
    stream = toy_stream()
    learner = learn(chain(optimizer=optimizer), stream, 1)
    old = {id(p) for group in fits[0][1].param_groups for p in group["params"]}
    assert fits[0][1].state and not fits[0][2]
    learn(learner, stream, 2, first=1, consolidate=False)
    (groups, second, at_start) = fits[1]
    assert at_start == {} and second is not fits[0][1]
    held = {id(p) for group in second.param_groups for p in group["params"]}
    adapters = {id(p) for a in learner.backbone.slots.values() for p in a.parameters()}
    assert adapters <= held and not adapters & old  # both are new objects after the merge
    assert {g.name for g in groups} == {"slow", "fast", "head"}


# Levels -----------------------------------------------------------------------------------------------------------------


def test_three_levels_hand_their_content_down(chain):
    """Fast goes into the middle at every merge, the middle into slow, slowest pair first: nothing falls two levels at once."""
    stream = toy_stream()
    learner = learn(chain(nested_lora_levels=3, nested_lora_lr_slow=0.0), stream, 1, consolidate=False)
    nested, x = learner.backbone.slots["1"], torch.randn(2, 5, 16, dtype=torch.float64)
    slow, middle, fast = (adapter(x).detach() for adapter in nested.adapters())
    assert not slow.any() and middle.any() and fast.any()  # slow is frozen here and empty
    combined = logits(learner)
    learner.consolidate(stream.task(0))
    assert largest(nested.slow(x) - middle) < 1e-12
    assert largest(nested.middle[0](x) - fast) < 1e-12
    assert not nested.fast[0](x).any()
    assert largest(logits(learner) - combined) < 1e-12
    assert [(r["level"], r["merged"]) for r in rows(learner, "consolidation") if r["layer"] == 1] == [
        (1, True), (2, True),
    ]  # fmt: skip
    assert [a.ranks() for a in learner.backbone.slots.values()] == [[4, 4, 2]] * 2


def test_three_levels_with_an_interval_of_two(chain):
    """Fast is merged every 2 tasks, the middle level every 4."""
    stream = toy_stream(init_cls=1, increment=1)
    learner = learn(chain(nested_lora_levels=3, nested_lora_consolidation_interval=2, epochs=1), stream, 4)
    found = {(r["task"], r["level"]): r["merged"] for r in rows(learner, "consolidation") if r["layer"] == 1}
    assert [found[t, 2] for t in range(4)] == [False, True, False, True]
    assert [found[t, 1] for t in range(4)] == [False, False, False, True]


def groups_of(learner, fits, task=0):
    learn(learner, toy_stream(), task + 1, first=task, consolidate=False)
    return {g.name: g for g in fits[-1][0]}


@pytest.mark.parametrize(
    ("settings", "rates", "intervals"),
    [
        ({"nested_lora_levels": 1}, [0.01], [4]),
        ({"nested_lora_levels": 2}, [0.01, 0.09], [4, 1]),
        ({"nested_lora_levels": 3}, [0.01, 0.03, 0.09], [4, 2, 1]),  # geometric
        ({"nested_lora_levels": 3, "nested_lora_lr_slow": 0.0}, [0.0, 0.045, 0.09], [4, 2, 1]),  # 0 has no geometry
        (
            {"nested_lora_levels": 4, "nested_lora_level_lrs": (0.5, 0.6), "nested_lora_level_intervals": (3, 7)},
            [0.01, 0.5, 0.6, 0.09],
            [4, 3, 7, 1],
        ),
    ],
)
def test_rates_and_intervals_of_the_levels(settings, rates, intervals, chain, fits):
    keys = {
        "nested_lora_lr_slow": 0.01,
        "nested_lora_lr_fast": 0.09,
        "nested_lora_update_interval_slow": 4,
        "epochs": 1,
    }
    groups = groups_of(chain(**keys | settings), fits)
    head = groups.pop("head")
    assert (head.lr, head.interval) == (0.05, 1)
    assert [g.lr for g in groups.values()] == pytest.approx(rates)
    assert [g.interval for g in groups.values()] == intervals
    names = ["slow", *(f"level {i}" for i in range(1, len(rates) - 1)), "fast"]
    assert list(groups) == names[: len(rates)]


# Parameter groups -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["concat", "pam"])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_every_trained_parameter_is_in_exactly_one_group(levels, method, chain, fits):
    learner = chain(
        nested_lora_levels=levels, head_lr=0.3, nested_lora_lr_slow=0.01, nested_lora_consolidation_method=method
    )
    for task in range(2):
        groups = groups_of(learner, fits, task)
        every = [p for g in groups.values() for p in g.parameters]
        assert len({id(p) for p in every}) == len(every)
        assert (
            {id(p) for p in every} == {id(p) for p in learner.parameters() if p.requires_grad} == set(learner.trained)
        )
        assert groups["head"].lr == 0.3 and {id(p) for p in groups["head"].parameters} == {
            id(p) for p in learner.head.parameters()
        }
        slow = [p for a in learner.backbone.slots.values() for p in a.trainable(a.slow)]
        assert groups["slow"].lr == 0.01 and [id(p) for p in groups["slow"].parameters] == [id(p) for p in slow]
        learner.consolidate(toy_stream().task(task))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_slow_rate_of_0_or_an_interval_never_reached_keeps_slow_to_the_bit(optimizer, chain):
    def moved(**settings):
        learner = chain(optimizer=optimizer, weight_decay=0.1, **settings)
        with torch.no_grad():
            for nested in learner.backbone.slots.values():
                nn.init.normal_(nested.slow.up_proj.weight)
        before = [p.clone() for a in learner.backbone.slots.values() for p in a.slow.parameters()]
        learn(learner, toy_stream(), 1, consolidate=False)
        after = [p for a in learner.backbone.slots.values() for p in a.slow.parameters()]
        before, after = before[::2], after[::2]  # the weights: biases of dead units have no reason to move
        return [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]

    assert moved() == [True] * 4
    assert moved(nested_lora_lr_slow=0.0) == [False] * 4
    assert moved(nested_lora_update_interval_slow=7) == [False] * 4  # 2 epochs of 3 steps
    assert moved(nested_lora_update_interval_slow=6) == [True] * 4


def test_gradients_of_skipped_steps_are_dropped_or_their_mean_is_taken_by_key(chain, fits):
    ends = []
    for skipped in ("drop", "accumulate"):
        learner = chain(nested_lora_skipped_gradients=skipped, nested_lora_update_interval_slow=3, nested_lora_levels=3)
        groups = groups_of(learner, fits)
        assert [(g.skipped, g.interval) for g in groups.values()][:3] == [(skipped, 3), (skipped, 2), ("drop", 1)]
        ends.append(learner.backbone.slots["2"].slow.up_proj.bias.detach().clone())
    assert largest(ends[0] - ends[1]) > 1e-6


def test_head_rows_of_other_tasks_stay_unless_asked_for(chain):
    def moved(flag):
        learner = learn(chain(weight_decay=0.1, decay_other_rows=flag), toy_stream(), 1)
        before = learner.head.weight.detach().clone()
        learn(learner, toy_stream(), 2, first=1)
        return [not torch.equal(a, b) for a, b in zip(before, learner.head.weight, strict=True)]

    assert moved(False) == [False, False, True, True, False, False] and moved(True) == [True] * 6


# Recalibration ----------------------------------------------------------------------------------------------------------


def test_recalibration_lowers_the_loss_by_the_tasks_own_rows_alone(chain):
    def run(flag):
        stream = toy_stream()
        learner = chain(nested_lora_consolidation_alpha=0.3, head_recalibration=flag, weight_decay=0.1, epochs=5)
        learn(learner, stream, 2, consolidate=False)
        trained = learner.head.weight.detach().clone()
        learner.consolidate(stream.task(1))
        with torch.no_grad():
            features, labels = learner.features_of(stream.task(1).train)
            loss = nn.functional.cross_entropy(learner.head(features)[:, 2:4], labels - 2).item()
        same = [torch.equal(a, b) for a, b in zip(trained, learner.head.weight, strict=True)]
        return loss, same, learner

    (plain, kept, without), (refitted, changed, learner) = run(False), run(True)
    assert refitted < plain - 1e-3
    assert kept == [True] * 6 and changed == [True, True, False, False, True, True]
    own, other = learner.own_state(), without.own_state()
    assert [k for k in own if not torch.equal(own[k], other[k])] == ["head.weight", "head.bias"]
    assert [r["phase"] for r in rows(learner, "epoch")][-10:] == ["func"] * 5 + ["recalibrate"] * 5


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"nested_lora_levels": 3, "nested_lora_level_lrs": [0.1, 0.2]}, "nested_lora_level_lrs: 2 values, but"),
        ({"nested_lora_level_lrs": [0.1]}, "nested_lora_levels 2 has 0 levels between slow and fast"),
        ({"nested_lora_levels": 4, "nested_lora_level_intervals": [2]}, "nested_lora_level_intervals: 1 values"),
        ({"nested_lora_levels": 3, "nested_lora_level_intervals": [0]}, "every value must be above 0; got [0]"),
        ({"nested_lora_levels": 3, "nested_lora_level_lrs": [101]}, "every rate must be at most 100; got [101.0]"),
        ({"nested_lora_levels": 1, "nested_lora_lr_fast": 0.1}, "nested_lora_lr_fast: acts on fast adapters"),
        ({"nested_lora_consolidation_method": "ties"}, 'the function only for nested_lora_activation "none"'),
        (
            {"nested_lora_consolidation_method": "ema", "nested_lora_consolidation_alpha": 2.0},
            "nested_lora_consolidation_alpha: ema averages slow and fast, so at most 1 is expected; got 2",
        ),
        ({"min_lr": 0.005, "nested_lora_lr_slow": 0.001}, "min_lr: 0.005 is above nested_lora_lr_slow 0.001"),
        (
            {"min_lr": 0.005, "nested_lora_levels": 3, "nested_lora_level_lrs": [0.001]},
            "min_lr: 0.005 is above nested_lora_level_lrs 0.001",
        ),
        ({"min_lr": 0.005, "init_lr": 0.01}, "min_lr: 0.005 is above 0.001, the slow rate"),
        ({"head_recalibration": True, "head": "ncm"}, "head_recalibration: refits the linear head, which head 'ncm'"),
        ({"head_lr": 0.0}, "head_lr: must be greater than 0"),  # there may be nothing else to train
        ({"router_lr": 0.1}, "router_lr: unknown key of nested_lora, it belongs to dylora_moe, sema"),
        ({"nested_lora_eval": "both"}, "nested_lora_eval: must be 'combined', 'slow' or 'fast'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(values, expected):
    assert [fault for fault in faults_of("nested_lora", **values) if expected in fault], faults_of(
        "nested_lora", **values
    )


@pytest.mark.parametrize(
    ("method", "values", "expected"),
    [
        (
            "slca",
            {"init_lr": 0.01, "min_lr": 0.005},
            "min_lr: 0.005 is above 0.0001, the backbone's rate (bcb_lrscale)",
        ),
        ("sema", {"init_lr": 0.01, "min_lr": 0.005, "router_lr": 0.001}, "min_lr: 0.005 is above router_lr 0.001"),
    ],
)
def test_no_rate_may_start_below_where_its_cosine_ends(method, values, expected):
    assert faults_of(method, **values) == [expected]


def test_keys_of_nested_adapters_are_refused_by_plain_sema_by_name():
    keys = {"nested_lora_rank": 4, "nested_lora_lr_slow": 0.001, "head_recalibration": True}
    faults = faults_of("sema", ffn_adapter_type="adaptmlp", **keys)
    assert sorted(f.partition(":")[0] for f in faults) == sorted(keys)
    assert all('set ffn_adapter_type to "nested_lora" or remove it' in f for f in faults)


# Resume -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"nested_lora_consolidation_interval": 2},
        {"nested_lora_consolidation_rank": 3},
        {"nested_lora_levels": 4, "nested_lora_eval": "slow", "optimizer": "adam"},
        {"nested_lora_consolidation_method": "pam", "nested_lora_eval": "fast"},
    ],
    ids=["rank has grown", "a merge is not due yet", "rank is capped", "four levels", "pam"],
)
@pytest.mark.parametrize("done", [1, 2])
def test_odd_states_are_restored_exactly(settings, done, chain):
    stream = toy_stream()
    whole = learn(chain(**settings), stream, done)
    structure, saved = json.loads(json.dumps(whole.structure())), state(whole)
    fresh = chain(**settings)
    fresh.restore(structure)
    fresh.load_own_state(saved)
    assert torch.equal(logits(fresh), logits(whole))
    for learner in (whole, fresh):
        learn(learner, stream, 3, first=done)
    assert torch.equal(logits(fresh), logits(whole)) and fresh.structure() == whole.structure()
    assert all(torch.equal(v, fresh.own_state()[k]) for k, v in whole.own_state().items())


def test_planned_parameters_count_what_is_trained(chain):
    learner = chain(nested_lora_lr_slow=0.0)
    lines = learner.planned_parameters()
    learn(learner, toy_stream(), 1, consolidate=False)
    assert lines[0] == ("every task", sum(p.numel() for p in learner.trained.values()))
    assert "  of these fast, rate 0.05" in dict(lines) and dict(lines)["  slow is frozen: its rate is 0"] == 0


def test_facts_of_every_pair_are_of_the_state_before_the_first_merge(chain):
    """The slower pair merges first and empties the middle level; the row of the faster pair must still tell what it held."""
    learner = learn(chain(nested_lora_levels=3), toy_stream(), 1)
    generator = torch.Generator().manual_seed(0)
    for adapter in learner.backbone.slots.values():
        adapter.use("combined")
        for part in adapter.adapters():
            with torch.no_grad():
                part.up_proj.weight.normal_(generator=generator)
    task = toy_stream().task(1)
    inputs = slot_inputs(learner, task, learner.layers)
    for layer, adapter in nesting.nested_of(learner, learner.layers).items():
        with torch.no_grad():
            slow, middle, fast = (nesting.size(part(inputs[layer])) for part in adapter.adapters())
        facts = nesting.merge(learner, task, f"again.{layer}", adapter, inputs[layer], where={"layer": layer})
        assert [(f["slow_output"], f["fast_output"]) for f in facts] == [(slow, middle), (middle, fast)]
        assert [f["fast_share"] for f in facts] == pytest.approx(
            [middle / (slow + middle + fast), fast / (slow + middle + fast)]
        )


def test_what_does_not_act_is_told():
    told = {
        "nested_lora_eval fast": {"nested_lora_eval": "fast"},
        "nested_lora_skipped_gradients does not act": {"nested_lora_skipped_gradients": "accumulate"},
        "do not act with nested_lora_levels 1": {"nested_lora_levels": 1, "nested_lora_reset": "zero"},
        "do not act with nested_lora_levels 1: nested_lora_consolidation_rank": {
            "nested_lora_levels": 1,
            "nested_lora_consolidation_rank": 4,
        },
        "do not act with nested_lora_use_consolidation false: nested_lora_consolidation_method": {
            "nested_lora_use_consolidation": False,
            "nested_lora_consolidation_method": "svd",
        },
        "nested_lora_consolidation_alpha 1 with ema keeps fast alone": {"nested_lora_consolidation_method": "ema"},
    }
    for start, keys in told.items():
        (line,) = toy_settings("nested_lora", **keys).remarks()
        assert start in line
    assert not list(toy_settings("nested_lora", nested_lora_eval="slow").remarks())
