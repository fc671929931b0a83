"""Floating-point operations against formulas by hand and against torch's counter."""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import models
from backbone import operations
from tests.helpers.toy import toy_backbone, toy_settings

D, N, DEPTH = 16, 5, 3  # width, tokens and blocks of the toy ViT; 3 x 4 x 4 pixels a patch
BLOCK = 2 * N * D * 3 * D + 2 * (2 * N * N * D) + 2 * N * D * D + 2 * (2 * N * D * 4 * D)  # qkv, attention, proj, MLP
VIT = 2 * (N - 1) * 3 * 4 * 4 * D + DEPTH * BLOCK


def built(method, **settings):
    learner = models.build(toy_settings(method, **settings), toy_backbone(), 6, 1, None)
    learner.seen = 4
    return learner.requires_grad_(False)


def test_products_by_hand():
    a, b, v = torch.ones(3, 4), torch.ones(4, 5), torch.ones(4)
    assert operations.of(lambda: a @ b) == 2 * 3 * 4 * 5
    assert operations.of(lambda: a @ v) == 2 * 3 * 4
    assert operations.of(lambda: torch.addmm(torch.ones(5), a, b)) == 2 * 3 * 4 * 5
    assert operations.of(lambda: torch.ones(7, 3, 4) @ torch.ones(7, 4, 5)) == 7 * 2 * 3 * 4 * 5
    assert operations.of(lambda: torch.einsum("bij,kj->bik", torch.ones(7, 3, 4), torch.ones(5, 4))) == 7 * 120
    image, kernel = torch.ones(2, 4, 9, 9), torch.ones(6, 2, 3, 3)
    assert operations.of(lambda: F.conv2d(image, kernel, groups=2)) == 2 * (2 * 6 * 7 * 7) * (2 * 3 * 3)
    q, k, x = torch.ones(2, 3, 5, 4), torch.ones(2, 3, 6, 4), torch.ones(2, 3, 6, 4)
    assert operations.of(lambda: F.scaled_dot_product_attention(q, k, x)) == 2 * 2 * 3 * 5 * 6 * (4 + 4)
    assert operations.of(lambda: a + a) == 0


def test_a_vit_with_a_linear_head_and_without_slots():
    assert operations.of(lambda: toy_backbone()(torch.zeros(1, 3, 8, 8))) == VIT
    learner = built("slca")
    assert learner.forward_operations() == VIT + 2 * D * 6  # the head computes all classes of the run


def test_each_adapter_costs_its_two_maps():
    """finetune puts an adapter of R = 2 beside every MLP. The last block, which pools token 0, computes that one alone: its
    keys and values need all tokens; query, projection, MLP and adapter one."""
    learner = built("finetune")
    adapters = 2 * (2 * N * D * 2)
    last = 2 * N * D * 2 * D + 2 * D * D + 2 * (2 * N * D) + 2 * D * D + 2 * (2 * D * 4 * D) + 2 * (2 * D * 2)
    whole = VIT - BLOCK + 2 * adapters + last + 2 * D * 6
    assert learner.forward_operations() == whole
    learner.backbone.short_last_block = False
    assert learner.forward_operations() == VIT + 3 * adapters + 2 * D * 6


@pytest.mark.parametrize("method", ["finetune", "sparse_moe", "ranpac", "l2p", "dualprompt"])
def test_the_count_is_that_of_torch_and_changes_nothing(method):
    learner = built(method)
    before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    draws = torch.get_rng_state()
    count = learner.forward_operations()
    assert torch.equal(draws, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.state_dict().items())
    image = torch.full((1, 3, 8, 8), 0.5)
    # torch's counter knows no attention on the CPU, so that is computed as products
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        learner.logits(image)
    assert count == counter.get_total_flops() > VIT // 2
    with torch.inference_mode(), operations.Counter() as ours:
        learner.logits(image.clone())
    assert ours.total == count
