"""SLCA against LAMDA-PILOT: every loss, logit, feature, class statistic, sample, head, backbone weight and accuracy."""

from pathlib import Path

import numpy as np
import torch

from models import slca as method
from tests.helpers.recorded import TOLERANCE, Recorded, close, learn_all, logits_of


def check(run: Recorded, tmp_path: Path, monkeypatch) -> None:
    c, arrays = run.config, run.arrays
    keys = ("batch_size", "epochs", "lrate", "bcb_lrscale", "weight_decay", "milestones", "lrate_decay", "ca_epochs")
    settings = {k: c[k] for k in (*keys, "ca_with_logit_norm")}
    settings |= {"ca_samples": c["num_sampled"], "ca_task_by_size": True}
    for part in ("weight", "bias"):
        arrays[f"init/head.{part}"] = np.concatenate([arrays[f"init/task{t}.head.{part}"] for t in range(c["tasks"])])

    def recorded(learner, task, epoch):
        order = torch.from_numpy(arrays[f"task{task.index}/ca_perm"][epoch]).long()
        return torch.from_numpy(arrays[f"task{task.index}/ca_normals"][epoch]), order

    monkeypatch.setattr(method.Learner, "_draw", recorded)
    phases: list[list[float]] = []
    for task, learner in learn_all(run, "slca", settings, tmp_path, monkeypatch, phases):
        at, own = f"task{task.index}", slice(task.first, task.total)
        logits = logits_of(learner, run)
        close(logits, arrays[f"{at}/test_logits"], f"logits after task {task.index}")
        features = learner.features(torch.from_numpy(arrays["test_images"]).double())
        close(features, arrays[f"{at}/test_features"], f"features after task {task.index}")
        plain = (features @ learner.unaligned[:, :-1].T + learner.unaligned[:, -1])[:, : task.total]
        close(plain, arrays[f"{at}/test_logits_before_ca"], f"logits before alignment after task {task.index}")
        run.check_accuracies(logits, task.first, task.index)
        factors = learner.gaussians.factors[own]
        close(learner.gaussians.means[own], arrays[f"{at}/class_mean"], f"means of task {task.index}")
        close(factors @ factors.mT, arrays[f"{at}/class_cov"], f"covariances of task {task.index}")
        if task.index:
            drawn = learner.gaussians.sample(recorded(learner, task, 0)[0].double(), learner._shrinking(task))
            close(drawn, arrays[f"{at}/ca_samples_epoch0"], f"samples of task {task.index}")
        for earlier in range(task.index + 1):
            rows = slice(sum(run.sizes[:earlier]), sum(run.sizes[: earlier + 1]))
            for part in ("weight", "bias"):
                value = arrays[f"{at}/aligned_head.{earlier}.{part}"]
                close(getattr(learner.head, part)[rows], value, f"aligned head {earlier} after task {task.index}")
    assert len(phases) == len(run.facts["phases"])
    for ours, phase in zip(phases, run.facts["phases"], strict=True):
        assert np.abs(np.array(ours) - phase["losses"]).max() <= TOLERANCE, (phase["task"], phase["phase"])
    kept = [
        np.column_stack([arrays[f"final/head.{t}.weight"], arrays[f"final/head.{t}.bias"]]) for t in range(c["tasks"])
    ]
    close(learner.unaligned, np.concatenate(kept), "the head that is kept")
    state = learner.backbone.vit.state_dict()
    for name in (n for n in arrays if n.startswith("final/backbone/")):
        close(state[name.removeprefix("final/backbone/")], arrays[name], name)
