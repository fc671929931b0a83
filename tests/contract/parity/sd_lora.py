"""SD-LoRA against the authors' code: every loss, logit, feature, factor, magnitude and accuracy."""

from pathlib import Path

import numpy as np
import torch

from models import sd_lora as method
from tests.helpers.recorded import Recorded, check_losses, check_scores, close, learn_all, watch_fit

FACTORS = {"down": "A", "up": "B"}


def check(run: Recorded, tmp_path: Path, monkeypatch) -> None:
    c, arrays = run.config, run.arrays
    keys = ("rank", "batch_size", "init_epoch", "init_lr", "init_milestones", "init_lr_decay")
    settings = {k: c[k] for k in (*keys, "epochs", "lrate", "milestones", "lrate_decay")} | {"restart_magnitudes": True}
    for part in ("weight", "bias"):
        arrays[f"init/head.{part}"] = np.concatenate([arrays[f"init/task{t}.fc.{part}"] for t in range(c["tasks"])])
    for t in range(c["tasks"]):
        for layer in range(c["depth"]):
            for part in method.PARTS:
                for ours, theirs in FACTORS.items():
                    value = arrays[f"init/task{t}.{theirs}_{part}.{layer}"]
                    arrays[f"init/tasks.{t}.layers.{layer}.{part}.{ours}"] = value

    before: list[list[float]] = []  # magnitudes before every step

    def watched(real, learner, task, step, *args, **options):
        def seen(images, labels):
            before.append([value.item() for value in learner.magnitudes])
            return step(images, labels)

        return real(learner, task, seen, *args, **options)

    watch_fit(monkeypatch, watched)
    phases: list[list[float]] = []
    for task, learner in learn_all(run, "sd_lora", settings, tmp_path, monkeypatch, phases):
        at = f"task{task.index}"
        check_scores(learner, task, run)
        close(torch.stack(list(learner.magnitudes)), arrays[f"{at}/magnitudes"], f"magnitudes after task {task.index}")
        for part in ("weight", "bias"):
            close(getattr(learner.head, part)[: task.total], arrays[f"{at}/fc.{part}"], f"head after task {task.index}")
        for layer, slot in enumerate(learner.slots()):
            for part, lora in slot.newest().items():
                for ours, theirs in FACTORS.items():
                    value = arrays[f"final/{at}.{theirs}_{part}.{layer}"]
                    close(getattr(lora, ours), value, f"{theirs}_{part} of task {task.index}, layer {layer}")
    check_losses(phases, run)
    expected = [values for phase in run.facts["phases"] for values in phase["magnitudes"]]
    for ours_values, theirs_values in zip(before, expected, strict=True):
        close(torch.tensor(ours_values, dtype=torch.float64), np.array(theirs_values), "magnitudes before a step")
