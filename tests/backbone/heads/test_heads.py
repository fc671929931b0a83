"""Class statistics: hand-worked values, the same solution in whatever order images came, lambda, and what their age costs."""

import json
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from torch.nn import functional as F

import models
from backbone.heads.heads import HELD_OUT, RIDGES, StatisticsHead
from tests.helpers.toy import learn_and_score, toy_backbone, toy_dataset, toy_settings, toy_stream
from utils.data.tasks import TaskStream
from utils.evaluation import head_drift
from utils.evaluation import scores as evaluation
from utils.run.record import RunRecord, results_json


def head(kind, width=2, classes=3, projection_dim=None, seed=0):
    made = StatisticsHead(kind, width, classes, projection_dim)
    made.reset_parameters(torch.Generator().manual_seed(seed))
    return made


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(learner, kind):
    lines = (learner.log.folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def learned(learner, stream, tasks=None):
    for index in range(tasks or len(stream)):
        task = stream.task(index, with_past=learner.uses_past)
        learner.learn(task)
        learner.consolidate(task)
    return learner


# ---------------------------------------------------------------- the head alone


def test_hand_worked_nearest_mean():
    ncm = head("ncm")
    ncm.add(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0, 1]))
    ncm.solve()
    assert ncm.counts.tolist() == [2, 1, 0] and ncm.sums.tolist() == [[4, 0], [0, 2], [0, 0]]
    assert ncm.gram is None and ncm.weight.tolist() == [[2, 0], [0, 2], [0, 0]]
    scores = ncm(torch.tensor([[3.0, 4.0]]))
    torch.testing.assert_close(scores, torch.tensor([[0.6, 0.8, 0.0]]))  # cosines; no image, no score


def test_hand_worked_ridge():
    ridge = head("ridge")
    ridge.add(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0, 2]))
    ridge.solve()  # G = diag(2, 4), lambda 1 from the start
    assert ridge.gram.tolist() == [[2, 0], [0, 4]] and float(ridge.ridge) == 1
    expected = torch.tensor([[2 / 3, 0], [0, 0], [0, 2 / 5]], dtype=torch.float64)
    torch.testing.assert_close(ridge.weight, expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(ridge(torch.tensor([[3.0, 5.0]])), torch.tensor([[2.0, 0.0, 2.0]]))


@pytest.mark.parametrize("dim", [None, 7])
def test_ridge_task_by_task_is_the_direct_solution_over_all_images(dim, monkeypatch):
    monkeypatch.setattr("backbone.heads.heads.ROWS", 4)
    x, y = normal(30, 5), torch.arange(30) // 5
    ridge = head("ridge", 5, 6, dim)
    for part in (slice(0, 10), slice(10, 20), slice(20, 30)):
        ridge.add(x[part], y[part])
        ridge.solve()
    lifted = x if dim is None else (x @ ridge.projection).clamp(min=0)
    assert dim is None or lifted.shape == (30, 7)
    # least squares with sqrt(lambda) I below the images: no normal equations
    stacked = torch.cat([lifted, torch.eye(lifted.shape[1], dtype=torch.float64)])
    targets = torch.cat([F.one_hot(y, 6).double(), torch.zeros(lifted.shape[1], 6, dtype=torch.float64)])
    direct = torch.linalg.lstsq(stacked, targets).solution
    torch.testing.assert_close(ridge.weight, direct.T, rtol=0, atol=1e-10)
    torch.testing.assert_close(ridge(x), lifted @ direct, rtol=0, atol=1e-10)


def test_the_projection_is_standard_normal_and_its_own_draw():
    first, again, other = (head("ncm", 40, 3, 500, seed) for seed in (1, 1, 2))
    assert torch.equal(first.projection, again.projection) and not torch.equal(first.projection, other.projection)
    assert abs(float(first.projection.mean())) < 0.03 and abs(float(first.projection.std()) - 1) < 0.03
    assert not list(first.parameters()) and head("ncm").projection is None


def test_scores_have_the_precision_of_the_features_and_statistics_have_double():
    for kind in ("ncm", "ridge"):
        made = head(kind)
        made.add(torch.ones(1, 2), torch.tensor([0]))
        made.solve()
        assert made(torch.ones(1, 2)).dtype == torch.float32
        assert {t.dtype for t in made.state_dict().values()} == {torch.float64}


def test_lambda_is_the_one_a_hand_worked_task_needs():
    """Ten kept images at 1 give the weight 10 / (10 + lambda); one held out at 11 is scored 1 with lambda 100 alone."""
    features, labels = torch.tensor([[1.0]] * 10 + [[0.0], [11.0], [0.0]]), torch.tensor([0] * 10 + [1, 0, 1])
    ridge = head("ridge", 1, 2)
    errors = ridge.choose_ridge(features, labels, torch.arange(13) >= 11)
    assert float(ridge.ridge) == 100 and errors[RIDGES.index(100)] == pytest.approx(0.5, abs=1e-12)
    assert errors[0] == pytest.approx((10**2 + 1) / 2)  # nearly no lambda: 11 instead of 1, and class 1 is never found
    assert not ridge.counts.any() and not ridge.gram.any()  # choosing adds nothing


@pytest.mark.parametrize("older", [0, 200], ids=["first task", "after others"])
def test_lambda_is_chosen_on_top_of_what_older_tasks_left(older):
    """Two noisy classes in 42 directions, fitted together with 200 images of two older classes, or alone."""
    y, held = torch.arange(60) % 2, torch.arange(60) % 5 == 0
    x = F.one_hot(y, 42) + normal(60, 42)
    old, old_y = normal(older, 42, seed=5), torch.arange(older) % 2 + 2
    ridge = head("ridge", 42, 4)
    ridge.add(old, old_y)
    errors = ridge.choose_ridge(x, y, held)
    fitted, targets = torch.cat([old, x[~held]]), F.one_hot(torch.cat([old_y, y[~held]]), 4).double()
    for value, error in zip(RIDGES, errors, strict=True):
        weight = torch.linalg.solve(fitted.T @ fitted + value * torch.eye(42), fitted.T @ targets)
        left = x[held] @ weight - F.one_hot(y[held], 4)
        assert error == pytest.approx(float(left.square().sum(1).mean()), rel=1e-6)
    assert float(ridge.ridge) == RIDGES[errors.index(min(errors))] and RIDGES[0] < float(ridge.ridge) < RIDGES[-1]


def test_ties_go_to_the_larger_lambda():
    ridge = head("ridge", 2, 2)
    ridge.choose_ridge(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]), torch.tensor([False, False, True, True]))
    assert float(ridge.ridge) == RIDGES[-1]  # features that say nothing: every candidate errs alike


