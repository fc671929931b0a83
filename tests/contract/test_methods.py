"""The contract, held for every method found in models/, those added later included."""

import json

import pytest
import torch

import models
from tests.helpers.methods import HEADS, METHODS, images_of, run
from tests.helpers.toy import toy_backbone, toy_stream


def test_the_methods_of_this_issue_are_there():
    assert {"sema", "finetune", "simplecil", "joint"} <= set(METHODS)


@pytest.mark.parametrize(("method", "head"), HEADS)
def test_learns_and_predicts_over_the_classes_seen(method, head, toy_learner):
    stream, learner = toy_stream(), toy_learner(method, head=head)
    for index, seen in enumerate((2, 4, 6)):
        learner.begin_task()
        task = stream.task(index, with_past=learner.uses_past)
        learner.learn(task)
        learner.consolidate(task)
        learner.eval()
        with torch.inference_mode():
            scores, features = learner.logits(images_of(stream)), learner.features(images_of(stream))
            chosen = learner.head if head == "linear" else learner.statistics
            torch.testing.assert_close(scores, chosen(features)[:, :seen], rtol=1e-5, atol=1e-5)
        assert scores.shape == (8, seen) and torch.isfinite(scores).all()
        assert not any(p.requires_grad for p in learner.parameters())
        assert len(learner.adapters_per_layer()) == learner.backbone.depth


@pytest.mark.parametrize(("method", "head"), HEADS)
def test_the_backbone_changes_only_where_declared_and_prediction_changes_nothing(method, head, toy_learner):
    stream = toy_stream()
    backbone = toy_backbone()
    frozen = {k: v.clone() for k, v in backbone.vit.state_dict().items()}
    learner = run(toy_learner(method, backbone=backbone, head=head), stream)
    moved = {k for k, v in backbone.vit.state_dict().items() if not torch.equal(v, frozen[k])}
    assert bool(moved) == learner.trains_backbone
    assert moved <= {k.removeprefix("backbone.vit.") for k in learner.own_state()}  # a checkpoint has them
    before = {k: v.clone() for k, v in learner.state_dict().items()}
    for mode in (True, False):  # not even in training mode
        learner.train(mode)
        with torch.no_grad():
            learner.logits(images_of(stream))
    after = learner.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in before.items())


@pytest.mark.parametrize(("method", "head"), HEADS)
def test_a_sample_alone_scores_as_in_a_batch(method, head, toy_learner):
    stream = toy_stream()
    learner = run(toy_learner(method, head=head), stream).double()
    images = images_of(stream)
    with torch.no_grad():
        together = learner.logits(images)
        alone = torch.cat([learner.logits(image[None]) for image in images])
    # in float64; scores of a ridge or lda head carry weights that a solve of large condition has made large
    solved = head in ("ridge", "lda")
    torch.testing.assert_close(alone, together, rtol=1e-12 if solved else 0, atol=1e-8 if solved else 1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_run_other_seed_other_start(method, toy_learner):
    def weights(seed):
        stream = toy_stream(seed=seed, class_order_seed=5)
        return run(toy_learner(method, seed=seed), stream).own_state()

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(v, again[k]) for k, v in first.items())
    if method != "simplecil":  # its prototypes follow from data and backbone alone
        assert any(v.shape != other[k].shape or not torch.equal(v, other[k]) for k, v in first.items() if k in other)


@pytest.mark.parametrize(("method", "head"), HEADS)
def test_structure_and_weights_restore_exactly_and_learning_goes_on_alike(method, head, toy_learner):
    stream, keys = toy_stream(), {"head": head, "head_projection_dim": None if head in ("linear", "aligned") else 9}
    whole = run(toy_learner(method, **keys), stream, tasks=2)
    structure = json.loads(json.dumps(whole.structure()))
    state = {k: v.clone() for k, v in whole.own_state().items()}
    fresh = toy_learner(method, **keys)
    fresh.restore(structure)
    fresh.load_own_state(state)
    for learner in (whole, fresh):
        learner.begin_task()
        task = stream.task(2, with_past=learner.uses_past)
        learner.learn(task)
        learner.consolidate(task)
        learner.eval()
    with torch.inference_mode():
        assert torch.equal(whole.logits(images_of(stream)), fresh.logits(images_of(stream)))
    assert all(torch.equal(v, fresh.own_state()[k]) for k, v in whole.own_state().items())


@pytest.mark.parametrize("method", METHODS)
def test_a_state_that_does_not_fit_is_refused_with_names(method, toy_learner):
    learner = run(toy_learner(method), toy_stream(), tasks=1)
    state = dict(learner.own_state())
    name = sorted(state)[0]
    del state[name]
    with pytest.raises(ValueError, match=f"missing: {name}"):
        learner.load_own_state({**state})
    with pytest.raises(ValueError, match="unexpected: strange"):
        learner.load_own_state({**learner.own_state(), "strange": torch.zeros(1)})


@pytest.mark.parametrize("method", METHODS)
def test_only_declared_methods_get_past_data(method, toy_learner):
    learner = toy_learner(method)
    assert learner.uses_past == (method == "joint")
    assert toy_stream().task(2).past == () and len(toy_stream().task(2, with_past=True).past) == 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "sizes", [(1, 1), (3, 2), (6, 1), (2, (1, 3))], ids=["one class each", "ragged", "one task", "listed"]
)
def test_odd_splits_run(method, sizes, toy_learner):
    split = {"init_cls": sizes[0], "increment": sizes[1]}
    stream = toy_stream(**split)
    stated = split if isinstance(sizes[1], tuple) else {}  # else the learner's settings have three tasks of two
    learner = run(toy_learner(method, epochs=1, func_epoch=1, rd_epoch=1, **stated), stream)
    with torch.inference_mode():
        assert learner.logits(images_of(stream)).shape[1] == 6


@pytest.mark.parametrize("method", METHODS)
def test_settings_are_read_without_torch_and_equal_those_of_the_module(method):
    light = models.settings_of(method)
    heavy = __import__(f"models.{method}", fromlist=["Settings"]).Settings
    assert light.model_json_schema() == heavy.model_json_schema()
    assert all(field.description for field in light.model_fields.values())


def test_a_loss_that_is_not_finite_stops_before_the_step(toy_learner):
    learner = toy_learner("finetune", init_lr=0.05)
    with torch.no_grad():
        learner.head.weight.fill_(float("inf"))
    before = {k: v.clone() for k, v in learner.own_state().items()}
    with pytest.raises(ValueError, match=r"loss is nan at task 1, phase func, epoch 1, step 1"):
        learner.learn(toy_stream().task(0))
    assert all(torch.equal(v, learner.own_state()[k]) for k, v in before.items())
