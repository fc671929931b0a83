"""The state of a run: its record, the task in progress with its journal, and its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from utils.data.tasks import TaskStream
from utils.evaluation.scores import spans
from utils.process import interrupt, parallel, stopwatch
from utils.run import checkpoint, mistake_images, sample_images, tracker
from utils.run.journal import Journal
from utils.run.log import RunLog
from utils.run.mirror import About
from utils.run.progress import Bar
from utils.run.provenance import REMEDY, Origin
from utils.run.record import RunRecord, results_json
from utils.text import printable


class RunState:
    """The state of a run (one seed). `learner` is any object with the methods of `checkpoint.Restorable`.

    `origin`: what its numbers depend on. `record`: counts of the tasks that are scored. `learned`: the result of `task.learn`
    for a task that is learned and still to be scored, else empty. `journal`: the training phases of the task in progress.
    `whole`: whether this process has computed the task in progress from its start.
    """

    def __init__(self, log: RunLog, cfg: Any, stream: TaskStream, learner: Any, seed: int, origin: Origin):
        self.log, self.cfg, self.stream, self.learner, self.seed = log, cfg, stream, learner, seed
        self.origin = origin
        classes = [[stream.order[c] for c in span] for span in spans(stream.sizes)]
        self.record = RunRecord(cfg.model_name, cfg.dataset, seed, stream.order, classes)
        self.learned: dict[str, Any] = {}
        self.journal = Journal()
        self.whole = True
        self._rows = 0  # of metrics.jsonl that belong to the tasks in the newest checkpoint

    def resume(self) -> None:
        """Continues from the newest undamaged checkpoint, if there is one. Raises ValueError if it does not fit this run."""
        saved = checkpoint.resume(self.log.folder, self.learner, self.log, self.origin.identity)
        if saved is not None:
            if saved.record["class_order"] != self.record.class_order:
                raise ValueError(f"{self.log.folder}: the classes came in another order when this run began; {REMEDY}")
            self.record = RunRecord.from_dict(saved.record)
            self.learned, self._rows = saved.measured or {}, saved.rows
        if parallel.is_first() and self.cfg.tracker is not None:
            self.log.mirror = tracker.of(self.cfg.tracker, self._about(), self.log.rows, self.log.warn)

    def _about(self) -> About:
        """What a tracker shows of this run beside its rows."""
        cfg = self.cfg
        settings = cfg.model_dump(mode="json", exclude={"about", "expected"}) | {"seed": self.seed}
        tags = {"method": cfg.model_name, "dataset": cfg.dataset, "backbone": cfg.backbone_type, "seed": str(self.seed)}
        return About(self.log.folder, settings, tags)

    @contextmanager
    def in_progress(self, profiled: bool, device: torch.device) -> Iterator[Bar]:
        """Inside the block a signal stops the run between two steps, and time is measured if `profiled`. Yields the bar."""
        measuring = stopwatch.running(profiled and parallel.is_first(), lambda: self.learner.prefix_layer, device)
        done = len(self.record.correct)
        bar = self.log.bar(len(self.stream), f"seed {self.seed}, tasks", level=0, done=done)
        with bar, interrupt.handling(), measuring:
            yield bar

    def tasks_left(self) -> Iterator[int]:
        """The tasks that are not scored yet; the first of them may be learned already."""
        for index in range(len(self.record.correct), len(self.stream)):
            self.whole = not self.learned
            if self.learned:
                self.log.truncate_rows(min(self._rows, self.log.rows))
            yield index

    def begin(self, index: int) -> None:
        """Opens the journal of task `index`; an earlier process may have trained some of its phases."""
        self.journal = checkpoint.journal_of(self.log.folder, index, self.log, self.origin.identity, self.origin.save)
        self.journal.open(self._rows)
        self.whole = not self.journal.begun
        if parallel.is_first():
            sample_images.write(self.log.folder, self.stream, index)

    def save(self, index: int, learned: dict[str, Any] | None = None) -> None:
        """Writes a checkpoint: with `learned` of a task that is still to be scored, without it of one that is scored."""
        self.learned = learned or {}
        with stopwatch.section("checkpoint"):
            self.log.check_folder()
            self.origin.save()
            record = self.record.to_dict()
            if learned is None and index + 1 == len(self.stream) and parallel.is_first():
                mistake_images.write(self.log.folder, self.stream, (record["by_image"] or {}).get("mistakes", []))
            checkpoint.save(self.log.folder, index, self.learner, record, self.log, self.origin.identity, learned)
        if learned is None:
            self._rows = self.log.rows

    def results(self) -> dict[str, Any]:
        """The content of results.json."""
        names = [printable(name) for name in self.stream.original_names()]
        left_out = {"images_left_out": self.stream.left_out} if self.stream.left_out else {}
        return results_json(self.record, names) | left_out | {"provenance": self.origin.of_results()}
