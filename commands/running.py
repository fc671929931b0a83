"""A run: all tasks of one seed, learned, scored and recorded one after another, from the first or the newest checkpoint on."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import models
from models.learner.base import Learner, SeededInit
from utils.config.resolve import Resolved
from utils.data.dataset import Dataset
from utils.data.tasks import TaskStream
from utils.evaluation import scores as evaluation
from utils.files import storage
from utils.process import interrupt, parallel, stopwatch
from utils.process.machine import environment
from utils.report import console, page
from utils.report import profile as report_profile
from utils.report import results as report_results
from utils.run import checkpoint, sample_images, tracker
from utils.run import record as run_record
from utils.run import task as run_task
from utils.run.folder import tell_processes
from utils.run.log import RunLog

if TYPE_CHECKING:
    import torch

    from backbone.vit import SlottedViT
    from backbone.weights import BackboneFacts


def run_seed(
    resolved: Resolved,
    seed: int,
    dataset: Dataset,
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
    record = run_record.RunRecord(cfg.model_name, cfg.dataset, seed, stream.order, classes)
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
        console.banner(
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
        record, measured, rows = run_record.RunRecord.from_dict(saved.record), saved.measured, saved.rows
        start = len(record.correct)
    if parallel.is_first():
        log.mirror = tracker.of(cfg.tracker, folder, log.rows)
    measuring = stopwatch.running(profiled and parallel.is_first(), lambda: learner.prefix_layer, device)
    with log.bar(len(stream), f"seed {seed}, tasks", level=0, done=start) as bar, interrupt.handling(), measuring:
        for index in range(start, len(stream)):
            journal = checkpoint.journal_of(folder, index, log, facts.weight_hash)
            whole = measured is None
            if measured is None:
                journal.open(rows)
                whole = not journal.begun
                if parallel.is_first():
                    sample_images.keep(folder, stream, index)
                measured = run_task.learn(learner, stream, index, seed, journal)
                parallel.broadcast_rounding(
                    learner.own_state() if parallel.world() > 1 else {}, f"after task {index + 1}"
                )
                with stopwatch.section("checkpoint"):
                    checkpoint.save(folder, index, learner, record.to_dict(), log, facts.weight_hash, measured)
            else:
                log.truncate_rows(min(rows, log.rows))
            with stopwatch.section("evaluation"):
                run_task.score(learner, stream, index, record, measured)
            report_profile.tell(log, index, len(stream), whole)  # before the last checkpoint, which counts the rows
            with stopwatch.section("checkpoint"):
                checkpoint.save(folder, index, learner, record.to_dict(), log, facts.weight_hash)
            measured, rows = None, log.rows
            log.info(console.task_table(record))
            bar.update(1)
            interrupt.raise_if_requested(together=True)
    if not parallel.is_first():
        return run_record.results_json(record)
    if profiled and (table := report_profile.of_run(report_results.load_rows(folder / "metrics.jsonl"), len(stream))):
        log.info(table)
    results = run_record.results_json(record)
    page.write_report(folder, results, settings, machine, defaults=cfg.defaults())
    for kept in folder.glob("cache*"):  # of the frozen prefix: nobody computes with this run again
        shutil.rmtree(kept, ignore_errors=True)
    storage.write_json(folder / "results.json", results)  # last: a folder with it is finished
    return results
