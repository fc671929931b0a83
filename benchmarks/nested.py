"""Do slow and fast adapters, merging and competition help? `python -m benchmarks.nested` runs all arms with every head.

Arms have equal trainable parameters where they can (rank 32 a layer in all). Each arm is trained once a seed; its linear head,
the nearest class mean and the ridge head are then scored on the same features, since the last two do not train. Every class's
statistics are gathered when its task ends and never again; after the last task they are compared with recomputed ones. Results
are kept one file a run, so the command can be stopped and started; `--kept` takes the runs behind nested.md from nested.jsonl.
Prints Markdown (benchmarks/nested.md).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from utils.metrics import paired_difference, summarise

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (1993, 1994, 1995, 1996, 1997)
SETS = ("digits", "glyphs", "fractals", "digits_random")
RANDOM = "_random"  # the same data over an untrained backbone, where adapters have more to win
HEADS = ("linear", "ncm", "ridge")
KEPT = Path(__file__).with_suffix(".jsonl")  # the runs behind nested.md, one a line

# What an arm changes against the shipped file of the data set named first.
CONCAT: dict[str, Any] = {"nested_lora_consolidation_method": "concat", "nested_lora_consolidation_alpha": 1.0}
CHAIN: dict[str, Any] = CONCAT | {"nested_lora_rank": 16}
FAITHFUL = {  # the original's choices, faults included
    "nested_lora_consolidation_alpha": 0.1,
    "nested_lora_reset": "zero",
    "decay_other_rows": True,
}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "sema": ("sema", {}),
    "nested in sema": ("sema", CONCAT | {"ffn_adapter_type": "nested_lora", "nested_lora_rank": 8}),
    "single LoRA": ("nested_lora", {"nested_lora_levels": 1, "nested_lora_rank": 32}),
    "chain, concat": ("nested_lora", CHAIN),
    "chain, svd": ("nested_lora", CHAIN | {"nested_lora_consolidation_method": "svd"}),
    "chain, ties, no relu": (
        "nested_lora",
        CHAIN | {"nested_lora_consolidation_method": "ties", "nested_lora_activation": "none"},
    ),
    "chain, ema 0.5": (
        "nested_lora",
        CHAIN | {"nested_lora_consolidation_method": "ema", "nested_lora_consolidation_alpha": 0.5},
    ),
    "chain, pam": ("nested_lora", CHAIN | {"nested_lora_consolidation_method": "pam"}),
    "chain, task arithmetic": ("nested_lora", CHAIN | {"nested_lora_consolidation_method": "task_arithmetic"}),
    "chain, pam_lite": ("nested_lora", CHAIN | {"nested_lora_consolidation_method": "pam_lite"}),
    "chain, task arithmetic, faithful": (
        "nested_lora",
        CHAIN | FAITHFUL | {"nested_lora_consolidation_method": "task_arithmetic"},
    ),
    "competition K=1": ("moe_parallel", CONCAT | {"num_experts": 1, "nested_lora_rank": 16}),
    "competition K=2": ("moe_parallel", CONCAT | {"num_experts": 2, "nested_lora_rank": 11}),
    "competition K=4": ("moe_parallel", CONCAT | {"num_experts": 4, "nested_lora_rank": 6}),
    "competition K=4, faithful": (
        "moe_parallel",
        FAITHFUL
        | {
            "num_experts": 4,
            "nested_lora_rank": 6,
            "nested_lora_consolidation_method": "pam_lite",
            "moe_loss": "mean",
            "selection_split": "test",
            "moe_reset": "winner",
            "moe_eval": "sum",
        },
    ),
}


def run_one(arm: str, name: str, seed: int, target: Path) -> None:
    """One arm, data set and seed: trains, scores every head after the last task, writes `target`."""
    import torch

    import models
    from backbone import catalogue, weights
    from models.base import SeededInit
    from utils import config, data
    from utils.runlog import RunLog
    from utils.runtime import seed_everything
    from utils.tasks import TaskStream

    torch.set_num_threads(1)
    model, overrides = ARMS[arm]
    stem = name.removesuffix(RANDOM)
    base = json.loads((ROOT / "exps" / f"{model}_{stem}.json").read_text())
    if model == "nested_lora" and overrides.get("nested_lora_levels") == 1:
        rate = base["nested_lora_lr_fast"]
        base = {k: v for k, v in base.items() if not k.startswith("nested_lora_")} | {"nested_lora_lr_slow": rate}
    if overrides.get("ffn_adapter_type") == "nested_lora":
        chain = json.loads((ROOT / "exps" / f"nested_lora_{stem}.json").read_text())
        base |= {k: v for k, v in chain.items() if k.startswith("nested_lora_") and k != "nested_lora_rank"}
    values = base | overrides | {"head": "ridge", "head_projection_dim": None, "head_drift": False, "seed": [seed]}
    if model == "sema":  # as many passes as the other arms
        values["func_epoch"] = json.loads((ROOT / "exps" / f"nested_lora_{stem}.json").read_text())["epochs"]
    if name.endswith(RANDOM):
        values |= {"backbone_weights": "random", "adapt_start_layer": 0}
    cfg = config.resolve(
        values, source=arm, settings_of=models.settings_of, methods=models.available(), backbones=catalogue.names
    ).settings
    with tempfile.TemporaryDirectory() as folder:
        backbone, facts = weights.build(cfg)
        stream = TaskStream(
            data.load(cfg.dataset),
            init_cls=cfg.init_cls,
            increment=cfg.increment,
            seed=seed,
            image_size=facts.image_size,
        )
        started = time.perf_counter()
        with RunLog(Path(folder) / "run", console=False) as log:
            learner = models.learner_of(cfg.model_name)(cfg, backbone, len(stream.order), SeededInit(seed), log)
            trained = []
            for index in range(len(stream)):
                seed_everything(seed, "task", index)
                learner.begin_task()
                task = stream.task(index, with_test=learner.uses_test)
                learner.learn(task)
                learner.consolidate(task)
                trained.append(sum(p.numel() for p in learner.trained.values()))
            last = last_accuracy(learner, stream)
            rows = [json.loads(line) for line in (log.folder / "metrics.jsonl").read_text().splitlines()]
            drift = recomputed(learner, stream)
    shares = [r["fast_share"] for r in rows if r["kind"] == "consolidation" and r["fast_share"] is not None]
    result = {
        "arm": arm,
        "set": name,
        "seed": seed,
        "last": last,
        "recomputed": drift,
        "trained": trained,
        "adapters": learner.adapters_per_layer(),
        "fast_share": sum(shares) / len(shares) if shares else None,
        "winners": [r["winner"] for r in rows if r["kind"] == "selection"],
        "margins": [r["margin"] for r in rows if r["kind"] == "selection"],
        "seconds": time.perf_counter() - started,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result))


def heads_of(learner: Any) -> dict[str, Any]:
    """Functions from features to scores: the trained head, and the nearest mean and ridge of the class statistics."""
    from backbone.heads import StatisticsHead

    ridge = learner.statistics
    ncm = StatisticsHead("ncm", ridge.sums.shape[1], ridge.sums.shape[0])
    ncm.counts.copy_(ridge.counts)
    ncm.sums.copy_(ridge.sums)
    ncm.solve()
    return {"linear": learner.head, "ncm": ncm, "ridge": ridge}


def last_accuracy(learner: Any, stream: Any) -> dict[str, float]:
    """Accuracy over all test images, as a fraction, of every head; one pass over the images."""
    import torch

    learner.eval()
    heads = heads_of(learner)
    right, count = dict.fromkeys(heads, 0), 0
    with torch.inference_mode():
        for index in range(len(stream)):
            for images, labels, *_ in stream.test(index).batches(256, augment=False, shuffle=False):
                features = learner.features(images)
                count += len(labels)
                for head, scores in heads.items():
                    right[head] += int((scores(features)[:, : learner.seen].argmax(1) == labels).sum())
    return {head: hits / count for head, hits in right.items()}


def recomputed(learner: Any, stream: Any) -> dict[str, float]:
    """Last accuracy of nearest mean and ridge with statistics of all training images recomputed on the final features."""
    learner.statistics.clear()
    for index in range(len(stream)):
        learner.statistics.add(*learner.features_of(stream.task(index).train))
    learner.statistics.solve()
    found = last_accuracy(learner, stream)
    return {head: found[head] for head in ("ncm", "ridge")}


def table(
    results: dict[tuple[str, str, int], dict[str, Any]], name: str, arms: Sequence[str], seeds: Sequence[int]
) -> str:
    """Last accuracies in percent, mean and standard deviation over seeds; then paired differences to sema and single LoRA."""
    by_arm = {arm: {s: results[name, arm, s] for s in seeds if (name, arm, s) in results} for arm in arms}
    by_arm = {arm: runs for arm, runs in by_arm.items() if runs}

    def cell(values: Iterable[float | None], digits: int = 1) -> str:
        summary = summarise(values)
        if summary.mean is None:
            return "-"
        return f"{summary.mean:.{digits}f}" + (f" ± {summary.std:.{digits}f}" if summary.std is not None else "")

    head = ["arm", "n", "trained", "linear", "ncm", "ncm recomputed", "ridge", "ridge recomputed"]
    head += ["fast share", "adapters"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for arm, found in by_arm.items():
        runs = list(found.values())
        row: list[Any] = [arm, len(runs), f"{max(max(r['trained']) for r in runs):,}"]
        row += [cell(100 * r["last"]["linear"] for r in runs)]
        for kind in ("ncm", "ridge"):
            row += [cell(100 * r["last"][kind] for r in runs), cell(100 * r["recomputed"][kind] for r in runs)]
        row += [
            cell((r["fast_share"] for r in runs), 2),
            cell(float(sum(r["adapters"])) for r in runs),
        ]
        lines.append(f"| {' | '.join(map(str, row))} |")
    references = [arm for arm in ("sema", "single LoRA") if arm in by_arm]
    head = ["difference in last accuracy", *(f"{h} - {arm}" for arm in references for h in HEADS)]
    lines += ["", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for arm in by_arm:
        row = [arm]
        for reference in references:
            for kind in HEADS:
                own, other = ({s: 100 * r["last"][kind] for s, r in by_arm[a].items()} for a in (arm, reference))
                d = paired_difference(own, other)
                text = "-" if d.mean is None else f"{d.mean:+.1f}"
                row.append(text if d.low is None or arm == reference else f"{text} [{d.low:+.1f}, {d.high:+.1f}]")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    ask.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    ask.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    ask.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    ask.add_argument("--out", type=Path, default=Path("logs/benchmarks/nested"))
    ask.add_argument("--kept", action="store_true", help="take the runs in benchmarks/nested.jsonl as done")
    ask.add_argument(
        "--one", nargs=4, help=argparse.SUPPRESS
    )  # arm, set, seed, target: one run in a process of its own
    args = ask.parse_args()
    if args.one:
        arm, name, seed, target = args.one
        run_one(arm, name, int(seed), Path(target))
        return

    kept = [json.loads(line) for line in KEPT.read_text().splitlines()] if args.kept else []
    known = {(r["arm"], r["set"], r["seed"]): r for r in kept}

    def job(arm: str, name: str, seed: int) -> dict[str, Any] | None:
        if (arm, name, seed) in known:
            return known[arm, name, seed]
        target = args.out / name / f"{arm.replace(' ', '_').replace(',', '').replace('=', '')}_{seed}.json"
        if not target.is_file():
            command = [sys.executable, "-m", "benchmarks.nested", "--one", arm, name, str(seed), str(target.resolve())]
            done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
            if done.returncode:
                print(f"{arm}, {name}, seed {seed}: exit {done.returncode}", file=sys.stderr)
                return None
        return json.loads(target.read_text())

    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {
            (name, arm, seed): pool.submit(job, arm, name, seed)
            for seed in args.seeds
            for name in args.sets
            for arm in args.arms
        }
    results = {key: r for key, future in jobs.items() if (r := future.result()) is not None}
    for name in args.sets:
        print(f"\n## {name}\n\n{table(results, name, args.arms, args.seeds)}")


if __name__ == "__main__":
    main()
