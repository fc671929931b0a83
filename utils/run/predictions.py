"""The predictions and scores of every test image in a file: the key `predictions`, or --evaluate RUN --out FILE.npz.

A file for numpy, `numpy.load(path, allow_pickle=False)`, from the pass that scores a task. Of n test images and the C classes
seen after the task, which count in order of arrival:

- `images` text [n]: the image's file below the set's folder, or `row 12` for images in memory; `rows` int64 [n] its row in the
  test set;
- `labels`, `predictions` int64 [n]: columns of `scores`; -1 where a score is not a number;
- `scores` float32 [n, C];
- `class_names` text [C], `classes` int64 [C] the data set's number of each column, `class_tasks` int64 [C] its task from 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.evaluation.by_image import ByImage
from utils.files.storage import write_file
from utils.process import parallel
from utils.run.measures import image_names
from utils.text import printable

if TYPE_CHECKING:
    from utils.data.tasks import TaskStream


def path_in(folder: Path, wanted: str | None, index: int, tasks: int) -> Path | None:
    """Where the predictions after task `index` (from 0) of `tasks` go: with `wanted` "last" those of the last task to
    predictions.npz, with "tasks" those of each to predictions/task_T.npz; else None."""
    if wanted == "tasks":
        return folder / "predictions" / f"task_{index + 1}.npz"
    return folder / "predictions.npz" if wanted == "last" and index + 1 == tasks else None


def _asked(learner: Any, stream: TaskStream, index: int) -> Path | None:
    wanted = getattr(learner.cfg, "predictions", None)
    return path_in(learner.log.folder, wanted, index, len(stream)) if wanted else None


def collector(learner: Any, stream: TaskStream, index: int) -> ByImage:
    """What collects the outcomes of a run's task `index`: with scores where the settings ask for its predictions."""
    return ByImage(store=_asked(learner, stream, index) is not None)


def write_asked(images: ByImage, learner: Any, stream: TaskStream, index: int) -> None:
    """Writes the file that the settings ask for after task `index`, if they do."""
    if (path := _asked(learner, stream, index)) is not None:
        write(path, images, stream)


def lacking(folder: Path, wanted: str | None, results: Mapping[str, Any]) -> str:
    """A remark on a finished run whose predictions are asked for and were not written; empty if there is nothing to say."""
    tasks = len(results["task_classes"])
    path = path_in(folder, wanted, tasks - 1, tasks)
    if path is None or path.is_file():
        return ""
    return f" (it wrote no predictions: --evaluate {folder} --out FILE.npz writes those of its last task)"


def write(path: Path, images: ByImage, stream: TaskStream) -> None:
    """Writes what `images` collected with `store` of tasks 0, 1, ... Raises OSError if the file cannot be written."""
    if not parallel.is_first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = content(images, stream)
    write_file(path, lambda file: _save(file, arrays))


def _save(file: Any, arrays: dict[str, Any]) -> None:
    import numpy as np

    np.savez(file, allow_pickle=False, **arrays)


def content(images: ByImage, stream: TaskStream) -> dict[str, Any]:
    """The arrays of the file."""
    import numpy as np

    tasks = images.tasks
    count = sum(stream.sizes[: len(tasks)])
    tests = [stream.test(k) for k in range(len(tasks))]
    rows = np.concatenate([test.rows for test in tests])
    names = image_names(tests[0].source.images)
    return {
        "images": np.array([names[row] if names else f"row {row}" for row in rows.tolist()], dtype=np.str_),
        "rows": rows,
        "labels": np.concatenate([task.labels for task in tasks]),
        "predictions": np.concatenate([task.predicted for task in tasks]),
        "scores": np.concatenate([task.scores for task in tasks if task.scores is not None]),
        "class_names": np.array([printable(name) for name in stream.class_names[:count]], dtype=np.str_),
        "classes": np.array(stream.order[:count], dtype=np.int64),
        "class_tasks": np.repeat(np.arange(len(tasks)), stream.sizes[: len(tasks)]),
    }
