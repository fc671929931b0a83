"""Is anything ever lost? `python -m benchmarks.crash` kills runs of every method (SIGKILL) and runs them again until they end.

Each kill comes at a random moment: in training, scans, growth, selection, merging, evaluation, the report; every third kill
comes in the middle of writing a file, which is then cut off. The finished run is compared with one that was never killed:
weights after the last task, results.json and every row of metrics.jsonl must be equal bit for bit, except times and memory.
Prints Markdown (benchmarks/crash.md); exit code 1 if anything differs. Needs os.fork.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process with threads cannot be forked safely

import numpy as np
import torch
from PIL import Image

import main as program
import models
from utils.files import storage
from utils.report import page

SETTINGS: dict[str, Any] = {
    "about": "killed again and again", "dataset": "folder", "init_cls": 2, "increment": 2, "seed": [1], "image_size": 16,
    "backbone_weights": "random", "batch_size": 8, "epochs": 3, "func_epoch": 2, "rd_epoch": 2, "init_lr": 0.05, "rd_lr": 0.01,
    "ffn_num": 4, "rd_dim": 4, "exp_threshold": 0.5, "num_experts": 3, "expert_hidden": 2, "ffn_adapter_dropout": 0.1,
    "novelty_threshold_mode": "fixed", "novelty_threshold": 2.0, "expert_rank_max": 8, "plateau_epochs": 1,
    "plateau_tolerance": 0.9, "replay_per_class": 1, "distill_coef": 1.0, "head_recalibration": True, "moe_val_ratio": 0.2,
    "router_noisy": True, "nested_lora_update_interval_slow": 2, "nested_lora_skipped_gradients": "accumulate",
    "tuned_epoch": 2, "init_epochs": 2, "M": 20, "prompt_param": [10, 4, 0.5], "ca_epochs": 2, "ca_samples": 8,
}  # fmt: skip
# SEMA as shipped has no slow and fast adapters, and refuses their keys
REFUSED = {"sema": ("nested_lora_", "head_recalibration")}
TIMES = (
    "time", "seconds", "images_per_second", "peak_memory_bytes", "peak_memory_by_task", "cpu_seconds", "cpu_hours",
    "gpu_hours", "digest",
)  # fmt: skip


def make_images(folder: Path, classes: int = 6, train: int = 20, test: int = 4) -> None:
    """Class folders of small pictures: random colours for each class, and noise."""
    rng = np.random.default_rng(0)
    for c in range(classes):
        centre = rng.uniform(40, 215, (16, 16, 3))
        for part, count in (("train", train), ("test", test)):
            (folder / part / f"class {c}").mkdir(parents=True)
            for i in range(count):
                pixels = (centre + rng.normal(0, 25, centre.shape)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / f"class {c}" / f"{i}.png")


def child(arguments: list[str], dies_at: int | None) -> int:
    """Forks a process that runs main.py; returns its id. With `dies_at` it kills itself in the middle of the n-th file."""
    sys.stdout.flush()
    if number := os.fork():
        return number
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        if dies_at is not None:
            _die_while_writing(dies_at)
        os._exit(program.main(arguments))
    finally:
        os._exit(70)


def _die_while_writing(count: int) -> None:
    """Cuts the `count`-th file written from now on in half and kills this process."""
    write, left = os.replace, [count]

    def replace(source: Any, target: Any) -> None:
        left[0] -= 1
        if not left[0]:
            os.truncate(source, os.path.getsize(source) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        write(source, target)

    os.replace = replace  # type: ignore[assignment]


def place_of(folder: Path) -> str:
    """The stage at which a run was killed, from the file it wrote last."""
    if not folder.is_dir():
        return "before it began"
    heads = (
        sorted((folder / "checkpoints").rglob("*.json"), key=lambda p: p.stat().st_mtime_ns) if folder.is_dir() else []
    )
    if not heads:
        return "first phase"
    name = heads[-1].name
    if name.endswith(".learned.json"):
        return "evaluation"
    if name.startswith("task_"):
        return "start of a task or report"
    facts = storage.read_state(heads[-1])[0]
    kind = facts["phase"].rstrip("0123456789 ")
    return f"after {kind}" if facts["finished"] else f"in {kind}"


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in TIMES}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def content(folder: Path) -> tuple[Any, list[Any], dict[str, torch.Tensor]]:
    """Results, rows and weights of a finished run, without times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    heads = sorted((folder / "checkpoints").glob("task_?????.json"))
    weights = storage.read_state(heads[-1])[1]
    return timeless(json.loads((folder / "results.json").read_text())), timeless(rows), weights


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs."""
    (results, rows, weights), (results2, rows2, weights2) = content(one), content(other)
    same = weights.keys() == weights2.keys() and all(torch.equal(weights[k], weights2[k]) for k in weights)
    equal = {"results": results == results2, "rows": rows == rows2, "weights": same}
    return [name for name, same in equal.items() if not same]


def survive(
    method: str, place: Path, kills: int, workers: int, seed: int = 0
) -> tuple[collections.Counter[str], list[str]]:
    """Kills runs of a method at least `kills` times. Returns the number of kills by stage, and what differed or failed."""
    known = models.settings_of(method).model_fields
    values = {k: v for k, v in SETTINGS.items() if k in known} | {
        "model_name": method,
        "data_path": str(place / "images"),
    }
    values = {k: v for k, v in values.items() if not k.startswith(REFUSED.get(method, ()))}
    values |= {"num_workers": workers, "device": "cpu"}
    path = place / f"{method}_{workers}.json"
    path.write_text(json.dumps(values))
    rng = random.Random(f"{method} {workers} {seed}")

    def arguments(name: str) -> list[str]:
        return ["--config", str(path), "--out", str(place / name)]

    def folder(name: str) -> Path:
        return next(iter((place / name / path.stem).glob("*/seed_1")), place / "nowhere")

    started = time.monotonic()
    _, status = os.waitpid(child(arguments(f"whole {workers}"), None), 0)
    length, places, chain = time.monotonic() - started, collections.Counter[str](), 0
    faults: list[str] = []
    if status:
        return places, [f"the undisturbed run of {method} ended with {status}"]
    while sum(places.values()) < kills and not faults:
        name, chain, done = f"cut {workers} {chain}", chain + 1, False
        while not done:
            aimed = rng.random() < 1 / 3
            number = child(arguments(name), rng.randint(1, 9) if aimed else None)
            deadline = time.monotonic() + (60.0 if aimed else rng.uniform(0.05, max(length / 5, 0.5)))
            while not (ended := os.waitpid(number, os.WNOHANG))[0] and time.monotonic() < deadline:
                time.sleep(0.002)
            if not ended[0]:
                os.kill(number, signal.SIGKILL)
                ended = os.waitpid(number, 0)
            if os.WIFSIGNALED(ended[1]):
                places["while writing a file" if aimed else place_of(folder(name))] += 1
            elif os.WEXITSTATUS(ended[1]):
                faults.append(f"{method}: exit code {os.WEXITSTATUS(ended[1])} after {sum(places.values())} kills")
                break
            else:
                done = True
        if done:
            faults += [f"{method}: other {what}" for what in differences(folder(f"whole {workers}"), folder(name))]
    return places, faults


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--methods", nargs="+", choices=models.available(), default=models.available())
    ask.add_argument("--kills", type=int, default=20, help="least kills of each method and number of workers")
    ask.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="processes that decode images")
    ask.add_argument("--classes", type=int, default=6, help="number of classes, two in each task")
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument(
        "--no-report",
        action="store_true",
        help="write no report.html, which takes most of the time of such a small run",
    )
    args = ask.parse_args()
    torch.set_num_threads(1)
    if args.no_report:
        page.write_report = lambda *_, **__: None  # type: ignore[assignment]
    total = 0
    faults: list[str] = []
    print("| method | workers | kills | where | differences |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        make_images(Path(temporary) / "images", args.classes)
        for method in args.methods:
            for workers in args.workers:
                places, differing = survive(method, Path(temporary), args.kills, workers, args.seed)
                where = ", ".join(f"{what} {n}" for what, n in places.most_common())
                print(
                    f"| {method} | {workers} | {sum(places.values())} | {where} | {'; '.join(differing) or 'none'} |",
                    flush=True,
                )
                total, faults = total + sum(places.values()), faults + differing
    print(f"\n{total} kills, {len(faults)} differences")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
