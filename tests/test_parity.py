"""Holds our learners to recorded runs of the original code: every loss, logit, weight and expansion, to 1e-9 in float64.

Runs every NAME.json + NAME.npz under PARITY_DIR/<method>/ (default: tests/fixtures/parity); folders of methods that do
not exist yet are skipped by name. The real learner learns; only the images come from the files, in file order.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import models
from backbone.vit import SlottedViT
from utils import metrics
from utils.runlog import RunLog

FOLDER = Path(os.environ.get("PARITY_DIR", Path(__file__).parent / "fixtures" / "parity"))
PAIRS = sorted(p for p in FOLDER.glob("*/*.json") if p.with_suffix(".npz").is_file())
TOLERANCE = 1e-9
COMMON = {"dataset": "digits", "init_cls": 2, "increment": 2}


class FileData:
    """A task's samples in file order, whatever order or augmentation is asked for."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images = torch.from_numpy(images).double()
        self.labels = torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch_size, *, epoch=0, stream="train", augment=True, shuffle=True):
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
        ours = metrics.grouped(guess, labels[seen], known, self.sizes[: task + 1])
        assert {k: ours[k] for k in self.facts["tasks"][task]["grouped"]} == self.facts["tasks"][task]["grouped"]


def close(ours: torch.Tensor, theirs: np.ndarray, what: str) -> None:
    difference = np.abs(ours.detach().numpy() - theirs).max()
    assert difference <= TOLERANCE, f"{what}: differs by {difference:.2e}"


def learn_all(run: Recorded, method: str, settings: dict, tmp_path: Path, monkeypatch, phases: list[list[float]]):
    """Runs the real learner over the recorded tasks; yields (task, learner) after each; `phases` collects the losses."""
    module = __import__(f"models.{method}", fromlist=["Learner"])
    if hasattr(module, "fit"):
        real = module.fit
        monkeypatch.setattr(module, "fit", lambda *a, **k: phases.append(real(*a, **k)))
    cfg = module.Settings(model_name=method, **COMMON, **settings)
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


def check_sema(run: Recorded, tmp_path: Path, monkeypatch) -> None:
    c = run.config
    keys = (
        "ffn_num",
        "rd_dim",
        "buffer_size",
        "adapt_start_layer",
        "adapt_end_layer",
        "batch_size",
        "detect_batch_size",
    )
    keys += ("weight_decay", "init_lr", "rd_lr", "func_epoch", "rd_epoch", "exp_threshold")
    settings = {k: c[k] for k in keys} | {"optimizer": run.facts["optimizer"]}
    phases: list[list[float]] = []
    for task, learner in learn_all(run, "sema", settings, tmp_path, monkeypatch, phases):
        logits = logits_of(learner, run)
        assert logits.shape[1] == task.total
        close(
            learner.backbone(torch.from_numpy(run.arrays["test_images"])),
            run.arrays[f"task{task.index}/test_features"],
            "features",
        )
        close(logits, run.arrays[f"task{task.index}/test_logits"][:, : task.total], f"logits after task {task.index}")
        recorded = run.facts["tasks"][task.index]
        assert learner.adapters_per_layer() == recorded["adapters"]
        run.check_accuracies(logits, task.first, task.index)
    assert len(phases) == len(run.facts["phases"])
    for ours_losses, theirs in zip(phases, run.facts["phases"], strict=True):
        assert np.abs(np.array(ours_losses) - theirs["losses"]).max() <= TOLERANCE, (theirs["task"], theirs["phase"])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    grown = [(r["layer"], r["adapter"]) for r in rows if r["kind"] == "expand"]
    assert grown == [(e["layer"], e["adapter"]) for e in run.facts["expansions"]]
    close(learner.head.weight, run.arrays["final/fc.weight"], "head")
    close(learner.head.bias, run.arrays["final/fc.bias"], "head bias")
    for layer in range(c["depth"]):
        slot = learner._layer(layer)
        at = f"final/backbone.blocks.{layer}.adapter_module"
        for k, adapter in enumerate(slot.adapters):
            for name, tensor in adapter.named_parameters():
                close(tensor, run.arrays[f"{at}.adapters.{k}.functional.{name}"], f"layer {layer} adapter {k} {name}")
        for k, descriptor in enumerate(slot.descriptors):
            for name, tensor in descriptor.named_parameters():
                close(tensor, run.arrays[f"{at}.adapters.{k}.rd.{name}"], f"layer {layer} descriptor {k} {name}")
            record = run.arrays[f"final_record/layers.{layer}.adapters.{k}"]
            assert int(descriptor.count) == len(record)
            close(descriptor.record[: len(record)], record, f"layer {layer} record {k}")
        if len(slot.router):
            close(
                torch.cat([c.weight for c in slot.router.columns]),
                run.arrays[f"{at}.router.weight"],
                f"layer {layer} router",
            )
            close(
                torch.cat([c.bias for c in slot.router.columns]),
                run.arrays[f"{at}.router.bias"],
                f"layer {layer} router bias",
            )


def check_simplecil(run: Recorded, tmp_path: Path, monkeypatch) -> None:
    for task, learner in learn_all(run, "simplecil", {}, tmp_path, monkeypatch, []):
        logits = logits_of(learner, run)
        close(logits, run.arrays[f"task{task.index}/test_logits"], f"logits after task {task.index}")
        close(
            learner.statistics.weight[: task.total],
            run.arrays[f"task{task.index}/head_weight"],
            f"prototypes after task {task.index}",
        )
        run.check_accuracies(logits, task.first, task.index)


CHECKS = {"sema": check_sema, "simplecil": check_simplecil}


def test_reference_runs_are_there():
    assert {p.parent.name for p in PAIRS} >= set(CHECKS) or "PARITY_DIR" in os.environ
    assert PAIRS, f"no reference runs under {FOLDER}"


@pytest.mark.parametrize("path", PAIRS, ids=[f"{p.parent.name}/{p.stem}" for p in PAIRS])
def test_equals_the_original(path, tmp_path, monkeypatch):
    method = path.parent.name
    if method not in models.available():
        pytest.skip(f"{method} is not built yet")
    assert method in CHECKS, f"{method} exists and has reference runs, but no check reads them"
    CHECKS[method](Recorded(path), tmp_path, monkeypatch)
