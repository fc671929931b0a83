"""SEMA against the authors' code: every loss, feature, logit, weight, record and expansion."""

import json
from pathlib import Path

import numpy as np
import torch

from tests.helpers.recorded import TOLERANCE, Recorded, close, learn_all, logits_of


def check(run: Recorded, tmp_path: Path, monkeypatch) -> None:
    c = run.config
    keys = (
        "ffn_num",
        "rd_dim",
        "buffer_size",
        "adapt_start_layer",
        "adapt_end_layer",
        "batch_size",
        "detect_batch_size",
    )
    keys += ("weight_decay", "init_lr", "rd_lr", "func_epoch", "rd_epoch", "exp_threshold")
    settings = {k: c[k] for k in keys} | {"optimizer": run.facts["optimizer"]}
    phases: list[list[float]] = []
    for task, learner in learn_all(run, "sema", settings, tmp_path, monkeypatch, phases):
        logits = logits_of(learner, run)
        assert logits.shape[1] == task.total
        close(
            learner.backbone(torch.from_numpy(run.arrays["test_images"])),
            run.arrays[f"task{task.index}/test_features"],
            "features",
        )
        close(logits, run.arrays[f"task{task.index}/test_logits"][:, : task.total], f"logits after task {task.index}")
        recorded = run.facts["tasks"][task.index]
        assert learner.adapters_per_layer() == recorded["adapters"]
        run.check_accuracies(logits, task.first, task.index)
    assert len(phases) == len(run.facts["phases"])
    for ours_losses, theirs in zip(phases, run.facts["phases"], strict=True):
        assert np.abs(np.array(ours_losses) - theirs["losses"]).max() <= TOLERANCE, (theirs["task"], theirs["phase"])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    grown = [(r["layer"], r["adapter"]) for r in rows if r["kind"] == "expand"]
    assert grown == [(e["layer"], e["adapter"]) for e in run.facts["expansions"]]
    close(learner.head.weight, run.arrays["final/fc.weight"], "head")
    close(learner.head.bias, run.arrays["final/fc.bias"], "head bias")
    for layer in range(c["depth"]):
        slot = learner._layer(layer)
        at = f"final/backbone.blocks.{layer}.adapter_module"
        for k, adapter in enumerate(slot.adapters):
            for name, tensor in adapter.named_parameters():
                close(tensor, run.arrays[f"{at}.adapters.{k}.functional.{name}"], f"layer {layer} adapter {k} {name}")
        for k, descriptor in enumerate(slot.descriptors):
            for name, tensor in descriptor.named_parameters():
                close(tensor, run.arrays[f"{at}.adapters.{k}.rd.{name}"], f"layer {layer} descriptor {k} {name}")
            record = run.arrays[f"final_record/layers.{layer}.adapters.{k}"]
            assert int(descriptor.count) == len(record)
            close(descriptor.record[: len(record)], record, f"layer {layer} record {k}")
        if len(slot.router):
            close(
                torch.cat([c.weight for c in slot.router.columns]),
                run.arrays[f"{at}.router.weight"],
                f"layer {layer} router",
            )
            close(
                torch.cat([c.bias for c in slot.router.columns]),
                run.arrays[f"{at}.router.bias"],
                f"layer {layer} router bias",
            )
