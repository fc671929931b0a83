"""All heads of every method in one run (`compare_heads`): each predicts, restores, repairs, as it would alone."""

import json
from typing import get_args

import pytest
import torch

import models
from tests.helpers.methods import METHODS, images_of, run
from tests.helpers.toy import toy_backbone, toy_stream
from utils.run.record import RunRecord, results_json
from utils.run.task import score

SEVERAL = [m for m in METHODS if len(get_args(models.settings_of(m).model_fields["head"].annotation)) > 1]
FAST = {"epochs": 1, "func_epoch": 1, "rd_epoch": 1, "tuned_epoch": 1, "init_epochs": 1, "ca_epochs": 1}
FAST |= {"head_align_epochs": 2, "head_align_samples": 8, "compare_heads": True}

# Two learners train the third task from one state, in float64: kernels may round a tensor by where it lies in memory, by 1e-16
# of it, and the steps pass that on.
CLOSE = {"rtol": 1e-6, "atol": 1e-9}
# lda solves with the covariance of a few toy images, which is nearly singular: its weights reach 1e7 and move by 1e-5 of that.
SOLVED = {"rtol": 1e-3, "atol": 1e-9}


def keys_of(method):
    """An aligned head where there is one, which is the newest; statistics are repaired where they can be stale."""
    schema = models.settings_of(method)
    heads = get_args(schema.model_fields["head"].annotation)
    repair = {"head_drift_repair": "linear"} if schema.features_move else {}
    return FAST | repair | {"head": "aligned" if "aligned" in heads else "lda"}


@pytest.mark.parametrize("method", SEVERAL)
def test_every_head_of_every_method_predicts_restores_and_goes_on_alike(method, toy_learner):
    stream, keys = toy_stream(), keys_of(method)
    whole = run(toy_learner(method, backbone=toy_backbone().double(), **keys).double(), stream, tasks=2)
    structure = json.loads(json.dumps(whole.structure()))
    fresh = toy_learner(method, backbone=toy_backbone().double(), **keys).double()
    fresh.restore(structure)
    fresh.double()  # what it has grown
    fresh.load_own_state({name: tensor.clone() for name, tensor in whole.own_state().items()})
    for learner in (whole, fresh):
        run(learner, stream, first=2)
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    heads, images = whole.compared_heads(), images_of(stream)
    options = set(get_args(models.settings_of(method).model_fields["head"].annotation))
    assert heads.keys() | {whole.cfg.head} == options and whole.cfg.head not in heads
    with torch.inference_mode():
        features = whole.features(images)
        torch.testing.assert_close(whole.logits(images), whole.statistics(features), rtol=1e-5, atol=1e-5)
        for name, head in heads.items():
            scores = head(features)
            assert scores.shape == (8, 6) and torch.isfinite(scores).all() and scores.dtype == features.dtype, name
            torch.testing.assert_close(
                scores,
                fresh.compared_heads()[name](fresh.features(images)),
                **CLOSE,
                msg=lambda text, name=name: f"{name}: {text}",
            )
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in before.items())
    for name, tensor in whole.own_state().items():
        bound = SOLVED if name.endswith(("lda.weight", "lda.bias")) else CLOSE
        torch.testing.assert_close(
            tensor, fresh.own_state()[name], **bound, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("head", ["ncm", "ridge", "lda", "aligned"])
def test_a_compared_head_scores_what_it_scores_where_it_predicts(head, toy_learner):
    """The same images, random draws and start values, so the same bits; and it is one look at the test images."""

    def results(**keys):
        stream, learner = toy_stream(), toy_learner("finetune", **(FAST | keys))
        record = RunRecord("finetune", "toy", 1, stream.order, [[0, 1], [2, 3], [4, 5]])
        measured = {"seconds": {}, "trainable_parameters": 0, "images": 0, "selections": []}
        for index in range(2):
            run(learner, stream, tasks=index + 1, first=index)
            score(learner, stream, index, record, measured)
        return results_json(RunRecord.from_dict(json.loads(json.dumps(record.to_dict()))))

    drifts = {"head_drift_repair": "mean", "head_drift": False, "head_align_covariance": "auto"}
    beside, alone = results(head="linear", **drifts), results(head=head, **drifts, compare_heads=False)
    assert beside["heads"][head] == alone["top1_curve"] and beside["heads"]["linear"] == beside["top1_curve"]
    assert list(beside["heads"]) == ["linear", "ncm", "ridge", "lda", "aligned"] and "heads" not in alone
    assert beside["test_evaluations"] == alone["test_evaluations"] == 2
