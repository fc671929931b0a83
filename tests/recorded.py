"""A recorded run of a method's original code, and our real learner over its tasks; tests/parity/<method>.py compares them.

Only the images come from the files, in file order; what is drawn is copied in from them.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from backbone.vit import SlottedViT
from utils import metrics
from utils.runlog import RunLog

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
