"""What each head makes of the same features: a method is trained once a seed with its linear head, every variant scores.

    python -m benchmarks.heads icons nested_lora sema ranpac --seeds 1993 1994 --jobs 2 --out /tmp/heads

A variant is a set of keys of heads; its statistics are gathered with each task's features as a run with these keys would, and
its accuracy after the last task is what such a run reports. One JSON file a method, set and seed; finished ones are skipped.
Printed are means and deviations over seeds, and paired differences from one variant with 95 % intervals. `--held-out` adds
nothing to what is trained on, but gathers the statistics on four fifths of each task's images and scores the others in the
place of test images: for choices.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

from benchmarks.study import shipped
from utils.evaluation.metrics import paired_difference, summarise
from utils.text import printable

ALIGNED = {"head": "aligned", "head_align_lr": 0.1}
VARIANTS: dict[str, dict[str, Any]] = {
    "linear": {"head": "linear"},
    "ncm": {"head": "ncm"},
    "ridge": {"head": "ridge"},
    "ridge, 1,000 relu": {"head": "ridge", "head_projection_dim": 1000},
    "ridge, 1,000 Fourier": {"head": "ridge", "head_projection_dim": 1000, "head_lift": "fourier"},
    "ridge, 2,000 relu": {"head": "ridge", "head_projection_dim": 2000},
    "ridge, 2,000 Fourier": {"head": "ridge", "head_projection_dim": 2000, "head_lift": "fourier"},
    "lda": {"head": "lda"},
    "lda, 1,000 relu": {"head": "lda", "head_projection_dim": 1000},
    "lda, 1,000 Fourier (KLDA)": {"head": "lda", "head_projection_dim": 1000, "head_lift": "fourier"},
    "aligned": ALIGNED,
    "aligned, full": ALIGNED | {"head_align_covariance": "full"},
    "aligned, low rank 16": ALIGNED | {"head_align_covariance": "low_rank"},
    "aligned, diagonal": ALIGNED | {"head_align_covariance": "diagonal"},
    "aligned, rate 0.01": ALIGNED | {"head_align_lr": 0.01},
    "aligned, plain logits": ALIGNED | {"head_align_logit_norm": 0.0},
    "aligned, local term 0.1": ALIGNED | {"head_align_local": 0.1},
    "aligned, old means shrunk": ALIGNED | {"head_align_shrink": True},
    "ncm, linear repair": {"head": "ncm", "head_drift_repair": "linear"},
    "ridge, linear repair": {"head": "ridge", "head_drift_repair": "linear"},
    "lda, mean repair": {"head": "lda", "head_drift_repair": "mean"},
    "lda, linear repair": {"head": "lda", "head_drift_repair": "linear"},
    "aligned, linear repair": ALIGNED | {"head_drift_repair": "linear"},
}
# RanPAC's lift has its size in M
RANPAC = {
    "ridge": {"head": "ridge", "use_RP": False},
    "ridge, 1,000 relu": {"head": "ridge", "M": 1000},
    "ridge, 2,000 relu": {"head": "ridge", "M": 2000},
    "ncm": {"head": "ncm", "use_RP": False},
    "lda": {"head": "lda", "use_RP": False},
    "lda, 1,000 relu": {"head": "lda", "M": 1000},
}


def variants_of(model: str, settings: Any) -> dict[str, dict[str, Any]]:
    """The variants whose heads and repairs the method has."""
    if model == "ranpac":
        return RANPAC
    heads = get_args(settings.model_fields["head"].annotation)
    moving = settings.features_move
    return {
        name: keys
        for name, keys in VARIANTS.items()
        if keys["head"] in heads and (moving or "head_drift_repair" not in keys)
    }


def measure(values: dict[str, Any], seed: int, *, held_out: bool = False, only: Sequence[str] = ()) -> dict[str, Any]:
    """Trains the method of an experiment's values and scores every variant after the last task, or `only` these of them:
    {variant: accuracy as a fraction}."""
    import torch

    import models
    from backbone import catalogue, weights
    from utils.config import resolve
    from utils.data.tasks import TaskStream
    from utils.process.seeds import seed_everything
    from utils.run.log import RunLog

    torch.set_num_threads(1)
    settings = models.settings_of(values["model_name"])
    chosen = {k: v for k, v in variants_of(values["model_name"], settings).items() if not only or k in only}
    plain = {k: v for k, v in values.items() if k not in ("expected", "head", "head_projection_dim", "sweep")}
    plain |= {"seed": [seed], "head_drift": False}

    def resolved(keys: dict[str, Any]) -> Any:
        return resolve.resolve(
            plain | keys,
            source="variant",
            settings_of=models.settings_of,
            methods=models.available(),
            backbones=catalogue.names,
        ).settings

    first = resolved(next(iter(chosen.values())))
    from benchmarks.study import dataset

    backbone, facts = weights.build(first)
    stream = TaskStream.of(first, dataset(first.dataset), seed, facts.image_size)
    with tempfile.TemporaryDirectory() as folder, RunLog(Path(folder) / "run", console=False) as log:
        learner: Any = models.build(first, backbone, len(stream.order), seed, log)
        shadows: dict[str, Any] = {}
        for variant, keys in chosen.items():
            shadows[variant] = models.build(resolved(keys), weights.build(first)[0], len(stream.order), seed, log)
        for index in range(len(stream)):
            seed_everything(seed, "task", index)
            learner.begin_task()
            task, last = stream.task(index), index + 1 == len(stream)
            data = task.train.split(0.2, "study")[0] if held_out else task.train
            before = learner.features_of(data)[0]
            learner.learn(task)
            learner.consolidate(task)
            features, labels = learner.features_of(data)
            for shadow in shadows.values():
                shadow.head = learner.head if hasattr(learner, "head") else None
                shadow._before = before if shadow.cfg.head_drift_repair != "none" and index else None
                shadow.take_in(task, data, features, labels, solve=last)
        asked = [
            stream.task(i).train.split(0.2, "study")[1] if held_out else stream.test(i) for i in range(len(stream))
        ]
        x, y = (torch.cat(parts) for parts in zip(*map(learner.features_of, asked), strict=True))
        with torch.no_grad():
            scores = {k: (s.head if s.statistics is None else s.statistics)(x) for k, s in shadows.items()}
    return {variant: float((table.argmax(dim=1) == y).double().mean()) for variant, table in scores.items()}


def table(runs: dict[tuple[str, int], dict[str, float]], against: tuple[str, str]) -> str:
    """A Markdown table: each method and variant with mean ± deviation, and the paired difference from `against`."""
    by_arm: dict[tuple[str, str], dict[int, float | None]] = {}
    for (model, seed), accuracies in runs.items():
        for variant, accuracy in accuracies.items():
            by_arm.setdefault((model, variant), {})[seed] = 100 * accuracy
    lines = [f"| method | head | last | n | difference from {', '.join(against)} |", "|---|---|---:|---:|---:|"]
    for (model, variant), values in by_arm.items():
        mean, deviation, n = summarise(values.values())
        spread = "" if deviation is None else f" ± {deviation:.1f}"
        difference = paired_difference(values, by_arm.get(against, {}))
        text = "" if difference.mean is None else f"{difference.mean:+.1f}"
        if difference.low is not None:
            text += f" [{difference.low:+.1f}, {difference.high:+.1f}]"
        lines.append(f"| {model} | {variant} | {mean:.1f}{spread} | {n} | {text} |")
    return printable("\n".join(lines))


def stored(out: Path, model: str, name: str, seed: int, held_out: bool) -> Path:
    return out / f"{model}_{name}_{seed}{'_held_out' * held_out}.json"


def work(arguments: tuple[Path, str, str, int, bool, Sequence[str]]) -> None:
    out, model, name, seed, held_out, only = arguments
    path = stored(out, model, name, seed, held_out)
    if not path.exists():
        result = measure(shipped(model, name), seed, held_out=held_out, only=only)
        path.with_suffix(".part").write_text(json.dumps(result, indent=1))
        path.with_suffix(".part").rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="a set with exps/METHOD_SET.json")
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1993, 1994, 1995, 1996, 1997])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("logs/heads"))
    parser.add_argument("--heads", nargs="+", default=(), choices=VARIANTS, metavar="HEAD", help="these variants only")
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--against", nargs=2, default=("ranpac", "ridge, 1,000 relu"), metavar=("METHOD", "HEAD"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    asked = [(args.out, m, args.dataset, s, args.held_out, args.heads) for s in args.seeds for m in args.methods]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        list(pool.map(work, asked))
    paths = {(m, s): stored(args.out, m, args.dataset, s, args.held_out) for _, m, _, s, *_ in asked}
    print(table({key: json.loads(path.read_text()) for key, path in paths.items()}, tuple(args.against)))


if __name__ == "__main__":
    main()
