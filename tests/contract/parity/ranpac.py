"""RanPAC against LAMDA-PILOT (scores cosine) and its authors' code (linear): session, statistics, lambda, solution, logits.

Both choose lambda on the task alone in the order of the recorded pass, so the key `ranpac_ridge` is set. Errors of lambdas
below 1e-2 are not compared: there two correct solvers differ."""

import json
from pathlib import Path

import numpy as np
import torch

from backbone.heads.heads import RIDGES
from tests.helpers.recorded import Recorded, check_first_session, close, first_session, learn_all, logits_of


def check(run: Recorded, tmp_path: Path, monkeypatch) -> None:
    seen, settings = first_session(run, monkeypatch)
    settings |= {"M": run.config["M"], "use_RP": run.config["use_RP"], "ranpac_ridge": "task"}
    settings["ranpac_scores"] = run.facts["scores"]
    real_initialise, real_tasks = run.initialise, run.tasks

    def initialise(name, module):
        if name == "statistics":
            module.projection.copy_(torch.from_numpy(run.arrays["projection"]))
        else:
            real_initialise(name, module)

    def tasks():
        for task in real_tasks():
            labels = run.arrays["train_labels"]
            own = np.flatnonzero((labels >= task.first) & (labels < task.total))
            order = torch.from_numpy(np.searchsorted(own, run.arrays[f"task{task.index}/stat_order"]))
            task.train.order = lambda epoch, stream, order=order: order
            yield task

    run.initialise, run.tasks = initialise, tasks
    for task, learner in learn_all(run, "ranpac", settings, tmp_path, monkeypatch, []):
        at, facts, head = f"task{task.index}", run.facts["tasks"][task.index], learner.statistics
        logits = logits_of(learner, run)
        close(logits, run.arrays[f"{at}/test_logits"], f"logits after task {task.index}")
        close(head.weight[: task.total], run.arrays[f"{at}/head_weight"], f"solution after task {task.index}")
        close(head.sums.T, run.arrays[f"{at}/Q"], f"Q after task {task.index}")
        assert float(head.ridge) == facts["ridge"]
        if run.facts["scores"] == "cosine":
            assert abs(float(learner.sigma) - facts["sigma"]) < 1e-9
            linear = head.lift(torch.from_numpy(run.arrays["test_features"])) @ head.weight[: task.total].T
            close(linear, run.arrays[f"{at}/linear_scores"], "linear scores")
        run.check_accuracies(logits, task.first, task.index)
        rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        errors = (
            torch.tensor([r for r in rows if r["kind"] == "head"][-1]["errors"], dtype=torch.float64) / run.num_classes
        )
        fair = [ridge >= 0.99e-2 for ridge in RIDGES]
        close(errors[fair], run.arrays[f"{at}/ridge_losses"][fair], "errors of the lambdas")
    for part in ("train", "test"):
        images = torch.from_numpy(run.arrays[f"{part}_images"]).double()
        close(learner.features(images), run.arrays[f"{part}_features"], f"{part} features")
    close(learner.statistics.gram, run.arrays["final/G"], "G")
    check_first_session(run, learner, seen)
