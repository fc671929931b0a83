"""One task of a run: the learner learns it from its training data, then everything so far is scored."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from utils.config.split import Split
from utils.data.tasks import TaskStream
from utils.evaluation import head_drift, health, other_heads, routing_controls
from utils.evaluation import scores as evaluation
from utils.process import parallel, stopwatch
from utils.process.machine import cpu_seconds, peak_memory
from utils.process.seeds import seed_everything
from utils.run import measures, predictions
from utils.run import record as run_record
from utils.run.journal import Journal


def learn(learner: Any, stream: TaskStream, index: int, seed: int, journal: Journal) -> dict[str, Any]:
    """The learner learns task `index` (from 0) from its training data. Returns the measurements that the record needs beside
    the scores. Phases that `journal` has are not trained again."""
    seed_everything(seed, "task", index, *parallel.rank_seed())
    learner.begin_task()
    learner.journal = journal
    task = stream.task(index, with_past=learner.uses_past, with_test=learner.uses_test)
    learner.remember_features(task)
    learner.learn(task)
    with stopwatch.section("consolidation"):
        learner.consolidate(task)
    journal.finish()
    parallel.broadcast_rounding(learner.own_state() if parallel.world() > 1 else {}, f"after task {index + 1}")
    detect = learner.seconds.get("detect", 0.0)
    return {
        "seconds": {"train": journal.seconds - detect, "detect": detect},
        "trainable_parameters": sum(p.numel() for p in learner.trained.values()),
        "images": learner.images_shown,
        "selections": learner.selections(),
        "cpu_seconds": journal.cpu_seconds,
    }


def score(
    learner: Any, stream: TaskStream, index: int, record: run_record.RunRecord, measured: Mapping[str, Any]
) -> None:
    """Scores every task so far on its test data and adds the scores, with what `learn` measured, to the record."""
    with stopwatch.section("evaluation"):
        _score(learner, stream, index, record, measured)


def _score(
    learner: Any, stream: TaskStream, index: int, record: run_record.RunRecord, measured: Mapping[str, Any]
) -> None:
    seed_everything(record.seed, "score", index, *parallel.rank_seed())
    device, start, cpu_start = next(learner.parameters()).device, time.perf_counter(), cpu_seconds()
    renewed = head_drift.renewed_statistics(learner, stream, index)
    ready = time.perf_counter()
    gates = routing_controls.gates_of(learner, stream, index)
    images, others = predictions.collector(learner, stream, index), learner.compared_heads()
    measured_heads = head_drift.heads_of(learner, renewed) | others
    scores, by_head = evaluation.evaluate(learner, stream, index, device, measured_heads, gates, images)
    seconds = {**measured["seconds"], "evaluate": time.perf_counter() - ready}
    controls = routing_controls.log_routing(learner, stream, index, device, gates, scores, record.seed)
    by_image = measures.of_images(images, learner, stream, index)
    predictions.write_asked(images, learner, stream, index)
    record.add_task(
        scores,
        adapters_per_layer=dict(enumerate(learner.adapters_per_layer())),
        trainable_parameters=measured["trainable_parameters"],
        total_parameters=sum(p.numel() for p in learner.parameters()),
        seconds=seconds,
        images=measured["images"],
        selections=measured["selections"],
        test_evaluations=1 + learner.uses_test + controls,
        peak_memory_bytes=peak_memory(device),
        head_drift=head_drift.drift_of(learner, stream, index, renewed, scores, by_head, seconds=ready - start),
        by_image=by_image,
        by_task=measures.of_task(
            by_image,
            scores[-1].correct_oracle,
            new=stream.sizes[index],
            operations=learner.forward_operations(),
            cpu_seconds=measured.get("cpu_seconds", 0.0) + cpu_seconds() - cpu_start,
            gpu_seconds=sum(seconds.values()) if device.type == "cuda" else 0.0,
        ),
        other_heads=other_heads.tell(learner, index, scores, {name: by_head[name] for name in others}),
    )
    if not index:
        for text in learner.cfg.remarks_on(Split(stream.sizes, stream.train_images())):
            learner.log.row(
                "warning", task=index, about="settings", text=text
            )  # for the report; the log has them already
    health.tell(learner, stream.sizes, index)
    accuracy = [s.correct / s.samples if s.samples else None for s in scores]
    right, tested = sum(s.correct for s in scores), sum(s.samples for s in scores)
    learner.log.row(
        "task",
        task=index,
        tasks=len(stream),
        accuracy=accuracy,
        accuracy_seen=right / tested if tested else None,
        adapters=learner.adapters_per_layer(),
        seconds=seconds,
    )