def test_lambda_grows_where_rounding_leaves_no_positive_definite_matrix():
    ridge = head("ridge", 3, 2)
    ridge.add(1e8 * torch.ones(5, 3, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 1]))
    ridge.ridge.fill_(1e-8)
    ridge.solve()
    assert float(ridge.ridge) > 1e-8 and torch.isfinite(ridge.weight).all()


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="features are not finite"):
        head("ridge").add(torch.tensor([[float("nan"), 0.0]]), torch.tensor([0]))


def test_an_emptied_copy_keeps_projection_and_lambda():
    made = head("ridge", 3, 2, 5)
    made.add(normal(4, 3), torch.tensor([0, 1, 0, 1]))
    made.ridge.fill_(10)
    other = made.emptied()
    assert torch.equal(other.projection, made.projection) and float(other.ridge) == 10
    assert not any(t.any() for t in (other.counts, other.sums, other.gram, other.weight)) and made.gram.any()


# ---------------------------------------------------------------- in a learner


def test_frozen_features_with_ncm_are_simplecil(toy_learner):
    stream, backbone = toy_stream(), toy_backbone()
    images = next(iter(stream.test(0).batches(8, augment=False)))[0]
    simple = learned(toy_learner("simplecil", backbone=backbone), stream)
    tuned = learned(toy_learner("finetune", backbone=backbone, trainable="head", head="ncm", epochs=1), stream)
    with torch.no_grad():
        torch.testing.assert_close(simple.logits(images), tuned.logits(images))
        trained = [next(iter(stream.task(t).train.batches(20, augment=False))) for t in range(3)]  # 10 of each class
        means = [simple.features(x[y == c]).mean(0) for t, (x, y, _) in enumerate(trained) for c in (2 * t, 2 * t + 1)]
        cosines = F.cosine_similarity(simple.features(images)[:, None], torch.stack(means), dim=2)
    torch.testing.assert_close(simple.logits(images), cosines)


