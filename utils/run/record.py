"""The record of a run: counts by task, and the figures of results.json computed from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from utils.evaluation import error_parts, metrics
from utils.evaluation.metrics import Score
from utils.files.storage import plain
from utils.run import measures

PHASES = ("train", "detect", "evaluate")  # keys of `seconds`
# Fields that records of older versions do not have, the newest first: each version lacks those of the versions after it.
ADDED_LATER = ({"by_image", "by_task"}, {"confusion", "wrong_task", "peak_by_task"})
ADDED_LAST: dict[str, Any] = {"other_heads": []}  # and what those are that records of all versions before this lack


@dataclass
class RunRecord:
    """The counts of one run (one seed), an entry for each finished task; results.json is computed from them.

    `class_order[i]` is the original class that arrives i-th, `task_classes[t]` the original classes of task t, for all
    planned tasks. `correct[t][k]` is the number of correct predictions on the `samples[k]` test samples of task k after task
    t; `confusion[k][j]` the number predicted as a class of task j after the newest task; `wrong_task[t]` the numbers
    predicted as a class of an older and of a newer task after task t. `peak_by_task[t]` is the largest memory of the process,
    in bytes, up to the end of task t. `by_image` and `by_task[t]` are described in utils/run/measures.py. Entries are None
    for tasks that ran under a version which did not count them.
    """

    model_name: str
    dataset: str
    seed: int
    class_order: list[int]
    task_classes: list[list[int]]
    samples: list[int] = field(default_factory=list)
    correct: list[list[int]] = field(default_factory=list)
    correct_top5: list[int | None] = field(default_factory=list)
    correct_oracle: list[int] = field(default_factory=list)
    adapters_per_layer: list[dict[str, int]] = field(default_factory=list)
    trainable_parameters: list[int] = field(default_factory=list)
    total_parameters: list[int] = field(default_factory=list)
    seconds: list[dict[str, float]] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    selection_history: list[Any] = field(default_factory=list)
    test_evaluations: int = 0
    peak_memory_bytes: int = 0
    head_drift: list[dict[str, Any]] = field(default_factory=list)
    confusion: list[list[int]] | None = None
    wrong_task: list[list[int] | None] = field(default_factory=list)
    peak_by_task: list[int | None] = field(default_factory=list)
    by_image: dict[str, Any] | None = None
    by_task: list[dict[str, Any] | None] = field(default_factory=list)
    other_heads: list[dict[str, float] | None] = field(default_factory=list)

    def add_task(
        self,
        scores: Sequence[Score],
        *,
        adapters_per_layer: Mapping[Any, int],
        trainable_parameters: int,
        total_parameters: int,
        seconds: Mapping[str, float],
        images: int,
        selections: Sequence[Any] = (),
        test_evaluations: int = 1,
        peak_memory_bytes: int = 0,
        head_drift: Mapping[str, Any] | None = None,
        by_image: Mapping[str, Any] | None = None,
        by_task: Mapping[str, Any] | None = None,
        other_heads: Mapping[str, float] | None = None,
    ) -> None:
        """Appends the next task t: `scores[k]` for k = 0..t, adapters by layer, seconds of train, detect and evaluate.

        `images` is the number of training images shown (with repeats); `selections` are appended to `selection_history`.
        `by_image` and `by_task`: of utils/run/measures.py.
        `head_drift`, if measured, has `task`, the accuracies `stale`, perhaps `repaired`, and `recomputed` as fractions, and
        `cosine`. `other_heads`, if measured, has the accuracy of each head as a fraction, the one that predicts first.
        Raises ValueError if the number of scores, the sizes of earlier test sets or the phases do not fit.
        """
        t = len(self.correct)
        if len(scores) != t + 1 or t >= len(self.task_classes):
            raise ValueError(f"task {t} of {len(self.task_classes)} needs {t + 1} scores, got {len(scores)}")
        if (sizes := [s.samples for s in scores])[:t] != self.samples:
            raise ValueError(f"test sets changed size between tasks: {self.samples} before, {sizes[:t]} now")
        if unknown := set(seconds) - set(PHASES):
            raise ValueError(f"seconds has unknown phases {sorted(unknown)}; known are {', '.join(PHASES)}")
        top5 = [s.correct_top5 for s in scores if s.correct_top5 is not None]
        self.samples = sizes
        self.correct.append([s.correct for s in scores])
        self.correct_top5.append(sum(top5) if len(top5) == len(scores) else None)
        self.correct_oracle.append(sum(s.correct_oracle for s in scores))
        self.adapters_per_layer.append({str(layer): int(n) for layer, n in adapters_per_layer.items()})
        self.trainable_parameters.append(int(trainable_parameters))
        self.total_parameters.append(int(total_parameters))
        self.seconds.append({phase: float(seconds.get(phase, 0.0)) for phase in PHASES})
        self.images.append(int(images))
        self.selection_history += plain(list(selections), "selections")
        self.test_evaluations += test_evaluations
        self.peak_memory_bytes = max(self.peak_memory_bytes, int(peak_memory_bytes))
        self.peak_by_task.append(int(peak_memory_bytes) or None)
        # only of the newest task: the tables of all tasks would grow with the cube of their number
        self.confusion = [list(s.predicted) for s in scores] if all(len(s.predicted) == t + 1 for s in scores) else None
        self.wrong_task.append(None if self.confusion is None else list(error_parts.wrong_task(self.confusion)))
        self.head_drift += [] if head_drift is None else [plain(dict(head_drift), "head_drift")]
        self.by_image = None if by_image is None else plain(dict(by_image), "by_image")
        self.by_task.append(None if by_task is None else plain(dict(by_task), "by_task"))
        self.other_heads.append(None if other_heads is None else plain(dict(other_heads), "other_heads"))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint, the inverse of `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunRecord:
        """Inverse of `to_dict`, also after a way through JSON; ValueError if a field is missing or unknown.

        A record of an older version lacks counts of ADDED_LATER: it is read with None for the tasks so far."""
        names = {f.name for f in fields(cls)}
        data = {**ADDED_LAST, **data}
        newest, before = ADDED_LATER
        if (lacking := names - set(data)) in (newest, newest | before) and isinstance(data.get("correct"), list):
            of_newest = {"confusion", "by_image"}
            tasks = len(data["correct"])
            data = {**data, **{key: None if key in of_newest else [None] * tasks for key in lacking}}
        if names != set(data):
            raise ValueError(f"not a run record: fields {sorted(names ^ set(data))} are missing or unknown")
        return cls(**deepcopy(dict(data)))  # a copy: the record grows, the checkpoint must not


def _percent(value: float | None) -> float | None:
    return None if value is None else 100.0 * value


def results_json(record: RunRecord, class_names: Sequence[str] | None = None) -> dict[str, Any]:
    """The content of results.json; accuracies, forgetting and transfer in percent, None (null) where undefined.

    `class_names` are those of the original classes 0, 1, ...; None leaves the key out. `accuracy_matrix[t]` has t+1 entries.
    `images_per_second` is training images over training seconds of all tasks.
    `head_drift` has an entry for every task from the second on if class statistics can become stale, else none.
    `heads` is there with the key `compare_heads` alone: by head the accuracy after each task over all classes seen.
    `task_oracle_curve[t]` is the task-incremental accuracy after task t (each sample's task is known),
    `task_oracle_accuracy` its last value. `task_confusion[k][j]` is the number of test samples of task k that the finished
    model predicts as a class of task j. `wrong_task[t]` = [older, newer] are the numbers predicted as a class of an older and
    a newer task after task t. `peak_memory_by_task[t]` is the largest memory of the process up to then, in bytes.
    The keys of `measures.of_results` follow. Formulas: `utils.evaluation.metrics`, `utils.evaluation.error_parts`.
    """
    matrix = metrics.accuracy_rows(record.correct, record.samples)
    curve = metrics.top1_curve(record.correct, record.samples)
    seen = [sum(record.samples[: t + 1]) for t in range(len(matrix))]
    train = sum(entry["train"] for entry in record.seconds)
    return {
        "model_name": record.model_name,
        "dataset": record.dataset,
        "seed": record.seed,
        "class_order": record.class_order,
        **({} if class_names is None else {"class_names": list(class_names)}),
        "task_classes": record.task_classes,
        "accuracy_matrix": [[_percent(value) for value in row] for row in matrix],
        "top1_curve": [_percent(value) for value in curve],
        "top5_curve": [
            None if hits is None or not n else 100.0 * hits / n
            for hits, n in zip(record.correct_top5, seen, strict=True)
        ],
        "last_accuracy": _percent(metrics.last_accuracy(curve)),
        "average_accuracy": _percent(metrics.average_accuracy(curve)),
        "final_task_mean": _percent(metrics.final_task_mean(matrix)),
        "forgetting": _percent(metrics.forgetting(matrix)),
        "backward_transfer": _percent(metrics.backward_transfer(matrix)),
        "task_oracle_accuracy": 100.0 * record.correct_oracle[-1] / seen[-1] if seen and seen[-1] else None,
        "task_oracle_curve": [
            100.0 * hits / n if n else None for hits, n in zip(record.correct_oracle, seen, strict=True)
        ],
        "task_confusion": record.confusion,
        "wrong_task": record.wrong_task,
        "adapters_per_layer": record.adapters_per_layer,
        "trainable_parameters": record.trainable_parameters,
        "total_parameters": record.total_parameters,
        "selection_history": record.selection_history,
        "test_evaluations": record.test_evaluations,
        "seconds": record.seconds,
        "images_per_second": sum(record.images) / train if train > 0 else None,
        "peak_memory_bytes": record.peak_memory_bytes,
        "peak_memory_by_task": record.peak_by_task,
        "head_drift": [
            {
                key: _percent(value) if key in ("stale", "repaired", "recomputed") else value
                for key, value in entry.items()
            }
            for entry in record.head_drift
        ],
        **measures.of_results(record),
        **_heads(record.other_heads),
    }


def _heads(by_task: Sequence[Mapping[str, float] | None]) -> dict[str, Any]:
    """{"heads": {head: accuracy after each task, None where it was not measured}}; empty without any."""
    names = list(dict.fromkeys(name for heads in by_task if heads is not None for name in heads))
    curves = {name: [None if heads is None else _percent(heads.get(name)) for heads in by_task] for name in names}
    return {"heads": curves} if curves else {}
