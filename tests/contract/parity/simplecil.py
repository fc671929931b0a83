"""SimpleCIL against LAMDA-PILOT: logits and prototypes."""

from pathlib import Path

from tests.helpers.recorded import Recorded, close, learn_all, logits_of


def check(run: Recorded, tmp_path: Path, monkeypatch) -> None:
    for task, learner in learn_all(run, "simplecil", {}, tmp_path, monkeypatch, []):
        logits = logits_of(learner, run)
        close(logits, run.arrays[f"task{task.index}/test_logits"], f"logits after task {task.index}")
        close(
            learner.statistics.weight[: task.total],
            run.arrays[f"task{task.index}/head_weight"],
            f"prototypes after task {task.index}",
        )
        run.check_accuracies(logits, task.first, task.index)