def test_ridge_of_simplecil_is_the_direct_solution_over_all_tasks(toy_learner, monkeypatch):
    monkeypatch.setattr("backbone.heads.heads.RIDGES", (1.0,))  # the toy picks 1e-8, at which 1e-10 is beyond rounding
    stream = toy_stream()
    learner = learned(toy_learner("simplecil", backbone=toy_backbone().double(), head="ridge"), stream)
    found = [learner.features_of(stream.task(t).train) for t in range(3)]
    x, y = torch.cat([f for f, _ in found]), torch.cat([c for _, c in found])
    direct = torch.linalg.solve(x.T @ x + torch.eye(16), x.T @ F.one_hot(y, 6).double())
    torch.testing.assert_close(learner.statistics.weight, direct.T, rtol=0, atol=1e-10)


def test_lambda_of_the_learner_comes_from_a_stratified_share_of_the_task(toy_learner):
    stream = toy_stream()
    learner = learned(toy_learner("simplecil", head="ridge"), stream, tasks=1)
    (row,) = rows(learner, "head")
    kept, held = stream.task(0).train.split(HELD_OUT, draw="ridge")
    assert held.labels.bincount().tolist() == [2, 2]
    slow = head("ridge", 16, 6)
    parts = [learner.features_of(part) for part in (kept, held)]
    errors = slow.choose_ridge(*(torch.cat(pair) for pair in zip(*parts, strict=True)), torch.arange(20) >= 16)
    assert row["errors"] == pytest.approx(errors, rel=1e-3)
    assert (row["task"], row["head"], row["ridge"]) == (0, "ridge", float(slow.ridge))


def test_a_class_with_one_image_keeps_the_former_lambda(toy_learner):
    learner = learned(toy_learner("simplecil", head="ridge"), toy_stream(toy_dataset(train=1)), tasks=2)
    assert [(r["ridge"], r["errors"]) for r in rows(learner, "head")] == [(1.0, None)] * 2
    assert "none to choose the ridge head's lambda on, it stays 1" in (learner.log.folder / "run.log").read_text()


def test_joint_starts_its_statistics_afresh(toy_learner):
    stream = toy_stream()
    learner = learned(toy_learner("joint", head="ridge", head_projection_dim=9, epochs=1), stream)
    assert learner.statistics.counts.tolist() == [10.0] * 6
    fresh = learner.statistics.emptied()
    fresh.add(*learner.features_of(stream.task(2).train.join(*stream.task(2, with_past=True).past)))
    # all by the features of the last task, which are float32
    torch.testing.assert_close(fresh.gram, learner.statistics.gram, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", models.available())
def test_what_is_kept_does_not_grow_with_the_number_of_images(method, toy_learner):
    heads, sizes = get_args(models.settings_of(method).model_fields["head"].annotation), []
    head = "ridge" if "ridge" in heads else "ncm"
    for train in (4, 8):
        stream = toy_stream(toy_dataset(train=train))
        learner = learned(toy_learner(method, head=head, epochs=1, func_epoch=1, rd_epoch=1), stream, tasks=1)
        assert learner.statistics.counts.sum() == 2 * train
        sizes.append({name: tensor.shape for name, tensor in learner.own_state().items()})
    assert sizes[0] == sizes[1]


def test_gathering_counts_no_training_views_and_trains_the_same_weights(toy_learner):
    stream = toy_stream()
    plain, gathering = (learned(toy_learner("finetune", head=kind), stream) for kind in ("linear", "ridge"))
    assert plain.images_shown == gathering.images_shown == 2 * 60
    own = gathering.own_state()
    assert all(torch.equal(tensor, own[name]) for name, tensor in plain.own_state().items())
    assert {name.partition(".")[0] for name in own.keys() - plain.own_state().keys()} == {"statistics"}


def test_a_projection_without_statistics_is_an_error():
    faults = list(toy_settings("finetune", head_projection_dim=5).cross_checks())
    assert [keys for keys, _ in faults] == [("head_projection_dim", "head")]
    assert not list(toy_settings("finetune", head_projection_dim=5, head="ncm").cross_checks())


# ---------------------------------------------------------------- what age costs


def scored(learner, stream: TaskStream):
    """Runs main's own loop over the tasks; returns (drift rows, results)."""
    classes = [[stream.order[c] for c in span] for span in evaluation.spans(stream.sizes)]
    record = RunRecord(learner.cfg.model_name, "toy", 1, stream.order, classes)
    for index in range(len(stream)):
        learn_and_score(learner, stream, index, record)
    return rows(learner, "drift"), results_json(RunRecord.from_dict(record.to_dict()))


@pytest.mark.parametrize("kind", ["ncm", "ridge"])
def test_statistics_of_frozen_features_do_not_age(kind, toy_learner):
    learner = toy_learner("finetune", trainable="head", head=kind, head_projection_dim=20, epochs=1)
    told, results = scored(learner, toy_stream())
    assert [r["task"] for r in told] == [1, 2]
    assert all(r["stale"] == r["recomputed"] and r["cosine"] == pytest.approx(1, abs=1e-12) for r in told)
    assert [r["stale"] for r in results["head_drift"]] == results["top1_curve"][1:]
    renewed = head_drift.renewed_statistics(learner, toy_stream(), 2)
    state = renewed.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in learner.statistics.state_dict().items())


