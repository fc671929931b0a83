"""Whether memory and time grow with the number of tasks: `python -m benchmarks.growth --out DIR`.

Runs every method of models/, and arms that switch off or force growth by a setting, through `main.main` on generated class
folders: 51 tasks of 2 classes with equal data, each method in a separate process with one thread. The last task only marks
the end of the one before it. Times are processor times of this process, so that other work on the machine matters less.
What is measured:
- step: the median time from one optimizer step to the next within a task;
- learn: from the call of `learn` to the end of `consolidate`; whole: from one call of `learn` to the next, with evaluation
  of all classes seen (which are more with every task), checkpoint and tables. "5" and "50" are medians of five tasks each,
  around the fifth and up to the fiftieth, since one task of 0.2 s is mostly noise;
- memory after each task, as the slope of a least-squares line from the tenth task on, in KiB a task: the resident set; and,
  exactly, all live tensors with their gradients, and the model's parameters and buffers.
A method may grow where its model does: the columns `adapters` and `model` show that. Prints Markdown (benchmarks/growth.md).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

REQUIRED, EARLY = 1.2, 5  # time of the last task over that of this one may be at most this (issue 6)
SETTLED = 10  # tasks before the line for memory begins: caches and allocator have settled by then
WINDOW = 5
EXEMPT = {"joint"}  # retrains on all data so far: run with --only joint alone
KIB = 1024

# Arms besides each method at its defaults: growth is switched off, or forced in every task.
ARMS: dict[str, dict[str, Any]] = {
    "finetune, ncm": {"model_name": "finetune", "head": "ncm"},
    "finetune, ncm without head_drift": {"model_name": "finetune", "head": "ncm", "head_drift": False},
    "simplecil, ridge": {"model_name": "simplecil", "head": "ridge"},
    "nested_lora, svd": {"model_name": "nested_lora", "nested_lora_consolidation_method": "svd"},
    "moe_parallel, svd": {"model_name": "moe_parallel", "nested_lora_consolidation_method": "svd"},
    "sema, no expansion": {"model_name": "sema", "exp_threshold": 1e6},
    "sema, expands": {"model_name": "sema", "exp_threshold": 0.8},
    "dylora_moe, no spawn": {
        "model_name": "dylora_moe", "novelty_threshold_mode": "fixed", "novelty_threshold": -2.0,
        "freeze_on_convergence": False,
    },
    "dylora_moe, spawns": {"model_name": "dylora_moe", "novelty_threshold_mode": "fixed", "novelty_threshold": 2.0},
}  # fmt: skip


def arms() -> dict[str, dict[str, Any]]:
    import models

    return dict(sorted(({name: {"model_name": name} for name in models.available()} | ARMS).items()))


# One run ---------------------------------------------------------------------------------------------------------------


def make_folder(place: Path, classes: int, images: int, tests: int, size: int) -> Path:
    """Class folders of generated images, a mean pattern of each class plus noise."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for label in range(classes):
        centre = rng.uniform(40, 215, (4, 4, 3)).repeat(size // 4, axis=0).repeat(size // 4, axis=1)
        for part, count in (("train", images), ("test", tests)):
            folder = place / part / f"class_{label:04d}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = (centre + rng.normal(0, 25, centre.shape)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return place


def measured(values: dict[str, Any], out: Path) -> dict[str, Any]:
    """Runs the settings in this process and returns times by task, memory by task and the model's growth."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    import main
    import models

    method: Any = models.learner_of(values["model_name"])
    begun: list[float] = []
    learned: list[float] = []
    ended: list[float] = []
    steps: list[list[float]] = []
    memory: list[dict[str, int]] = []
    learn, consolidate = method.learn, method.consolidate

    def begin(learner: Any, task: Any) -> None:
        if begun:
            ended.append(time.process_time())
            memory.append(memory_of(learner))
        begun.append(time.process_time())
        steps.append([])
        learn(learner, task)

    def end(learner: Any, task: Any) -> None:
        consolidate(learner, task)
        learned.append(time.process_time())

    out.mkdir(parents=True)
    config = out / "growth.json"
    config.write_text(json.dumps(values))
    hook = register_optimizer_step_post_hook(lambda *_: steps[-1].append(time.process_time()))
    with mock.patch.object(method, "learn", begin), mock.patch.object(method, "consolidate", end):
        code = main.main(["--config", str(config), "--out", str(out / "out"), "--device", "cpu"])
    hook.remove()
    if code:
        raise SystemExit(code)
    (path,) = out.glob("out/growth/*/seed_*/results.json")
    results = json.loads(path.read_text())
    return {
        "learn": [b - a for a, b in zip(begun, learned, strict=True)][: len(ended)],
        "whole": [b - a for a, b in zip(begun, ended, strict=False)],
        "step": [statistics.median(pauses(times)) if len(times) > 1 else None for times in steps][: len(ended)],
        "memory": memory,
        "adapters": [sum(layers.values()) for layers in results["adapters_per_layer"]],
    }


def pauses(times: Sequence[float]) -> list[float]:
    return [b - a for a, b in pairwise(times)]


def memory_of(learner: Any) -> dict[str, int]:
    """Bytes of the resident set, of the storages of all live tensors and their gradients, and of the model's state."""
    import torch

    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    alive: dict[int, int] = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor) and not item.is_meta:  # isinstance would load lazy objects
            for tensor in (item, item.grad if item.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    alive[storage.data_ptr()] = storage.nbytes()
    model = sum(t.numel() * t.element_size() for t in learner.state_dict().values())
    return {"resident": resident, "tensors": sum(alive.values()), "model": model}


# The table -------------------------------------------------------------------------------------------------------------


def slope(values: Sequence[float]) -> float:
    """Slope of the least-squares line through the values, per task."""
    import numpy as np

    return float(np.polyfit(np.arange(len(values)), np.asarray(values, dtype=float), 1)[0])


def window(values: Sequence[float | None], end: int) -> float | None:
    """Median of the WINDOW tasks that end with task `end` (from 1)."""
    known = [v for v in values[max(0, end - WINDOW) : end] if v is not None]
    return statistics.median(known) if known else None


def line(name: str, measured: dict[str, Any]) -> str:
    """A row of the table: a method's name and its numbers."""
    last = len(measured["whole"])
    cells = [name, f"{measured['adapters'][EARLY - 1]} to {measured['adapters'][last - 1]}"]
    for key in ("model", "tensors", "resident"):
        per_task = slope([m[key] for m in measured["memory"][SETTLED:]]) / KIB
        cells.append(f"{round(per_task, 1) + 0.0:+.1f}")  # never -0.0
    for key in ("step", "learn", "whole"):
        early, late = window(measured[key], EARLY + WINDOW // 2), window(measured[key], last)
        if early is None or late is None:
            cells += ["-", "-"]
        else:
            cells += [f"{1000 * early:.1f} to {1000 * late:.1f}", f"{late / early:.2f}"]
    cells.insert(-2, f"{trend(measured['learn'], last):.2f}")
    return f"| {' | '.join(cells)} |"


def trend(values: Sequence[float], last: int) -> float:
    """Value at task `last` over that at task EARLY, on a line through the medians (Theil-Sen estimator) of all tasks from EARLY
    on: a minute of noise at either end matters less than in a ratio of two windows."""
    tasks = range(EARLY - 1, last)
    rise = statistics.median((values[b] - values[a]) / (b - a) for a in tasks for b in tasks if b > a)
    start = statistics.median(values[t] - rise * (t - tasks[0]) for t in tasks)
    return (start + rise * (tasks[-1] - tasks[0])) / start


def table(methods: dict[str, dict[str, Any]], last: int) -> str:
    head = ["method", f"adapters after task {EARLY} to {last}", "model, KiB a task", "tensors, KiB a task"]
    head += ["resident, KiB a task", "step, ms", "ratio", "learn, ms", "ratio", "by trend", "whole, ms", "ratio"]
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(line(*item) for item in methods.items())])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for images, runs and numbers; must not exist")
    parser.add_argument("--tasks", type=int, default=50)
    parser.add_argument("--classes", type=int, default=2, help="classes of each task")
    parser.add_argument("--images", type=int, default=8, help="training images of a class")
    parser.add_argument("--tests", type=int, default=2, help="test images of a class")
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rank", type=int, default=4, help="rank of adapters")
    parser.add_argument("--only", nargs="*", help="names of arms; default: all but joint")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # an arm, in this process
    return parser.parse_args()


