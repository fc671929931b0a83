"""Folders of finished runs, written without a run."""

import json

from utils.evaluation.metrics import Score
from utils.run.record import RunRecord, results_json


def make(folder, seed=1, right=6, tasks=2, commit="abc", order=None, **settings):
    """A finished run: `right` of 8 test images of each task, two of the wrong ones taken for the first task's classes."""
    record = RunRecord(settings.get("model_name", "sema"), settings.get("dataset", "digits"), seed,
                       order or list(range(tasks)), [[t] for t in range(tasks)])  # fmt: skip
    for t in range(tasks):
        taken = [
            [8, *[0] * t]
        ]  # by task of the class: the first task's own, of later ones two the first's and six their own
        taken += [[2 * (j == 0) + 6 * (j == k) for j in range(t + 1)] for k in range(1, t + 1)]
        scores = [Score(8, right if t else 8, None, 8, tuple(row)) for row in taken]
        record.add_task(
            scores, adapters_per_layer={3: t + 1}, trainable_parameters=10, total_parameters=1000,
            seconds={"train": 2.0}, images=10, peak_memory_bytes=2**20,
        )  # fmt: skip
    folder.mkdir(parents=True)
    values = {"model_name": "sema", "dataset": "digits", "init_lr": 0.01, "device": "cpu", "seed": [seed]} | settings
    command = f"python main.py --config x.json --set seed={seed}"
    environment = {"time": str(seed), "command": command, "git": {"commit": commit, "dirty": False}, "python": "3.12"}
    for name, content in (("results", results_json(record)), ("config", values), ("environment", environment)):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
