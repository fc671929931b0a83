"""CODA-Prompt's components against formulas written out, their orthogonal start, and the schedule."""

import math

import pytest
import torch
from torch.nn import functional as F

from backbone.prompts.components import Components, Draws, orthonormal
from tests.helpers.toy import toy_stream


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grown(size=6, length=4, width=5, rows=3, first=0):
    part, draws = Components(size, length, width).double(), Draws(rows, length, width).double()
    draws.reset_parameters(torch.Generator().manual_seed(1))
    part.grow(draws, first)
    return part


def test_a_prompt_is_the_sum_of_components_by_cosine():
    part, query = grown(), noise(2, 5)
    with torch.no_grad():
        part.keys *= 3  # its length does not matter
    prefix = part(query, 0, 3)
    for q, own in zip(query, prefix, strict=True):
        prompt = sum(
            F.cosine_similarity(q * part.attentions[k], part.keys[k], dim=0) * part.prompts[k] for k in range(3)
        )
        torch.testing.assert_close(own, torch.stack([prompt[:2], prompt[2:]]))
    torch.testing.assert_close(part(query, 0, 6), prefix)  # components not made yet are 0
    assert torch.isfinite(part(torch.zeros(1, 5, dtype=torch.float64), 0, 3)).all()


def test_gradients_are_those_of_the_formula_and_reach_new_components_only():
    part, query = grown(rows=4), noise(2, 5)

    def forward(*tensors):
        for own, tensor in zip((part.prompts, part.keys, part.attentions), tensors, strict=True):
            own.data.copy_(tensor)
        return part(query, 0, 4)

    part(query, 2, 4).square().sum().backward()
    for parameter in part.parameters():
        assert not parameter.grad[:2].any() and parameter.grad[2:4].any() and not parameter.grad[4:].any()
        parameter.grad = None
    part.requires_grad_(False)
    tensors = [p.clone().requires_grad_() for p in part.parameters()]

    def functional(prompts, keys, attentions):
        return torch.func.functional_call(
            part, {"prompts": prompts, "keys": keys, "attentions": attentions}, (query, 0, 4)
        )

    assert torch.autograd.gradcheck(functional, tensors)


def test_new_components_are_orthonormal_and_old_ones_untouched():
    part = grown()
    old = part.prompts.detach().clone()
    draws = Draws(2, 4, 5).double()
    part.grow(draws, 3)
    for rows in (part.prompts[:5].flatten(1), part.keys[:5], part.attentions[:5]):
        torch.testing.assert_close(rows @ rows.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-10)
    assert torch.equal(part.prompts[:3], old[:3]) and not part.prompts[5:].any()
    assert not any(p.grad_fn for p in part.parameters())


def test_gram_schmidt_by_hand():
    before = torch.tensor([[2.0, 0.0, 0.0]])
    drawn = torch.tensor([[3.0, 4.0, 0.0], [1.0, 1.0, 5.0]])
    assert orthonormal(drawn, before).tolist() == [[0, 1, 0], [0, 0, 1]]
    oblique = torch.tensor([[1.0, 0.0], [1.0, 1.0]])  # all projections are of the draw: (0, 1) - 0 - (1, 1) / 2
    torch.testing.assert_close(orthonormal(torch.tensor([[0.0, 1.0]]), oblique), torch.tensor([[-1.0, 1.0]]) / 2**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_more_rows_than_dimensions_keep_their_draws(dtype):
    drawn = noise(5, 3).to(dtype)
    made = orthonormal(drawn, torch.empty(0, 3, dtype=dtype))
    torch.testing.assert_close(made[:3] @ made[:3].T, torch.eye(3, dtype=dtype))
    torch.testing.assert_close(made[3:], F.normalize(drawn[3:], dim=1))
    assert orthonormal(drawn[:0], drawn).shape == (0, 3)


def test_penalty_is_the_mean_square_of_the_gram_error():
    part = grown()
    assert part.penalty(0, 3).item() < 1e-20
    with torch.no_grad():
        part.keys[1] += part.keys[0] * 0.5
        part.attentions[2] *= 2
    expected = (2 * 0.5**2 + 0.25**2) / 9 + (4 - 1) ** 2 / 9
    assert part.penalty(1, 3).item() == pytest.approx(expected)
    part.penalty(1, 3).backward()
    assert not part.keys.grad[0].any() and part.keys.grad[1].any()


@pytest.mark.parametrize(("late", "done"), [(False, [0, 1, 2, 3, 4]), (True, [0, 0, 1, 2, 3])])
def test_schedule(late, done, toy_learner):
    share = toy_learner("coda_prompt", tuned_epoch=5, cosine_off_by_one=late)._recipe().share
    assert [share(e) for e in range(5)] == [math.cos(99 * math.pi * d / 800) for d in done]
    assert toy_learner("coda_prompt", tuned_epoch=1)._recipe().share(0) == 1.0
    assert toy_learner("coda_prompt", scheduler="constant", tuned_epoch=5)._recipe().share(3) == 1.0


def test_the_pool_is_shared_out_evenly_and_beyond_it_the_head_learns(toy_learner):
    learner, stream = toy_learner("coda_prompt", prompt_param=(7, 2, 0.0)), toy_stream(init_cls=1, increment=1)
    assert learner.per_task == 2  # seven for the three tasks that the settings promise
    for index, made in enumerate((2, 4, 6, 7, 7, 7)):
        learner.begin_task()
        learner.learn(stream.task(index))
        assert learner.count == made
    with pytest.raises(ValueError, match="2 components are too few for 3 tasks"):
        toy_learner("coda_prompt", prompt_param=(2, 2, 0.0))


def test_an_incomplete_batch_is_dropped_if_asked(toy_learner):
    for drop, shown in ((False, 40), (True, 32)):
        learner = toy_learner("coda_prompt", drop_last=drop)
        learner.learn(toy_stream().task(0))
        assert learner.images_shown == shown  # twenty images in batches of eight, two epochs


def test_a_task_smaller_than_a_batch_is_told_where_such_are_dropped(toy_learner):
    learner = toy_learner("coda_prompt", drop_last=True, batch_size=32)
    learner.learn(toy_stream().task(0))
    told = (learner.log.folder / "run.log").read_text(encoding="utf-8")
    assert learner.images_shown == 0 and "task 1 has 20 images and drop_last leaves out" in told


def test_old_components_stay_as_they_are(toy_learner):
    learner, stream = toy_learner("coda_prompt", prompt_param=(6, 2, 0.5)), toy_stream()
    learner.learn(stream.task(0))
    old = [p.detach()[:2].clone() for p in learner.components.parameters()]
    learner.learn(stream.task(1))
    assert all(torch.equal(p[:2], kept) for p, kept in zip(learner.components.parameters(), old, strict=True))
