"""A recorded run of a method's original code, and our real learner over its tasks; tests/contract/parity/<method>.py
compares them.

Only the images come from the files, in file order; what is drawn is copied in from them.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import models
from backbone.adapters import adapter
from backbone.vit import SlottedViT
from models.learner.fit import fit
from utils.run.log import RunLog

TOLERANCE = 1e-9


class FileData:
    """A task's samples in file order, whatever order or augmentation is asked for."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images = torch.from_numpy(images).double()
        self.labels = torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch_size, *, epoch=0, draw="train", augment=True, shuffle=True):
        index = torch.arange(len(self))
        return list(zip(*(t.split(batch_size) for t in (self.images, self.labels, index)), strict=True))


class Recorded:
    """One reference run: its facts, its arrays, and the tasks they describe."""

    def __init__(self, path: Path):
        self.facts = json.loads(path.read_text())
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
            self.arrays = {k: arrays[k] for k in arrays.files}
        self.config = self.facts["config"]
        per_task = self.config.get("classes_per_task")
        self.sizes = self.facts.get("task_sizes") or [per_task] * self.config["tasks"]
        self.num_classes = sum(self.sizes)

    def backbone(self) -> SlottedViT:
        c = self.config
        vit = VisionTransformer(
            img_size=c["img_size"],
            patch_size=c["patch_size"],
            embed_dim=c["embed_dim"],
            depth=c["depth"],
            num_heads=c["num_heads"],
            mlp_ratio=c["mlp_ratio"],
            num_classes=0,
        ).double()
        state = {
            k.removeprefix("backbone/"): torch.from_numpy(v)
            for k, v in self.arrays.items()
            if k.startswith("backbone/")
        }
        vit.load_state_dict(state, strict=True)
        return SlottedViT(vit).double()

    def tasks(self):
        first = 0
        for index, size in enumerate(self.sizes):
            own = (self.arrays["train_labels"] >= first) & (self.arrays["train_labels"] < first + size)
            data = FileData(self.arrays["train_images"][own], self.arrays["train_labels"][own])
            yield SimpleNamespace(index=index, first=first, total=first + size, class_ids=(), train=data, past=())
            first += size

    def initialise(self, name: str, module: nn.Module) -> None:
        """Copies the recorded start values in; what was not recorded (biases) starts at 0."""
        for parameter, tensor in module.named_parameters():
            value = self.arrays.get(f"init/{name}.{parameter}")
            assert value is not None or parameter == "bias", f"no start value for {name}.{parameter}"
            with torch.no_grad():
                tensor.zero_() if value is None else tensor.copy_(torch.from_numpy(value))

    def check_accuracies(self, logits: torch.Tensor, known: int, task: int) -> None:
        """Every accuracy the original reported, rounded as it does."""
        labels, total = self.arrays["test_labels"], sum(self.sizes[: task + 1])
        seen = labels < total
        guess = logits[torch.from_numpy(seen), :total].argmax(1).numpy()
        ours = grouped(guess, labels[seen], known, self.sizes[: task + 1])
        assert {k: ours[k] for k in self.facts["tasks"][task]["grouped"]} == self.facts["tasks"][task]["grouped"]


def grouped(predicted: np.ndarray, labels: np.ndarray, known: int, sizes: list[int]) -> dict[str, float]:
    """Accuracy in percent (two decimals) of groups of classes, in the form SEMA-CL and PILOT log it.

    `predicted`, `labels` [N] in order of arrival; `sizes[t]` classes of task t; the first `known` classes are "old".
    Keys: `total`, one per task such as `00-09`, `old`, `new`. As there, `old` or `new` without samples is 0. Two departures:
    theirs drops a last group of one class (`range(.., max(labels), ..)` ends before it) and names a ragged last group beyond
    its end. A task without samples is left out, where theirs has NaN.
    """
    right = predicted == labels

    def percent(rows: np.ndarray) -> float:
        return round(100.0 * float(right[rows].mean()), 2) if rows.any() else 0.0

    groups, first = {"total": percent(np.ones(len(labels), dtype=bool))}, 0
    for size in sizes:
        rows = (labels >= first) & (labels < first + size)
        if rows.any():
            groups[f"{first:02d}-{first + size - 1:02d}"] = percent(rows)
        first += size
    return {**groups, "old": percent(labels < known), "new": percent(labels >= known)}


def close(ours: torch.Tensor, theirs: np.ndarray, what: str) -> None:
    difference = np.abs(ours.detach().numpy() - theirs).max()
    assert difference <= TOLERANCE, f"{what}: differs by {difference:.2e}"


def watch_fit(monkeypatch, around: Callable) -> None:
    """Replaces `fit` in every module of models/ that calls it: a call of it becomes `around(what was there, ...)`."""
    for method in models.available():
        models.learner_of(method)  # imports what it needs
    for name, module in list(sys.modules.items()):
        if name.startswith("models.") and callable(real := getattr(module, "fit", None)) and name != fit.__module__:
            monkeypatch.setattr(module, "fit", lambda *a, real=real, **k: around(real, *a, **k))


