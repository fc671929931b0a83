"""Distillation in dylora_moe: what the teacher keeps of mature experts, and when one is needed."""

import pytest
import torch

from models.families.experts import distance
from tests.helpers.dylora import ALWAYS, NEVER, teach
from tests.helpers.nested import images_of
from tests.helpers.toy import toy_stream


@pytest.mark.parametrize(
    ("on", "coefficient", "targets"),
    [("features", 3.0, None), ("logits", 100.0, None), ("features", 3.0, ("qkv", "fc2"))],
)
def test_distillation_holds_what_mature_experts_knew(on, coefficient, targets, dylora_moe):
    stream = toy_stream()
    images = next(iter(stream.task(1).train.batches(100, augment=False)))[0]

    def drift(weight):
        """How far the new images' scores of the old classes move."""
        keys = {"distill_coef": weight, "distill_on": on, "weight_decay": 0.0, "epochs": 6}
        keys |= {"lora_target": targets}
        learner = teach(dylora_moe(**NEVER, **keys), 1, stream=stream)
        with torch.no_grad():
            before = learner.logits(images)
        teach(learner, 2, first=1, stream=stream)
        with torch.no_grad():
            moved = learner.logits(images)[:, :2] - before
        return float((moved - moved.mean(dim=1, keepdim=True)).norm())  # a shift of all scores is no change

    assert drift(coefficient) < 0.7 * drift(0.0)


def test_a_teacher_is_needed_only_where_a_mature_expert_learns(dylora_moe, monkeypatch):
    from models import dylora_moe as method

    calls = []
    monkeypatch.setattr(method, "distance", lambda *a: calls.append(1) or distance(*a))
    teach(dylora_moe(**ALWAYS, distill_coef=1.0, train_experts="target"))
    teach(dylora_moe(**NEVER, distill_coef=0.0))
    assert not calls
    teach(dylora_moe(**ALWAYS, distill_coef=1.0, train_experts="open"), 2)
    assert calls


def measured(learner, features, images, teacher):
    """The distance while task 1 is learned, whose first class is 2."""
    return distance(learner, teacher, features, images, 2, learner.cfg.distill_on)


def test_the_distances_by_hand(dylora_moe):
    stream = toy_stream()
    learner = teach(dylora_moe(**NEVER, distill_coef=1.0), 1, stream=stream)
    images = images_of(stream)
    teacher = learner.teacher()
    with torch.no_grad():
        was = learner.features(images)
        now = was + 0.5
        assert float(measured(learner, now, images, teacher)) == pytest.approx(0.25, rel=1e-5)
        object.__setattr__(learner, "cfg", learner.cfg.model_copy(update={"distill_on": "logits"}))
        assert float(measured(learner, was, images, teacher)) == pytest.approx(0, abs=1e-6)
        p, q = ((learner.head(f)[:, :2] / 2).softmax(1) for f in (was, now * 3))
        expected = 4 * (p * (p / q).log()).sum(1).mean()
        assert float(measured(learner, now * 3, images, teacher)) == pytest.approx(float(expected), rel=1e-4)


def test_the_teacher_scores_with_the_head_it_had(dylora_moe):
    stream = toy_stream()
    learner = teach(dylora_moe(**NEVER, distill_coef=1.0, distill_on="logits"), 1, stream=stream)
    teacher, images = learner.teacher(), images_of(stream)
    with torch.no_grad():
        features = learner.features(images)
        assert float(measured(learner, features, images, teacher)) == pytest.approx(0, abs=1e-6)
        learner.head.weight[:2] *= 0.1
        assert float(measured(learner, features, images, teacher)) > 1e-4
