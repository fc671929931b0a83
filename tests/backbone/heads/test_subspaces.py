"""Cosine head, adapter sets of which one acts, EASE's prototypes over subspaces: exact values and slow plain versions."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from backbone.adapters.adapter import Adapter
from backbone.heads.heads import CosineHead, StatisticsHead
from backbone.heads.subspaces import PLAIN, SubspaceHead, SubspaceSlot, features_in
from tests.helpers.toy import toy_backbone

IMAGES = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_adapter(seed):
    made = Adapter(16, 3, scale=0.5).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return made


def two_sets():
    """A toy backbone in float64 whose slots have adapters of seeds layer and 10 + layer."""
    backbone = toy_backbone().double()
    for layer in range(3):
        slot = SubspaceSlot()
        slot.adapters.extend([random_adapter(layer), random_adapter(10 + layer)])
        backbone.fill(layer, slot)
    return backbone.eval()


# Cosine head --------------------------------------------------------------------------------------------------------------


def test_hand_worked_cosine_head():
    head = CosineHead(2, 2).double()
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        head.sigma.fill_(2.0)
    scores = head(torch.tensor([[10.0, 0.0], [0.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(scores, torch.tensor([[1.2, 0.0], [0.0, 0.0]], dtype=torch.float64))


def test_cosine_head_starts_in_bounds_and_its_gradients_are_right():
    head = CosineHead(9, 4)
    head.reset_parameters(torch.Generator().manual_seed(1))
    assert head.sigma.item() == 1 and head.weight.abs().max() <= 1 / 3 and head.weight.std() > 0.1
    head = head.double()
    inputs = (normal(3, 9).requires_grad_(), head.weight, head.sigma)

    def scores(x, weight, sigma):
        return torch.func.functional_call(head, {"weight": weight, "sigma": sigma}, (x,))

    assert torch.autograd.gradcheck(scores, inputs)


# Adapter sets -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_features_in_subspaces_are_those_of_each_set_alone():
    backbone = two_sets()
    found = features_in(backbone, IMAGES, [PLAIN, 0, 1])
    assert found.shape == (5, 48)
    plain = toy_backbone().double().eval()
    parts = [plain(IMAGES)]
    for start in (0, 10):
        for layer in range(3):
            plain.fill(layer, random_adapter(start + layer))
        parts.append(plain(IMAGES))
    torch.testing.assert_close(found, torch.cat(parts, dim=1), rtol=0, atol=1e-12)
    torch.testing.assert_close(backbone(IMAGES), parts[2], rtol=0, atol=1e-12)  # without a route the newest acts
    again = features_in(backbone, backbone.prefix(IMAGES, 0, inside=True), [1])
    torch.testing.assert_close(again, parts[2], rtol=0, atol=1e-12)
    assert len(backbone.slots["0"]) == 2


def test_only_the_set_that_acts_has_gradients():
    backbone = two_sets()
    backbone(IMAGES).sum().backward()
    for slot in backbone.slots.values():
        old, new = slot.adapters
        assert all(p.grad is None for p in old.parameters())
        assert all(p.grad is not None for p in new.parameters())


# Prototypes over subspaces ------------------------------------------------------------------------------------------------

OWNERS = [0, 0, 1, 2, 2]  # the task of each class


def grown(plain, width=3, alpha=0.4, beta=0.7):
    """A head after three tasks of 2, 1 and 2 classes with four images each, and all their features in all subspaces."""
    head = SubspaceHead(width, 6, plain, alpha, beta)  # the sixth class never comes
    x, y = normal(20, (3 + plain) * width, seed=3) + 1.0, torch.arange(20) // 4
    for task in range(3):
        head.grow()
        own = torch.tensor(OWNERS)[y] == task
        head.add(x[own, : (task + 1 + plain) * width], y[own])
        head.solve()
    return head, x, y


@pytest.mark.parametrize("plain", [False, True])
def test_prototypes_and_scores_equal_a_slow_version(plain):
    head, x, y = grown(plain)
    p = int(plain)
    spaces = x.reshape(20, 3 + p, 3)
    real = {(c, j): spaces[y == c][:, j + p].mean(dim=0) for c in range(5) for j in range(-p, OWNERS[c] + 1)}
    for c in range(5):
        for j in range(OWNERS[c] + 1, 3):
            lenders = [k for k in range(5) if OWNERS[k] >= j]
            cosines = [float(F.cosine_similarity(real[c, OWNERS[c]], real[k, OWNERS[c]], dim=0)) for k in lenders]
            total = sum(math.exp(s) for s in cosines)
            parts = [math.exp(s) / total * real[k, j] for s, k in zip(cosines, lenders, strict=True)]
            real[c, j] = sum(parts)
    expected = torch.stack([torch.cat([real[c, j] for j in range(-p, 3)]) for c in range(5)])
    torch.testing.assert_close(head.weight[:5], expected, rtol=0, atol=1e-12)
    assert head.owner.tolist() == [*OWNERS, -1] and not head.weight[5].any()

    features = normal(4, (3 + p) * 3, seed=8)
    scores = torch.zeros(4, 6, dtype=torch.float64)
    for row in range(4):
        for c in range(5):
            for j in range(-p, 3):
                share = 0.7 if j == -1 else 1.0 if j == OWNERS[c] else 0.4 / 2
                part = features[row].reshape(-1, 3)[j + p]
                scores[row, c] += share * F.cosine_similarity(part, real[c, j], dim=0)
    torch.testing.assert_close(head(features), scores, rtol=0, atol=1e-12)
    assert head(features.float()).dtype == torch.float32


def test_in_the_first_task_it_is_the_nearest_class_mean():
    head, plain = SubspaceHead(4, 3, False, 0.1, 0.0), StatisticsHead("ncm", 4, 3)
    head.grow()
    x, y = normal(9, 4), torch.arange(9) // 3
    for made in (head, plain):
        made.add(x, y)
        made.solve()
    torch.testing.assert_close(head(x), plain(x), rtol=0, atol=1e-14)


def test_a_lone_lender_gives_its_mean():
    head, x, y = grown(False)
    assert torch.equal(head.mapping(0, 2).sum(dim=1), torch.ones(2, dtype=torch.float64))
    assert head.mapping(1, 2).shape == (1, 2) and head.similarity(0, 1).shape == (2, 3)
    two = SubspaceHead(3, 3, False, 1.0, 0.0)
    for task, classes in enumerate(([0, 1], [2])):
        two.grow()
        own = torch.isin(y, torch.tensor(classes))
        two.add(x[own, : 3 * (task + 1)], y[own])
    two.solve()
    torch.testing.assert_close(two.weight[:2, 3:], two.weight[2:, 3:].expand(2, 3), rtol=0, atol=1e-14)


def test_it_forgets_on_request():
    head, *_ = grown(True)
    head.clear()
    assert head.owner.tolist() == [-1] * 6 and not head.sums.any() and head.tasks == 3
