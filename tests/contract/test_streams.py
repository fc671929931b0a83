"""Every method gives the same numbers whether passes start at images or at kept prefixes, and computes each prefix once."""

import pytest
import torch
from torch.nn import functional as F

from backbone.vit import Activations, SlottedViT
from models.families.prompts import PromptLearner
from models.families.spaces import SpacesLearner
from tests.helpers.methods import HEADS, METHODS
from tests.helpers.rounding import ridge_slack
from tests.helpers.toy import toy_backbone, toy_stream
from utils.evaluation import head_drift, scores

TRAINED = [m for m in METHODS if m != "simplecil"]
# whose passes begin at the images, or whose features are several
ALL_LAYERS = (
    "finetune",
    "joint",
    "ease",
    "aper_adapter",
    "inflora",
    "sd_lora",
    "slca",
    "l2p",
    "dualprompt",
    "coda_prompt",
)
CPU = torch.device("cpu")


def through(learner, stream):
    """Learns all tasks as a run does. After each task: of each task's test images the features and scores, and the state."""
    steps = []
    for index in range(len(stream)):
        learner.begin_task()
        task = stream.task(index, with_past=learner.uses_past, with_test=learner.uses_test)
        learner.learn(task)
        learner.consolidate(task)
        renewed = head_drift.renewed_statistics(learner, stream, index)
        scores.evaluate(learner, stream, index, CPU, head_drift.heads_of(learner, renewed))
        learner.eval()
        features, logits = [], []
        with torch.inference_mode():
            for earlier in range(index + 1):
                for images, *_ in learner._batches(stream.test(earlier), 100, augment=False, shuffle=False):
                    features.append(learner.features(images))
                    logits.append(learner.logits(images))
        steps.append((torch.cat(features), torch.cat(logits), {k: v.clone() for k, v in learner.own_state().items()}))
    return steps


def assert_close_up_to_rounding(ours, plain, atol):
    """Two results of `through`: all within `atol`, and what a ridge head solves for within what its condition makes of that."""
    for (features, logits, state), (other_features, other_logits, other_state) in zip(ours, plain, strict=True):
        torch.testing.assert_close(features, other_features, rtol=atol, atol=atol)
        slack = ridge_slack(
            state, other_state
        )  # up to a condition of 2e10: APER's plain and adapted features are alike
        of_scores = atol + slack * (logits.norm() if slack else 0.0)
        torch.testing.assert_close(logits, other_logits, rtol=atol, atol=float(of_scores))
        for name, tensor in state.items():
            of_state = atol + (slack * tensor.norm().item() if name == "statistics.weight" else 0.0)
            how = {"rtol": atol, "atol": of_state, "msg": lambda text, n=name: f"{n}: {text}"}
            torch.testing.assert_close(tensor, other_state[name], **how)


def check(learners, dtype):
    ours, plain = (through(learner, toy_stream()) for learner in learners)
    atol = {torch.float64: 1e-9, torch.float32: 5e-4}[dtype]  # after 3 tasks of training
    assert_close_up_to_rounding(ours, plain, atol)


def pair(toy_learner, method, dtype, place="memory", **keys):
    return [
        toy_learner(method, backbone=toy_backbone().to(dtype), prefix_cache=p, eval_batch_size=3, **keys)
        for p in (place, "off")
    ]


@pytest.mark.parametrize(("method", "head"), HEADS)
def test_numbers_with_and_without_the_cache_are_equal_to_rounding(method, head, toy_learner):
    check(pair(toy_learner, method, torch.float64, head=head), torch.float64)


@pytest.mark.parametrize("method", METHODS)
def test_so_they_are_in_the_precision_of_runs(method, toy_learner):
    check(pair(toy_learner, method, torch.float32), torch.float32)


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("method", TRAINED)
def test_so_they_are_with_views(method, place, toy_learner):
    check(pair(toy_learner, method, torch.float64, place, train_views=2), torch.float64)


