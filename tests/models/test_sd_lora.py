"""SD-LoRA: old directions are fixed and of unit size, their magnitudes learn, and a new task starts from the same function."""

import pytest
import torch

from models.sd_lora import START
from tests.helpers.toy import toy_backbone, toy_stream

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def learned(toy_learner, tasks, **keys):
    learner, stream = toy_learner("sd_lora", backbone=toy_backbone().double(), rank=2, **keys), toy_stream()
    for index in range(tasks):
        task = stream.task(index)
        learner.learn(task)
        learner.consolidate(task)
    return learner.eval(), stream


def sizes_of(learner, index):
    return [
        float(lora.up.norm() * lora.down.norm())
        for slot in learner.slots()
        for part in slot.parts
        for lora in [slot.of(part)[index]]
    ]


@pytest.mark.parametrize("restart", [False, True])
def test_what_the_next_task_starts_from(restart, toy_learner):
    learner, _ = learned(toy_learner, 2, restart_magnitudes=restart)
    magnitudes = [m.item() for m in learner.magnitudes]
    assert START not in magnitudes
    with torch.no_grad():
        before = learner.features(IMAGES)
        learner._fix_newest()
        learner._grow()
        gap = (learner.features(IMAGES) - before).abs().max()
    after, sizes = [m.item() for m in learner.magnitudes], sizes_of(learner, 1)
    assert sum(sizes) / len(sizes) == pytest.approx(1)
    if restart:
        assert gap > 1e-3 and after == [START] * 3 and sizes == pytest.approx([1] * 6)
    else:
        assert gap < 1e-12 and after[0] == magnitudes[0] and after[2] == START and max(sizes) > 1.05


def test_old_factors_stay_and_their_magnitudes_learn(toy_learner):
    learner, stream = learned(toy_learner, 1)
    first = [slot.of(part)[0] for slot in learner.slots() for part in slot.parts]
    products = [(lora.up @ lora.down * learner.magnitudes[0]).detach() for lora in first]
    learner.begin_task()
    learner.learn(stream.task(1))
    ratios = [(lora.up @ lora.down / product).mean() for lora, product in zip(first, products, strict=True)]
    for lora, product in zip(first, products, strict=True):  # the same direction for all but one common factor
        torch.testing.assert_close(lora.up @ lora.down, product * ratios[0])
    assert abs((learner.magnitudes[0] * ratios[0]).item() - 1) > 1e-6
    assert sum(p.numel() for p in learner.trained.values()) == learner.planned_parameters()[3][1]


def test_an_update_that_learned_nothing_divides_nothing(toy_learner):
    for restart in (False, True):
        learner, _ = learned(toy_learner, 3, epochs=0, restart_magnitudes=restart)
        assert all(torch.isfinite(t).all() for t in learner.own_state().values())
        assert torch.equal(learner.features(IMAGES), toy_backbone().double()(IMAGES))


def test_the_first_task_has_a_schedule_of_its_own(toy_learner):
    keys = {"epochs": 4, "init_epoch": 6, "init_lr": 0.4, "lrate": 0.2, "milestones": [1, 3], "lrate_decay": 0.5}
    learner, _ = learned(toy_learner, 0, **keys, init_milestones=[2], init_lr_decay=0.1)
    for index, expected in ((0, [1, 1, 0.1, 0.1]), (1, [1, 0.5, 0.5, 0.25])):
        recipe = learner._recipe(type("Task", (), {"index": index}))
        assert [recipe.share(epoch) for epoch in range(4)] == pytest.approx(expected)
        assert (learner.cfg.passes(index), learner.cfg.rate(index)) == ((6, 0.4), (4, 0.2))[index]
    plain, _ = learned(toy_learner, 0)
    assert plain._recipe(type("Task", (), {"index": 0})).share is None  # cosine
