"""What the parity checks of the prompt methods share: LAMDA-PILOT scores in batches, and its head has all classes at once."""

import json
from pathlib import Path

import numpy as np
import torch

from backbone.prompts.prefixes import choose
from models.families import prompts
from tests.helpers.recorded import TOLERANCE, Recorded, close, learn_all

KEYS = ("tuned_epoch", "init_lr", "batch_size", "weight_decay", "min_lr", "optimizer", "scheduler")
POOL = ("size", "length", "top_k", "batchwise_prompt", "use_prompt_mask", "shared_prompt_pool", "shared_prompt_key")
POOL += ("pull_constraint", "pull_constraint_coeff", "head_type", "prompt_key_init", "embedding_key")


def in_batches(run: Recorded, chosen: np.ndarray) -> list[torch.Tensor]:
    """The test images of a mask, in file order."""
    return list(torch.from_numpy(run.arrays["test_images"][chosen]).double().split(run.config["batch_size"]))


@torch.no_grad()
def check_task(learner, task, run: Recorded) -> None:
    """Scores of all test images over all classes, and every accuracy, from the batches that the original had."""
    every = np.ones(len(run.arrays["test_labels"]), dtype=bool)
    images = in_batches(run, every)
    logits = torch.cat([learner.head(learner.features(batch)) for batch in images])
    close(logits, run.arrays[f"task{task.index}/test_logits"], f"logits after task {task.index}")
    close(torch.cat([learner.begin(batch)[1] for batch in images]), run.arrays["test_queries"], "queries")
    seen = run.arrays["test_labels"] < task.total
    own = torch.cat([learner.logits(batch) for batch in in_batches(run, seen)])
    assert own.shape[1] == task.total
    full = own.new_zeros(len(every), task.total)
    full[torch.from_numpy(seen)] = own
    run.check_accuracies(full, task.first, task.index)


@torch.no_grad()
def check_choice(learner, task, run: Recorded) -> None:
    """The prompts chosen for each batch of test images."""
    facts, labels = run.facts["tasks"][task.index], run.arrays["test_labels"]
    for name, mask in (("test_prompt_ids", labels >= 0), ("seen_test_prompt_ids", labels < task.total)):
        for batch, theirs in zip(in_batches(run, mask), facts[name], strict=True):
            similarity = learner.pool.similarity(learner.begin(batch)[1])
            same_choice(choose(similarity, learner.cfg.top_k, learner.cfg.batchwise_prompt), theirs)


def same_choice(ours: torch.Tensor, theirs: list) -> None:
    """`theirs`: one list for the whole batch, or one a sample; in any order."""
    expected = np.broadcast_to(np.sort(np.array(theirs), axis=-1), ours.shape)
    assert np.array_equal(np.sort(ours.numpy(), axis=1), expected)


def watch_choices(module, monkeypatch) -> list[torch.Tensor]:
    """The prompts that every training step uses."""
    found, real = [], module.chosen_in_training

    def watched(*args):
        found.append(real(*args))
        return found[-1]

    monkeypatch.setattr(module, "chosen_in_training", watched)
    return found


def check_pool_method(
    run: Recorded, method: str, names, settings, tmp_path: Path, monkeypatch, ours=lambda name, value: value
):
    """A whole run of L2P or DualPrompt: every choice, loss, logit and final weight.

    `names`: our parameter's name to theirs; `ours(their name, their array)` has the shape that ours has.
    """
    run.arrays |= {f"init/{name}": ours(theirs, run.arrays[f"init/{theirs}"]) for name, theirs in names.items()}
    settings = {k: run.config[k] for k in KEYS + POOL} | {"decay_other_rows": True} | settings
    losses: list[list[float]] = []
    chosen = watch_choices(prompts, monkeypatch)
    for task, learner in learn_all(run, method, settings, tmp_path, monkeypatch, losses):
        check_task(learner, task, run)
        check_choice(learner, task, run)
    for choice, theirs in zip(chosen, [ids for p in run.facts["phases"] for ids in p["prompt_ids"]], strict=True):
        same_choice(choice, theirs)
    check_training(run, losses, tmp_path, "pull")
    for name, theirs in names.items():
        close(learner.get_parameter(name), ours(theirs, run.arrays[f"final/{theirs}"]), name)


def check_training(run: Recorded, losses: list[list[float]], folder: Path, part: str) -> None:
    """Every loss; of every epoch the rate, and the mean cross-entropy, which is recorded as `ce`, and so what is beside it."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for ours, facts in zip(losses, run.facts["phases"], strict=True):
        assert np.abs(np.array(ours) - facts["losses"]).max() <= TOLERANCE, facts["task"]
        epochs = [r for r in rows if r["kind"] == "epoch" and r["task"] == facts["task"]]
        assert np.abs(np.array([r["lr"] for r in epochs]) - facts["lr_per_epoch"]).max() <= TOLERANCE
        by_epoch = {k: np.reshape(facts[k], (len(epochs), -1)).mean(axis=1) for k in ("ce", "losses")}
        assert np.abs([r["task_loss"] for r in epochs] - by_epoch["ce"]).max() <= TOLERANCE, part
        assert np.abs([r["loss"] for r in epochs] - by_epoch["losses"]).max() <= TOLERANCE