VARIANTS = {
    "sema, records at the end": ("sema", {"record_when": "end", "rd_views": 1, "detect_scope": "task"}),
    "sema, slow and fast": ("sema", {"ffn_adapter_type": "nested_lora", "nested_lora_eval": "slow"}),
    "sema, late merges": ("sema", {"ffn_adapter_type": "nested_lora", "nested_lora_consolidation_interval": 2}),
    "sema, dropout": ("sema", {"ffn_adapter_dropout": 0.5}),
    "competition, its own test data": ("moe_parallel", {"selection_split": "test"}),
    "competition, recalibrated": ("moe_parallel", {"head_recalibration": True, "num_experts": 2}),
    "experts that grow": ("dylora_moe", {"expert_rank_max": 6, "rank_growth_step": 2, "plateau_epochs": 1}),
    "experts that distil": ("dylora_moe", {"distill_coef": 1.0}),
    "replay": ("dylora_moe", {"replay_per_class": 2}),
    "experts on linear layers": ("dylora_moe", {"lora_target": ["qkv"]}),
    "prompts of the upper layers": ("dualprompt", {"g_prompt_layer_idx": (1,)}),
    "components of the upper layers": ("coda_prompt", {"prompt_layer_idx": (1, 2)}),
    "head alone": ("finetune", {"trainable": "head"}),
    "the whole ViT": ("finetune", {"trainable": "backbone", "mask_old_classes": True}),
    "one session, dropout": ("ranpac", {"ffn_adapter_dropout": 0.5}),
    "a session a task, dropout": ("ease", {"ffn_adapter_dropout": 0.5, "use_init_ptm": True, "beta": 1.0}),
}


@pytest.mark.parametrize("views", [0, 2])
@pytest.mark.parametrize(("method", "keys"), VARIANTS.values(), ids=list(VARIANTS))
def test_so_they_are_with_what_methods_add(method, keys, views, toy_learner):
    torch.manual_seed(0)  # dropout draws
    learners = pair(toy_learner, method, torch.float64, train_views=views, **keys)
    runs = []
    for learner in learners:
        torch.manual_seed(1)
        runs.append(through(learner, toy_stream()))
    assert_close_up_to_rounding(*runs, 1e-9)


@pytest.fixture
def stems(monkeypatch):
    """Images that entered the network."""
    counts, real = [], SlottedViT.stem

    def counting(self, images):
        counts.append(len(images))
        return real(self, images)

    monkeypatch.setattr(SlottedViT, "stem", counting)
    return counts


@pytest.mark.parametrize("method", METHODS)
def test_a_test_image_enters_the_network_once(method, toy_learner, stems):
    """Methods that learn above the first layer; in SEMA and those that learn in every layer the first task is no prefix."""
    learner, stream = toy_learner(method), toy_stream()
    for index in range(3):
        learner.begin_task()
        task = stream.task(index, with_past=learner.uses_past)
        learner.learn(task)
        learner.consolidate(task)
        for again in range(2):
            stems.clear()
            scores.evaluate(learner, stream, index, CPU)
            if isinstance(
                learner, SpacesLearner
            ):  # each space is a pass of its own: the new images in all, older ones in new
                spaces = len(learner.subspaces())
                new = 0 if again else 8 * spaces + 8 * index * (method == "ease")
            else:
                new = 8 * (index + 1) if learner.prefix_layer == 0 else 0 if again else 8
            new += 8 if isinstance(learner, PromptLearner) and not again else 0  # for its query, which is kept
            assert sum(stems) == new, (index, again)
    assert (learner.prefix_layer == 0) == (method in ALL_LAYERS)


@pytest.mark.parametrize("method", TRAINED)
def test_each_view_enters_the_network_once(method, toy_learner, stems):
    learner, stream = (
        toy_learner(method, train_views=2, epochs=5, func_epoch=5, rd_epoch=5, exp_threshold=0),
        toy_stream(),
    )
    learner.learn(stream.task(0))
    learner.consolidate(stream.task(0))
    learner.begin_task()
    stems.clear()
    phases = []
    real = learner._batches

    def watched(data, size, **how):
        batches = list(real(data, size, **how))
        phases.append((how, all(isinstance(images, Activations) for images, *_ in batches)))
        return batches

    learner._batches = watched
    learner.learn(stream.task(1))
    trained = [streams for how, streams in phases if how.get("augment", True)]
    if method in (*ALL_LAYERS, "ranpac"):
        assert not any(trained)  # nothing is frozen below, or nothing is trained in later tasks
        return
    assert len(trained) >= 5 and all(trained)
    kept = (
        2 * 20 if method != "moe_parallel" else 2 * 18 + 2
    )  # views of what is trained on; the winner is chosen on the rest
    assert sum(stems) == kept + (20 if method == "dylora_moe" else 0)  # and its images for the decision


def test_fresh_augmentation_is_the_default(toy_learner):
    learner, data = toy_learner("nested_lora"), toy_stream().task(0).train
    first, again, second = (
        torch.cat([images for images, *_ in learner._batches(data, 20, epoch=e, shuffle=False)]) for e in (0, 0, 1)
    )
    plain = torch.cat([images for images, *_ in data.batches(20, epoch=0, shuffle=False)])
    assert torch.equal(first, plain) and torch.equal(again, plain)
    assert F.mse_loss(first, second) > 1e-4