@pytest.mark.parametrize("kind", ["ncm", "ridge"])
def test_statistics_of_moving_adapters_age_and_recomputed_ones_do_not(kind, toy_learner):
    stream = toy_stream()
    learner = toy_learner("finetune", head=kind, epochs=4, init_lr=0.3)
    told, results = scored(learner, stream)
    assert all(-1 <= r["cosine"] < 0.9999 for r in told)
    renewed, stale = head_drift.renewed_statistics(learner, stream, 2), learner.statistics
    assert torch.equal(renewed.sums[4:], stale.sums[4:])  # the last task is as it was gathered
    assert not torch.isclose(renewed.sums[:4], stale.sums[:4]).all(dim=1).any()
    cosines = F.cosine_similarity(renewed.sums[:4], stale.sums[:4])
    assert told[-1]["cosine"] == pytest.approx(float(cosines.mean()))
    assert torch.equal(renewed.counts, stale.counts) and torch.equal(renewed.ridge, stale.ridge)
    by_hand = {}
    for name, weights in (("stale", stale), ("recomputed", renewed)):
        right = 0
        for task in range(3):
            images, labels, _ = next(iter(stream.test(task).batches(100, augment=False, shuffle=False)))
            with torch.inference_mode():
                right += int((weights(learner.features(images)).argmax(1) == labels).sum())
        by_hand[name] = 100 * right / 24
    entry = results["head_drift"][-1]
    assert {name: entry[name] for name in by_hand} == pytest.approx(by_hand)
    assert entry["stale"] == results["last_accuracy"] and (entry["task"], entry["cosine"]) == (2, told[-1]["cosine"])
    assert results["test_evaluations"] == 3  # both heads are scored in one pass


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("finetune", {"head": "linear"}),
        ("finetune", {"head": "ncm", "head_drift": False}),
        ("simplecil", {}),
        ("joint", {"head": "ncm"}),
    ],
)
def test_nothing_is_measured_where_nothing_ages_or_it_is_off(method, keys, toy_learner):
    told, results = scored(toy_learner(method, epochs=1, **keys), toy_stream())
    assert told == [] and results["head_drift"] == []


def test_measuring_changes_no_number(toy_learner):
    curves = [scored(toy_learner("finetune", head="ridge", head_drift=on), toy_stream())[1] for on in (True, False)]
    assert curves[0]["accuracy_matrix"] == curves[1]["accuracy_matrix"]


def test_each_test_image_passes_the_backbone_once(toy_learner):
    stream, learner = toy_stream(), toy_learner("finetune", head="ncm", epochs=1)
    learned(learner, stream)
    real, count = learner.backbone.forward, SimpleNamespace(images=0)

    def counting(images, *rest):
        count.images += len(images)
        return real(images, *rest)

    learner.backbone.forward = counting
    renewed = head_drift.renewed_statistics(learner, stream, 2)
    assert count.images == 60
    evaluation.evaluate(learner, stream, 2, torch.device("cpu"), {"renewed": renewed})
    assert count.images == 60 + 24
