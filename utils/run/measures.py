"""Measures by class, by image and of cost: what a record stores of them, and their keys in results.json.

`by_image` of a record is of its newest task: the result of `ByImage.summary`, whose classes count in order of arrival, with
`names` of the mistakes (the image files, None for images in memory). `by_task[t]` has, of task t: `new_correct`, right test
images of each of its classes right after it; `new_known`, right ones if their task were known; `ece` as a fraction;
`operations` of the forward pass of one image; `cpu_seconds` and `gpu_seconds`, summed over processes.
Formulas: utils/evaluation/{by_image,calibration,intervals}.py, backbone/operations.py, docs/metrics.md.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from utils.data.names import readable
from utils.evaluation import calibration, metrics
from utils.evaluation.intervals import wilson
from utils.process import parallel

if TYPE_CHECKING:
    from utils.data.tasks import TaskStream
    from utils.evaluation.by_image import ByImage


def of_images(images: ByImage, learner: Any, stream: TaskStream, index: int) -> dict[str, Any]:
    """`by_image` of a record after task `index` (from 0), whose pass `images` has collected."""
    tests = [stream.test(k) for k in range(index + 1)]
    counts = images.summary([t.rows for t in tests], sum(stream.sizes[: index + 1]), learner.gives_log_probabilities)
    names = image_names(tests[0].source.images)
    return counts | {"names": [names[row] for row, *_ in counts["mistakes"]] if names else None}


def image_names(images: Any) -> list[str] | None:
    """The files of an image set below their common folder, None for images in memory."""
    paths: Sequence[str] | None = getattr(images, "paths", None)
    if not paths:
        return None
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [readable(os.path.relpath(path, folder)) for path in paths]


def of_task(
    by_image: dict[str, Any], known: int, *, new: int, operations: int, cpu_seconds: float, gpu_seconds: float
) -> dict[str, Any]:
    """`by_task` of the newest task, which has `new` classes and `known` right test images if their task were known."""
    ranks = parallel.gather_objects([cpu_seconds, gpu_seconds])
    return {
        "new_correct": by_image["correct"][-new:],
        "new_known": known,
        "ece": calibration.error(by_image["bins"]),
        "operations": operations,
        "cpu_seconds": sum(cpu for cpu, _ in ranks),
        "gpu_seconds": sum(gpu for _, gpu in ranks),
    }


def of_results(record: Any) -> dict[str, Any]:
    """The keys of results.json, in percent where they are accuracies; lists by class count as the data set does.

    Where a part of the run had an older version that did not count, None stands, or an empty list."""
    return _of_accuracy(record) | _of_classes(record) | _of_cost(record)


def _percent(value: float | None) -> float | None:
    return None if value is None else 100.0 * value


def _known(record: Any, key: str) -> list[Any]:
    """The entries of `key` by task, None for tasks of older versions."""
    return [None if entry is None else entry[key] for entry in record.by_task]


def _of_accuracy(record: Any) -> dict[str, Any]:
    ends = wilson(sum(record.correct[-1]), sum(record.samples)) if record.correct else None
    matrix = metrics.accuracy_rows(record.correct, record.samples)
    known = [
        None if hits is None or not n else hits / n
        for hits, n in zip(_known(record, "new_known"), record.samples, strict=True)
    ]
    whole = None not in _known(record, "new_known")
    return {
        "last_accuracy_interval": None if ends is None else [100.0 * end for end in ends],
        "learning_accuracy": _percent(metrics.mean(row[t] for t, row in enumerate(matrix))),
        "learning_accuracy_known": _percent(metrics.mean(known)) if whole else None,
        "ece_curve": [_percent(value) for value in _known(record, "ece")],
    }


def _of_classes(record: Any) -> dict[str, Any]:
    counts, order = record.by_image, record.class_order
    if counts is None:
        lists = ("class_images", "class_accuracy", "class_accuracy_when_new", "class_confusion", "mistakes")
        return {key: [] for key in lists} | {"class_confusion_beyond": None, "calibration": None}
    when_new = [c for t, e in enumerate(record.by_task) for c in _new_of(record, t, e)]

    def by_class(values: Sequence[Any]) -> list[Any]:
        """In order of arrival -> by the data set's numbers; None for classes that are still to come."""
        numbered = dict(zip(order, values, strict=False))
        return [numbered.get(c) for c in range(len(order))]

    def shares(correct: Sequence[int | None]) -> list[float | None]:
        pairs = zip(correct, counts["images"], strict=False)
        return by_class([100.0 * right / n if n and right is not None else None for right, n in pairs])

    def original(c: int) -> int | None:
        return None if c < 0 else order[c]

    names = counts["names"] or [None] * len(counts["mistakes"])
    return {
        "class_images": by_class(counts["images"]),
        "class_accuracy": shares(counts["correct"]),
        "class_accuracy_when_new": shares(when_new),
        "class_confusion": [[original(a), original(b), n] for a, b, n in counts["pairs"]],
        "class_confusion_beyond": counts["pairs_beyond"],
        "mistakes": [
            {"row": row, "image": name, "true": original(a), "predicted": original(b), "margin": margin}
            for (row, a, b, margin), name in zip(counts["mistakes"], names, strict=True)
        ],
        "calibration": calibration.in_percent(counts["bins"]),
    }


def _new_of(record: Any, t: int, entry: dict[str, Any] | None) -> list[int | None]:
    """Right test images of each class of task t right after it."""
    return [None] * len(record.task_classes[t]) if entry is None else entry["new_correct"]


def _of_cost(record: Any) -> dict[str, Any]:
    spent = {key: _known(record, f"{key}_seconds") for key in ("cpu", "gpu")}
    hours = {key: None if None in values else sum(values) / 3600 for key, values in spent.items()}
    return {
        "operations": _known(record, "operations"),
        "cpu_seconds": spent["cpu"],
        "cpu_hours": hours["cpu"],
        "gpu_hours": hours["gpu"],
    }
