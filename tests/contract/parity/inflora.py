"""InfLoRA against the authors' code: every loss, logit, feature, moment, update, basis and accuracy; bases up to sign."""

import json
import math
from pathlib import Path

import numpy as np
import torch

from tests.helpers.recorded import Recorded, check_losses, check_scores, close, learn_all


def check(run: Recorded, tmp_path: Path, monkeypatch) -> None:
    c, arrays, layers = run.config, run.arrays, range(run.config["depth"])
    settings = {k: c[k] for k in ("rank", "lamb", "lame", "batch_size", "epochs", "optimizer")} | {"init_lr": c["lr"]}
    settings |= {"late_schedule": c["optimizer"] == "adam", "short_first_basis": True}
    for part in ("weight", "bias"):
        arrays[f"init/head.{part}"] = np.concatenate([arrays[f"init/task{t}.head.{part}"] for t in range(c["tasks"])])
    for t in range(c["tasks"]):
        for layer in layers:
            arrays[f"init/tasks.{t}.layers.{layer}.kv.up"] = np.zeros((2 * c["embed_dim"], c["rank"]))

    phases: list[list[float]] = []
    for task, learner in learn_all(run, "inflora", settings, tmp_path, monkeypatch, phases):
        at = f"task{task.index}"
        check_scores(learner, task, run)
        for layer, moment in enumerate(learner._moments(task, "")):
            update = learner.slots()[layer].newest()["kv"]
            b = [torch.from_numpy(arrays[f"final/{at}.B_{part}.{layer}"]) for part in "kv"]
            ours, theirs = update.up @ update.down, torch.cat(b) @ torch.from_numpy(arrays[f"{at}/A.{layer}"])
            close(ours, theirs.numpy(), f"update of task {task.index}, layer {layer}")
            close(moment, arrays[f"{at}/post_matrix.{layer}"], f"moments after task {task.index}, layer {layer}")
            memory, basis = learner.memory(layer), arrays[f"{at}/gpm.{layer}"]
            close(memory.projector, basis @ basis.T, f"projector of task {task.index}, layer {layer}")
            facts = run.facts["tasks"][task.index]
            assert int(memory.dim) == facts["gpm_dim"][layer] == round(float(memory.projector.trace()))
            assert bool(memory.retains) == (facts["gpm_type"][layer] == "retain")
            assert math.isclose(float(update.down.norm() ** 2), c["rank"] / 3)
    check_losses(phases, run)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = {(row["task"], row["layer"]): row["values"] for row in rows if row["kind"] == "directions"}
    for phase in run.facts["phases"]:
        for layer, values in enumerate(phase["svd_values"]):
            ours_values = found[phase["task"], layer]
            close(
                torch.tensor(ours_values, dtype=torch.float64), np.array(values[: len(ours_values)]), "singular values"
            )
    for part in ("weight", "bias"):
        theirs_head = np.concatenate([arrays[f"final/task{t}.head.{part}"] for t in range(c["tasks"])])
        close(getattr(learner.head, part), theirs_head, f"head {part}")