def learn_all(run: Recorded, method: str, settings: dict, tmp_path: Path, monkeypatch, phases: list[list[float]]):
    """Runs the real learner over the recorded tasks; yields (task, learner) after each; `phases` collects the losses."""
    module = __import__(f"models.{method}", fromlist=["Learner"])

    def collected(real, *arguments, **options):
        fitted = real(*arguments, **options)
        phases.append(fitted.losses)
        return fitted

    watch_fit(monkeypatch, collected)
    split = {"init_cls": run.sizes[0], "increment": tuple(run.sizes[1:])}
    cfg = module.Settings(model_name=method, dataset="digits", **split, **settings)
    with RunLog(tmp_path, console=False) as log:
        learner = module.Learner(cfg, run.backbone(), run.num_classes, run.initialise, log)
        for task in run.tasks():
            learner.learn(task)
            learner.consolidate(task)
            learner.eval()
            yield task, learner


def logits_of(learner, run: Recorded) -> torch.Tensor:
    with torch.no_grad():
        return learner.logits(torch.from_numpy(run.arrays["test_images"]).double())


def check_scores(learner, task, run: Recorded) -> None:
    """Logits, features and accuracies of the test images after a task."""
    at, logits = f"task{task.index}", logits_of(learner, run)
    close(logits, run.arrays[f"{at}/test_logits"], f"logits after task {task.index}")
    features = learner.features(torch.from_numpy(run.arrays["test_images"]))
    close(features, run.arrays[f"{at}/test_features"], f"features after task {task.index}")
    run.check_accuracies(logits, task.first, task.index)


def check_losses(phases: list[list[float]], run: Recorded) -> None:
    """Every loss of every phase."""
    assert len(phases) == len(run.facts["phases"])
    for losses, phase in zip(phases, run.facts["phases"], strict=True):
        assert np.abs(np.array(losses) - phase["losses"]).max() <= TOLERANCE, phase["task"]


# Training sessions of adapters with a cosine head (APER, RanPAC, EASE) ----------------------------------------------------


class Sessions:
    """Watches `models.families.sessions`: the losses of each session, and its head and what it trained as they were at its end.

    `keep(session, step, layer, batch)` gives the recorded dropout masks [B, N, R], true where a hidden unit was kept."""

    def __init__(self, monkeypatch, depth: int, keep=None):
        self.losses: list[list[float]] = []
        self.heads: list[dict[str, torch.Tensor]] = []
        self.depth, self.keep, self.calls = depth, keep, 0
        self.real_dropout = adapter.F.dropout
        watch_fit(monkeypatch, self.fit)
        monkeypatch.setattr(adapter, "F", SimpleNamespace(**{**vars(adapter.F), "dropout": self.dropout}))

    def fit(self, real, learner, *rest, **options):
        self.calls = 0
        fitted = real(learner, *rest, **options)
        self.losses.append(fitted.losses)
        assert self.keep is None or self.calls == self.depth * len(self.losses[-1]), "dropout masks are left over"
        self.heads.append({k: v.detach().clone() for k, v in learner.local_head.named_parameters()})
        return fitted

    def dropout(self, hidden, p=0.5, training=True):
        if not training or not p:
            return self.real_dropout(hidden, p, training)
        step, layer = divmod(self.calls, self.depth)
        self.calls += 1
        keep = torch.from_numpy(self.keep(len(self.losses), step, layer, len(hidden)))[:, : hidden.shape[1]]
        return hidden * keep / (1 - p)  # the last block computes the class token alone, hence the slice


def check_first_session(run: Recorded, learner: nn.Module, seen: Sessions) -> None:
    """APER's and RanPAC's session against the recorded one: losses, trained adapters and head."""
    assert len(seen.losses) == 1 and len(seen.losses[0]) == len(run.facts["phases"][0]["losses"])
    close(torch.tensor(seen.losses[0], dtype=torch.float64), np.array(run.facts["phases"][0]["losses"]), "losses")
    for name, tensor in seen.heads[0].items():
        close(tensor, run.arrays[f"adapted/head.{name}"], f"session head {name}")
    for layer, slot in enumerate(learner.backbone.slots.values()):
        adapted = getattr(slot, "adapters", [slot])[0]
        for name, tensor in adapted.named_parameters():
            close(tensor, run.arrays[f"adapted/layers.{layer}.adapter.{name}"], f"layer {layer} {name}")


def first_session(run: Recorded, monkeypatch) -> tuple[Sessions, dict]:
    """The watched session of an APER or RanPAC run, and the settings of both methods."""
    c, sizes = run.config, run.sizes
    count = int((run.arrays["train_labels"] < sizes[0]).sum())

    def keep(number: int, step: int, layer: int, batch: int) -> np.ndarray:
        epoch, at = divmod(step, -(-count // c["batch_size"]))
        start = epoch * count + at * c["batch_size"]
        return run.arrays[f"dropout_keep/layers.{layer}"][start : start + batch]

    names = ("ffn_num", "batch_size", "tuned_epoch", "init_lr", "min_lr", "weight_decay")
    settings = {k: c[k] for k in names} | {"optimizer": run.facts["optimizer"]}
    settings |= {"ffn_adapter_scalar": c["adapter_scale"], "ffn_adapter_dropout": c["adapter_dropout"]}
    return Sessions(monkeypatch, c["depth"], keep if c["adapter_dropout"] else None), settings
