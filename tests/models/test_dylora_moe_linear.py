"""Experts of dylora_moe on the linear layers of a block, in place of adapters beside the MLP."""

import pytest
import torch

from tests.helpers.dylora import ALWAYS, columns_of, experts_of, teach
from tests.helpers.nested import images_of, rows
from tests.helpers.toy import toy_stream

TARGETS = [("qkv",), ("proj",), ("fc1",), ("fc2",), ("qkv", "proj", "fc1", "fc2")]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_experts_on_linear_layers_learn_as_adapters_do(targets, dylora_moe):
    stream = toy_stream()
    learner = dylora_moe(**ALWAYS, lora_target=targets, epochs=4)
    start = experts_of(learner, 0)
    teach(learner, 3, stream=stream)
    assert not torch.equal(experts_of(learner, 0), start) and columns_of(learner, 2).abs().max() > 0
    losses = [r["loss"] for r in rows(learner, "epoch") if r["task"] == 2]
    assert losses[-1] < losses[0]
    assert len(learner.population.experts) == 3 and learner.adapters_per_layer() == [0, 3, 3]
    sizes = {"qkv": 16 + 48, "proj": 16 + 16, "fc1": 16 + 64, "fc2": 64 + 16}
    expert = 2 * 2 * sum(sizes[target] for target in targets)  # 2 layers, rank 2
    head = learner.head.weight.numel() + learner.head.bias.numel()
    assert dylora_moe(**ALWAYS, lora_target=targets).planned_parameters() == [
        ("first task: one expert a layer and the head", expert + head),
        ("each added expert with its router columns", expert + 2 * 16),
    ]
    assert not any(m._forward_hooks for m in learner.backbone.vit.modules())
    with torch.no_grad():
        for e in range(3):
            one_hot = torch.eye(3)[e].expand(8, 3)
            alone = learner.backbone(images_of(stream), route=lambda x, g=one_hot: [g] * 2)
            assert (alone - learner.features(images_of(stream))).abs().max() > 1e-4


@pytest.mark.parametrize("scope", ["shared", "layer"])
def test_every_part_works_with_experts_on_linear_layers(scope, dylora_moe):
    keys = {"lora_target": ("qkv", "fc1"), "router_scope": scope, "expert_rank_max": 5, "merge_below": 0.9}
    keys |= {"top_k_experts": 1, "distill_coef": 1.0, "replay_per_class": 2, "novelty_threshold_mode": "adaptive"}
    learner = teach(dylora_moe(**ALWAYS | keys, freeze_on_convergence=True, plateau_epochs=1, plateau_tolerance=0.5))
    assert rows(learner, "merge") and rows(learner, "rank") and rows(learner, "routing") and rows(learner, "replay")


def test_the_embeddings_of_linear_experts_are_of_what_the_first_block_reads(dylora_moe):
    stream = toy_stream()
    learner = dylora_moe(lora_target=("qkv",))
    images, labels = next(iter(stream.task(0).train.batches(20, augment=False, shuffle=False)))[:2]
    read = []
    hook = learner.backbone.vit.blocks[1].register_forward_pre_hook(lambda m, i: read.append(i[0].mean(dim=1).double()))
    with torch.no_grad():
        learner.backbone(images)
    hook.remove()
    teach(learner, 1, stream=stream)
    expected = torch.stack([read[0][labels == c].mean(0) for c in (0, 1)])
    torch.testing.assert_close(learner.embeddings, expected, rtol=1e-5, atol=1e-6)
