"""A run: all tasks of one seed, learned, scored and recorded one after another, from the first or the newest checkpoint on."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import models
from models.base import Learner, SeededInit
from utils import (
    checkpoint,
    data,
    evaluation,
    interrupt,
    page,
    parallel,
    profile,
    report,
    samples,
    storage,
    strict_json,
    tracker,
)
from utils.config import Resolved
from utils.journal import Journal
from utils.runlog import RunLog
from utils.runtime import environment, peak_memory, seed_everything
from utils.tasks import TaskStream

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from backbone.vit import SlottedViT
    from backbone.weights import BackboneFacts


def run_seed(
    resolved: Resolved,
    seed: int,
    dataset: data.Dataset,
    built: tuple[SlottedViT, BackboneFacts],
    device: torch.device,
    log: RunLog,
    profiled: bool = False,
) -> dict[str, Any]:
    """One run: all tasks of one seed, from its newest checkpoint if there is one. Writes and returns results.json.

    `built` is the backbone as `weights.build` gives it; the run fills its slots. `profiled`: measure where its time goes."""
    cfg, folder = resolved.settings, log.folder
    if cfg.batch_per_process:
        cfg = cfg.model_copy(update={"batch_size": cfg.batch_size * parallel.world()})
    backbone, facts = built
    stream = TaskStream.of(cfg, dataset, seed, facts.image_size, device)
    Method = models.learner_of(cfg.model_name)
    learner: Learner = Method(cfg, backbone.to(device), len(stream.order), SeededInit(seed), log)
    classes = [[stream.order[c] for c in span] for span in evaluation.spans(stream.sizes)]
    record = report.RunRecord(cfg.model_name, cfg.dataset, seed, stream.order, classes)
    settings = {**resolved.values, "seed": [seed]}
    machine = {**environment(device), "backbone": vars(facts)}
    if parallel.world() > 1:
        machine["processes"] = parallel.world()
    if parallel.is_first():
        tell_processes(folder, log, getattr(cfg, "batch_size", None))
        storage.write_json(folder / "config.json", settings)
        storage.write_json(folder / "environment.json", machine)
    planned = learner.planned_parameters()
    log.info(
        report.banner(
            method=f"{cfg.model_name}  {cfg.prefix}".rstrip(),
            data=f"{cfg.dataset}, {len(stream.order)} classes in {len(stream)} tasks of {'+'.join(map(str, stream.sizes))}",
            backbone=f"{cfg.backbone_type} ({facts.tag}, {facts.image_size} px)",
            weights=f"{facts.source}, hash {facts.weight_hash}",
            device=str(device),
            seeds=cfg.seed,
            trainable=planned[0][1] if planned else 0,
            total=sum(p.numel() for p in learner.parameters()),
            folder=folder,
        )
    )
    if (chosen := stream.measure_workers(cfg, learner.backbone, device)) is not None:
        log.info(chosen)
    start, measured, rows = 0, None, 0
    if (saved := checkpoint.resume(folder, learner, log, facts.weight_hash)) is not None:
        record, measured, rows = report.RunRecord.from_dict(saved.record), saved.measured, saved.rows
        start = len(record.correct)
    if parallel.is_first():
        log.mirror = tracker.of(cfg.tracker, folder, log.rows)
    measuring = profile.running(profiled and parallel.is_first(), lambda: learner.prefix_layer, device)
    with log.bar(len(stream), f"seed {seed}, tasks", level=0, done=start) as bar, interrupt.listening(), measuring:
        for index in range(start, len(stream)):
            journal = checkpoint.journal_of(folder, index, log, facts.weight_hash)
            whole = measured is None
            if measured is None:
                journal.open(rows)
                whole = not journal.begun
                if parallel.is_first():
                    samples.keep(folder, stream, index)
                measured = learn(learner, stream, index, seed, journal)
                parallel.align(learner.own_state() if parallel.world() > 1 else {}, f"after task {index + 1}")
                with profile.part("checkpoint"):
                    checkpoint.save(folder, index, learner, record.to_dict(), log, facts.weight_hash, measured)
            else:
                log.truncate_rows(min(rows, log.rows))
            with profile.part("evaluation"):
                score(learner, stream, index, record, measured)
            profile.tell(log, index, len(stream), whole)  # before the last checkpoint, which counts the rows
            with profile.part("checkpoint"):
                checkpoint.save(folder, index, learner, record.to_dict(), log, facts.weight_hash)
            measured, rows = None, log.rows
            log.info(report.task_table(record))
            bar.update(1)
            interrupt.check(together=True)
    if not parallel.is_first():
        return report.results_json(record)
    if profiled and (table := profile.of_run(page.load_rows(folder / "metrics.jsonl"), len(stream))):
        log.info(table)
    results = report.results_json(record)
    page.write_report(folder, results, settings, machine, defaults=cfg.defaults())
    for kept in folder.glob("cache*"):  # of the frozen prefix: nobody computes with this run again
        shutil.rmtree(kept, ignore_errors=True)
    storage.write_json(folder / "results.json", results)  # last: a folder with it is finished
    return results


def tell_processes(folder: Path, log: RunLog, batch: int | None) -> None:
    """What several processes do with the run's batches, and that a run goes on with another number of them."""
    now, before = parallel.world(), 1
    if (path := folder / "environment.json").is_file():
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            before = int(strict_json.read_json(path)[0].get("processes", 1))
        if before != now:
            log.warn(
                f"the run was begun with {before} process{'es' * (before > 1)} and goes on with {now}: parts of batches are "
                "others, so numbers may differ by rounding, and random draws in training by more"
            )
    if now > 1:
        log.info(f"{now} processes: each computes a part of every batch, a training step takes {batch} images in all")


def learn(learner: Learner, stream: TaskStream, index: int, seed: int, journal: Journal) -> dict[str, Any]:
    """One task: the learner sees its training data alone. Returns what the task's record needs beside its scores.

    Phases that `journal` has are not trained again."""
    seed_everything(seed, "task", index, *parallel.own_seed())
    learner.begin_task()
    learner.journal = journal
    task = stream.task(index, with_past=learner.uses_past, with_test=learner.uses_test)
    learner.learn(task)
    with profile.part("consolidation"):
        learner.consolidate(task)
    journal.finish()
    detect = learner.seconds.get("detect", 0.0)
    return {
        "seconds": {"train": journal.seconds - detect, "detect": detect},
        "trainable_parameters": sum(p.numel() for p in learner.trained.values()),
        "images": learner.views,
        "selections": learner.selections(),
    }


def score(
    learner: Learner, stream: TaskStream, index: int, record: report.RunRecord, measured: Mapping[str, Any]
) -> None:
    """Every task so far is scored once on its test data; the scores and what was `measured` in learning join the record."""
    seed_everything(record.seed, "score", index, *parallel.own_seed())
    device, start = next(learner.parameters()).device, time.perf_counter()
    renewed = evaluation.renewed_statistics(learner, stream, index)
    ready = time.perf_counter()
    gates = evaluation.gates_of(learner, stream, index)
    scores, by_renewed = evaluation.evaluate(learner, stream, index, device, renewed, gates)
    seconds = {**measured["seconds"], "evaluate": time.perf_counter() - ready}
    controls = evaluation.tell_routing(learner, stream, index, device, gates, scores, record.seed)
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
        head_drift=evaluation.drift_of(learner, stream, index, renewed, scores, by_renewed, seconds=ready - start),
    )
    accuracy = [s.correct / s.samples if s.samples else None for s in scores]
    learner.log.row("task", task=index, accuracy=accuracy, adapters=learner.adapters_per_layer(), seconds=seconds)
