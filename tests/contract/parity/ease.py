"""EASE against its authors' code: losses, adapters and local heads, features, synthesised prototypes, scores."""

from pathlib import Path

import numpy as np
import torch

from tests.helpers.recorded import Recorded, Sessions, close, learn_all, logits_of


def check(run: Recorded, tmp_path: Path, monkeypatch) -> None:
    c = run.config

    def keep(task: int, step: int, layer: int, batch: int) -> np.ndarray:
        return run.arrays[f"task{task}/dropout_keep"][step, layer, :batch]

    seen = Sessions(monkeypatch, c["depth"], keep if c["adapter_dropout"] else None)
    names = ("ffn_num", "batch_size", "optimizer", "init_lr", "min_lr", "weight_decay", "init_epochs", "use_init_ptm")
    settings = {k: c[k] for k in names} | {"alpha": c["alpha"], "beta": float(c["beta"])}
    settings |= {"ffn_adapter_scalar": c["adapter_scale"], "ffn_adapter_dropout": c["adapter_dropout"]}
    images = torch.from_numpy(run.arrays["test_images"]).double()
    for task, learner in learn_all(run, "ease", settings, tmp_path, monkeypatch, []):
        at, head = f"task{task.index}", learner.statistics
        phase = run.facts["phases"][task.index]
        assert len(seen.losses) == task.index + 1 and len(seen.losses[-1]) == len(phase["losses"])
        close(torch.tensor(seen.losses[-1], dtype=torch.float64), np.array(phase["losses"]), "losses")
        for name, tensor in seen.heads[-1].items():
            close(tensor, run.arrays[f"{at}/local_head.{name}"], f"local head {name}")
        close(learner.features(images), run.arrays[f"{at}/test_features"], "features")
        close(head.weight[: task.total], run.arrays[f"{at}/prototypes"], f"prototypes after task {task.index}")
        for i in range(task.index):
            for j in range(i + 1, task.index + 1):
                close(head.similarity(i, j), run.arrays[f"{at}/cosine.{i}.{j}"], f"similarities {i} {j}")
                close(head.mapping(i, j), run.arrays[f"{at}/mapping.{i}.{j}"], f"mapping {i} {j}")
        logits = logits_of(learner, run)
        close(logits, run.arrays[f"{at}/test_logits"], f"scores after task {task.index}")
        run.check_accuracies(logits, task.first, task.index)
    for layer, slot in enumerate(learner.backbone.slots.values()):
        for number, adapter in enumerate(slot.adapters):
            for name, tensor in adapter.named_parameters():
                recorded = run.arrays[f"final/task{number}.adapters.{layer}.{name}"]
                close(tensor, recorded, f"task {number} layer {layer} {name}")
