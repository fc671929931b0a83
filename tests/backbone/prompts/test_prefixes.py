"""Prefix tuning and prompt pools: exact values on small inputs, a slow plain attention, and what the query is."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import models
from backbone import catalogue
from backbone.prompts import prefixes
from backbone.prompts.prefixes import PrefixTuning, PromptPool, Queried, attend, choose, pull, scrambled
from backbone.vit import Activations, SlottedViT
from models.families.prompts import chosen_in_training, hand_down, mask_of, pool_recipe
from tests.helpers.toy import toy_backbone, toy_settings, toy_stream
from utils.config.resolve import resolve
from utils.config.strict_json import read_json

KINDS = [
    {},
    {"qk_norm": True},
    {"class_token": False, "global_pool": "avg"},
    {"init_values": 0.1, "qkv_bias": False},
]


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow(attention, x, prefix):
    """Softmax attention, one head and one query after the other."""
    b, n, d = x.shape
    q, k, v = attention.qkv(x).reshape(b, n, 3, attention.num_heads, -1).unbind(2)
    q, k = attention.q_norm(q), attention.k_norm(k)
    own = prefix.reshape(b, 2, -1, attention.num_heads, d // attention.num_heads)
    k, v = torch.cat([own[:, 0], k], dim=1), torch.cat([own[:, 1], v], dim=1)
    y = torch.zeros_like(q)
    for sample in range(b):
        for head in range(attention.num_heads):
            for query in range(n):
                scores = k[sample, :, head] @ q[sample, query, head] / math.sqrt(q.shape[-1])
                y[sample, query, head] = scores.softmax(dim=0) @ v[sample, :, head]
    return attention.proj(y.reshape(b, n, d))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.no_grad()
def test_attention_with_a_prefix_equals_a_slow_one(kind, fused):
    attention = toy_backbone(**kind).double().vit.blocks[1].attn
    attention.fused_attn = fused
    x, prefix = noise(3, 5, 16), noise(3, 2, 4, 16, seed=1)
    torch.testing.assert_close(attend(attention, x, prefix), slow(attention, x, prefix), rtol=0, atol=1e-12)
    torch.testing.assert_close(attend(attention, x, prefix[:, :, :0]), attention(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.no_grad()
def test_a_pass_with_prefixes_equals_one_whose_blocks_are_written_out(kind):
    backbone, images = toy_backbone(**kind).double(), noise(2, 3, 8, 8).sigmoid()
    prefixes.fill(backbone, (0, 2), "layers")  # the last block too, whose pooled token alone is wanted elsewhere
    first, last = noise(2, 2, 3, 16, seed=1), noise(2, 2, 1, 16, seed=2)
    found = backbone(images, route=lambda x: [first, last])
    vit = backbone.vit
    x = backbone.stem(images)
    for layer, prefix in enumerate((first, noise(2, 2, 0, 16), last)):
        block = vit.blocks[layer]
        x = x + block.ls1(slow(block.attn, block.norm1(x), prefix))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    torch.testing.assert_close(found, vit.forward_head(vit.norm(x), pre_logits=True), rtol=0, atol=1e-12)
    torch.testing.assert_close(backbone(images), backbone.without_slots()(images))  # no route, no prefix
    torch.testing.assert_close(backbone(backbone.prefix(images, 0), route=lambda x: [first, last]), found)


def test_gradients_reach_the_prefix():
    attention = toy_backbone().double().vit.blocks[0].attn
    x, prefix = noise(2, 3, 16), noise(2, 2, 2, 16, seed=1).requires_grad_()
    attention.fused_attn = False
    assert torch.autograd.gradcheck(lambda p: attend(attention, x, p), (prefix,))


@pytest.mark.parametrize("layers", [(3,), (0, 7)])
def test_a_layer_that_is_not_there_is_refused(layers):
    with pytest.raises(ValueError, match=r"e_prompt_layer_idx: layer \d does not exist, the backbone has layers 0..2"):
        prefixes.fill(toy_backbone(), layers, "e_prompt_layer_idx")


def test_an_attention_of_another_kind_is_refused():
    backbone = toy_backbone()
    backbone.vit.blocks[1].attn = torch.nn.Identity()
    with pytest.raises(ValueError, match="layers: the attention of layer 1, Identity, takes no prefix"):
        prefixes.fill(backbone, (1,), "layers")


# ---------------------------------------------------------------- pool and choice


def pool_of(prompt_values, keys):
    pool = PromptPool(len(keys), torch.tensor(prompt_values).shape[1:], len(keys[0])).double()
    with torch.no_grad():
        pool.prompts.copy_(torch.tensor(prompt_values))
        pool.keys.copy_(torch.tensor(keys))
    return pool


def test_similarity_is_the_cosine_and_the_pull_its_mean_over_the_batch():
    pool = pool_of([[[1.0]], [[2.0]], [[3.0]]], [[2.0, 0.0], [0.0, 5.0], [-3.0, -4.0]])
    query = torch.tensor([[1.0, 0.0], [6.0, 8.0]], dtype=torch.float64)
    similarity = pool.similarity(query)
    expected = torch.tensor([[1.0, 0.0, -0.6], [0.6, 0.8, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(similarity, expected)
    ids = torch.tensor([[0, 2], [1, 0]])
    torch.testing.assert_close(pull(similarity, ids), torch.tensor((1 - 0.6 + 0.8 + 0.6) / 2, dtype=torch.float64))
    assert pool(ids).squeeze().tolist() == [[1, 3], [2, 1]]
    assert torch.isfinite(pool.similarity(torch.zeros(1, 2, dtype=torch.float64))).all()


def test_each_sample_has_its_own_choice_or_the_batch_has_one():
    similarity = torch.tensor([[0.9, 0.1, 0.5, 0.4], [0.9, 0.8, 0.1, 0.2], [0.0, 0.1, 0.3, 0.2], [0.5, 0.5, 0.5, 0.5]])
    assert choose(similarity, 2).tolist() == [[0, 2], [0, 1], [2, 3], [0, 1]]
    assert choose(similarity, 2, batchwise=True).tolist() == [[0, 1]] * 4  # votes 3, 2, 2, 1: the lower of equals
    assert choose(similarity[:1], 2, batchwise=True).tolist() == choose(similarity[:1], 2).tolist()
    assert choose(similarity, 4).shape == (4, 4)


def test_only_chosen_prompts_get_a_gradient_and_only_the_pull_reaches_keys():
    pool, query = PromptPool(4, (2, 3), 5), torch.randn(2, 5)
    ids = choose(pool.similarity(query), 1)
    pool(ids).square().sum().backward()
    touched = pool.prompts.grad.flatten(1).any(dim=1)
    assert set(touched.nonzero().flatten().tolist()) == set(ids.flatten().tolist()) and pool.keys.grad is None
    pull(pool.similarity(query), ids).backward()
    assert set(pool.keys.grad.any(dim=1).nonzero().flatten().tolist()) == set(ids.flatten().tolist())


def test_the_scrambled_layout_is_the_one_described():
    prefix = torch.arange(6.0).view(3, 2, 1, 1)  # sample b has key 2b and value 2b + 1
    assert scrambled(prefix).flatten().tolist() == [0, 2, 4, 1, 3, 5]
    assert torch.equal(scrambled(prefix[:1]), prefix[:1])  # a batch of one is right


# ---------------------------------------------------------------- mask, copies, rows that stay


def settings(toy_learner, **keys):
    return toy_learner("l2p", size=5, top_k=2, use_prompt_mask=True, **keys)


def test_mask_ends_where_the_pool_does(toy_learner):
    cfg = settings(toy_learner).cfg
    assert [mask_of(cfg, task) for task in range(3)] == [range(0, 2), range(2, 4), None]
    similarity = torch.tensor([[0.0, 0.1, 0.2, 0.3, 0.4]])
    assert [chosen_in_training(similarity, cfg, task).tolist() for task in range(3)] == [[[0, 1]], [[2, 3]], [[4, 3]]]
    assert mask_of(toy_learner("l2p").cfg, 0) is None


@pytest.mark.parametrize("keys", [False, True])
def test_a_task_begins_with_the_prompts_of_the_one_before(keys, toy_learner):
    learner = settings(toy_learner, shared_prompt_pool=True, shared_prompt_key=keys)
    pool = learner.pool
    before = [p.detach().clone() for p in pool.parameters()]
    hand_down(pool, learner.cfg, 0)
    hand_down(pool, learner.cfg, 2)  # beyond the pool
    assert all(torch.equal(p, old) for p, old in zip(pool.parameters(), before, strict=True))
    hand_down(pool, learner.cfg, 1)
    assert torch.equal(pool.prompts[2:4], before[0][:2]) and torch.equal(pool.prompts[[0, 1, 4]], before[0][[0, 1, 4]])
    assert torch.equal(pool.keys[2:4], before[1][:2] if keys else before[1][2:4])


@pytest.mark.parametrize("decays", [False, True])
@pytest.mark.parametrize("method", ["l2p", "dualprompt", "coda_prompt"])
def test_rows_that_cannot_learn_stay_unless_asked(method, decays, toy_learner):
    learner = toy_learner(
        method,
        size=6,
        top_k=1,
        use_prompt_mask=True,
        weight_decay=0.1,
        decay_other_rows=decays,
        prompt_param=(6, 2, 0.0),
    )
    stream = toy_stream()
    learner.learn(stream.task(0))
    before = {n: p.detach().clone() for n, p in learner.named_parameters() if "vit" not in n}
    learner.learn(stream.task(1))
    for name, p in learner.named_parameters():
        if name in before and name != "general.values":
            rows = slice(0, 2) if name.startswith(("head", "components")) else slice(0, 1)
            assert torch.equal(p[rows], before[name][rows]) != decays, name


# ---------------------------------------------------------------- the query, and L2P's tokens


@pytest.mark.parametrize("kind", KINDS[:3], ids=str)
@pytest.mark.parametrize("method", ["l2p", "dualprompt", "coda_prompt"])
@torch.no_grad()
def test_the_query_is_the_feature_without_prompts_wherever_it_comes_from(method, kind, toy_learner):
    backbone = toy_backbone(**kind)
    learner = toy_learner(method, backbone=backbone)
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = backbone.vit.forward_head(backbone.vit.forward_features(images), pre_logits=True)
    start, query = learner.begin(images)
    assert start.layer == 0 and torch.equal(query, expected)
    for given in (start, Queried(images, query), Queried(start, query).to("cpu")):
        torch.testing.assert_close(learner.begin(given)[1], expected)
        assert torch.equal(learner.features(given), learner.features(images))
    assert len(Queried(images, query)) == 4


def test_the_query_of_a_kept_view_is_computed_once(toy_learner, monkeypatch):
    learner, stream = toy_learner("dualprompt", train_views=2, tuned_epoch=5), toy_stream()
    passes, real = [], SlottedViT.encode

    def counting(self, images, *args, **how):
        if not self.slots and not isinstance(images, Activations):
            passes.append(len(images))
        return real(self, images, *args, **how)

    filled, fill = [], SlottedViT.prefix
    monkeypatch.setattr(SlottedViT, "encode", counting)
    monkeypatch.setattr(
        SlottedViT,
        "prefix",
        lambda self, x, layer, **how: (filled.append((layer, len(x))), fill(self, x, layer, **how))[1],
    )
    learner.learn(stream.task(0))
    assert not passes and sum(count for layer, count in filled if layer == 3) == 2 * 20  # two views of twenty images
    assert sum(count for layer, count in filled if layer == 0) == 5 * 20  # with prompts every image, every epoch


@pytest.mark.parametrize("kind", [{}, {"no_embed_class": True}, {"class_token": False, "global_pool": "avg"}], ids=str)
@pytest.mark.parametrize("head_type", ["prompt", "token"])
@torch.no_grad()
def test_l2p_is_a_vit_with_more_tokens(kind, head_type, toy_learner):
    backbone = toy_backbone(**kind)
    learner = toy_learner("l2p", backbone=backbone, head_type=head_type, length=2, top_k=3)
    images, vit = torch.rand(1, 3, 8, 8), backbone.vit
    chosen = choose(learner.pool.similarity(learner.begin(images)[1]), 3)[0]
    tokens = learner.pool.prompts[chosen].reshape(1, 6, 16)
    if not kind:  # the class token's position
        tokens = tokens + vit.pos_embed[:, :1]
    count = vit.num_prefix_tokens
    stem = backbone.stem(images)
    x = torch.cat([stem[:, :count], tokens, stem[:, count:]], dim=1)  # where the original has them
    for block in vit.blocks:
        x = block(x)
    x = vit.norm(x)
    own = x[:, count : count + 6].mean(dim=1)
    others = torch.cat([x[:, :count], x[:, count + 6 :]], dim=1)
    expected = vit.fc_norm(own) if head_type == "prompt" else vit.forward_head(others, pre_logits=True)
    torch.testing.assert_close(learner.features(images), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batchwise", [False, True])
@pytest.mark.parametrize("method", ["l2p", "dualprompt"])
@torch.no_grad()
def test_an_image_depends_on_its_batch_only_if_asked(method, batchwise, toy_learner):
    learner = toy_learner(method, batchwise_prompt=batchwise, top_k=1)
    images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    start, query = learner.begin(images)
    learner.pool.keys[:8] = query  # image i chooses prompt i, and with one vote each the lowest wins
    ids = torch.zeros(8, 1, dtype=torch.long) if batchwise else torch.arange(8)[:, None]
    torch.testing.assert_close(learner.features(images), learner._encode(start, ids))
    alone = torch.cat([learner.features(image[None]) for image in images])
    assert torch.allclose(alone, learner.features(images), atol=1e-5) != batchwise


def test_where_images_of_a_batch_act_on_each_other_it_is_trainings(toy_learner):
    for method, keys, size in (
        ("l2p", {}, 3), ("l2p", {"batchwise_prompt": True}, 8), ("dualprompt", {"scrambled_e_prompt": True}, 8),
        ("coda_prompt", {}, 3),
    ):  # fmt: skip
        assert toy_learner(method, **keys, eval_batch_size=3, batch_size=8).eval_batch_size == size


def test_the_recipe_is_pilots(toy_learner):
    constant, cosine = (
        pool_recipe(toy_learner("l2p", scheduler=s, weight_decay=0.1).cfg) for s in ("constant", "cosine")
    )
    assert (constant.optimizer, constant.weight_decay, constant.share(3)) == ("adam", 0.1, 1.0)
    assert cosine.share is None  # to min_lr


@pytest.mark.parametrize(
    ("method", "keys", "fault"),
    [
        ("l2p", {"top_k": 11}, "top_k: 11 prompts cannot be chosen from a pool of size 10"),
        ("l2p", {"shared_prompt_pool": True}, "have an effect with use_prompt_mask only"),
        ("dualprompt", {"g_prompt_layer_idx": (0, 2)}, "each in one of the two"),
        ("dualprompt", {"g_prompt_layer_idx": (-1,)}, "each in one of the two"),
        ("coda_prompt", {"prompt_param": (10, 3, 0.0)}, "with an even length"),
        ("coda_prompt", {"prompt_layer_idx": (1, 1)}, "different numbers from 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(method, keys, fault):
    (found,) = [text for _, text in toy_settings(method, **keys).cross_checks()]
    assert fault in found


HARNESS = {"embed_dim", "depth", "num_heads", "patch_size", "img_size", "mlp_ratio", "classes_per_task", "tasks"}
HARNESS |= {"train_per_class", "test_per_class"}
# what the shipped files have beside the settings that the recorded runs name
SHIPPED = {"get_original_backbone": True, "global_pool": "token", "freeze": ["blocks", "norm"], "pretrained": True}
SHIPPED |= {"drop": 0.0, "drop_path": 0.0, "memory_size": 0, "memory_per_class": 0, "fixed_memory": False}
SHIPPED |= {"prefix": "x", "device": ["0"], "seed": [1993], "shuffle": True, "dataset": "cifar224"}


@pytest.mark.parametrize("method", ["l2p", "dualprompt", "coda_prompt"])
def test_pilots_files_load(method):
    values = read_json(Path(__file__).parents[2] / "fixtures" / "parity" / method / f"{method}_a.json")[0]["config"]
    values = {k: v for k, v in values.items() if k not in HARNESS} | SHIPPED
    values |= {"model_name": method, "init_cls": 10, "increment": 10, "backbone_type": f"vit_base_patch16_224_{method}"}
    how = {"settings_of": models.settings_of, "methods": models.available(), "backbones": catalogue.names}
    resolved = resolve(values, source="x", **how)
    (note,) = [text for text in resolved.notes if "no effect for" in text]
    assert "reinit_optimizer" in note and "freeze" in note
    assert resolved.settings.optimizer == "adam" and resolved.settings.tuned_epoch == 5


def test_block_without_prefix_is_timms():
    backbone = toy_backbone()
    x = torch.randn(2, 5, 16)
    assert torch.equal(PrefixTuning()(x, None, backbone.vit.blocks[0]), backbone.vit.blocks[0](x))


def test_normalised_length_floor_is_pilots():
    pool = pool_of([[[1.0]]], [[1e-9, 0.0]])
    expected = F.normalize(torch.tensor([[3.0, 4.0]], dtype=torch.float64)) @ torch.tensor(
        [[1e-3], [0.0]], dtype=torch.float64
    )
    torch.testing.assert_close(pool.similarity(torch.tensor([[3.0, 4.0]], dtype=torch.float64)), expected)