def settings_for(arm: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """All settings of the arm, without keys that its method does not have."""
    import models
    from models.settings.nested import SharedAdapterSettings

    common: dict[str, Any] = {
        "dataset": "folder", "data_path": str(args.out / "images"), "init_cls": args.classes, "increment": args.classes,
        "seed": [1], "num_workers": 0, "backbone_type": "embedded", "batch_size": args.batch, "init_lr": 0.005,
        "rd_lr": 0.01, "epochs": args.epochs, "func_epoch": args.epochs, "rd_epoch": args.epochs, "ffn_num": args.rank,
        "nested_lora_rank": args.rank, "expert_hidden": args.rank, "rd_dim": 8, "buffer_size": 64, "detect_batch_size": 16,
        "adapt_start_layer": 3, "adapt_end_layer": 5,
    }  # fmt: skip
    schema = models.settings_of(arm["model_name"])
    if not issubclass(schema, SharedAdapterSettings):  # SEMA has the key too, and refuses it beside plain adapters
        del common["nested_lora_rank"]
    return {key: value for key, value in common.items() if key in schema.model_fields} | arm


def run_all() -> int:
    args = parse()
    args.out = args.out.absolute()
    if args.one:
        numbers = measured(settings_for(arms()[args.one], args), args.out / args.one)
        (args.out / f"{args.one}.json").write_text(json.dumps(numbers))
        return 0
    args.out.mkdir(parents=True)
    make_folder(args.out / "images", args.classes * (args.tasks + 1), args.images, args.tests, args.size)
    methods = {}
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    for name in args.only or (arm for arm in arms() if arm not in EXEMPT):
        command = [sys.executable, "-m", "benchmarks.growth", *sys.argv[1:], "--one", name]
        done = subprocess.run(command, env=quiet, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr[-2000:], file=sys.stderr)
            return 1
        methods[name] = json.loads((args.out / f"{name}.json").read_text())
        print(f"{name}: {sum(methods[name]['whole']):.0f} s", file=sys.stderr, flush=True)
    print(table(methods, args.tasks))
    return 0


if __name__ == "__main__":
    sys.exit(run_all())
