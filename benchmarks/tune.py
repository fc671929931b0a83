"""Chooses an experiment's settings without its test set: `python -m benchmarks.tune exps/sema_digits.json key=v1,v2 ...`

Runs the grid on the training images only, with a fifth of each class held out in place of the test images, and with seeds
(hence class orders) that the reported runs do not use. Prints a line for each grid point, best average accuracy first.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path

import numpy as np
import torch

import main as program
from backbone import weights
from commands import load
from utils import data
from utils.data.dataset import Dataset
from utils.data.images import ImageArray
from utils.evaluation.metrics import summarise
from utils.process.machine import flush_denormals
from utils.process.seeds import named_seed
from utils.run.log import RunLog


def without_test(dataset: Dataset, share: float = 0.2) -> Dataset:
    """The data set with its test images replaced by a seeded share of each class's training images."""
    rng = np.random.default_rng(named_seed("tune", dataset.name))
    labels = dataset.train.labels
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        held[rng.permutation(rows)[: round(share * len(rows))]] = True
    images = dataset.train.images  # type: ignore[attr-defined]  # embedded sets are arrays

    def part(mask: np.ndarray) -> ImageArray:
        return ImageArray(images[torch.from_numpy(mask)], labels[mask])

    return Dataset(dataset.name, dataset.class_names, part(~held), part(held), dataset.transforms)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("experiment", type=Path)
    ask.add_argument("grid", nargs="*", metavar="key=v1,v2")
    ask.add_argument("--seeds", type=int, nargs="+", default=[7])
    args = ask.parse_args()
    torch.set_num_threads(1)
    flush_denormals()
    keys = [text.partition("=")[0] for text in args.grid]
    lines = []
    for point in itertools.product(*(text.partition("=")[2].split(",") for text in args.grid)):
        overrides = [f"{k}={v}" for k, v in zip(keys, point, strict=True)]
        loaded = load.load(argparse.Namespace(config=args.experiment, set=overrides, data_root=None, device="cpu"))
        resolved = loaded.cells[0].resolved
        dataset = without_test(data.load(resolved.settings.dataset))
        results = []
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as folder, RunLog(Path(folder), console=False) as log:
                built = weights.build(resolved.settings)
                results.append(program.run_seed(resolved, seed, dataset, built, torch.device("cpu"), log))
        cells = [summarise(r[k] for r in results).mean for k in ("average_accuracy", "last_accuracy", "forgetting")]
        adapters = summarise(float(sum(r["adapters_per_layer"][-1].values())) for r in results).mean
        seconds = summarise(sum(sum(t.values()) for t in r["seconds"]) for r in results).mean
        average, last, forgetting = (f"{cell or 0:.1f}" for cell in cells)
        line = f"average {average}  last {last}  forgetting {forgetting}  adapters {adapters:.1f}  {seconds:.0f} s"
        lines.append((cells[0] or 0.0, f"{line}  {' '.join(overrides)}"))
        print(lines[-1][1], flush=True)
    print("\nbest average first", *(line for _, line in sorted(lines, reverse=True)), sep="\n")


if __name__ == "__main__":
    main()
