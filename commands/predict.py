"""`--predict RUN PATH...`: the classes of images by the model of a run or of an export, as CSV.

RUN is a run's folder, one with a single finished run below it, or what --export wrote; the run's data are not needed. Images
are read as the test images of the run were, all of them before the first is predicted, so that broken ones are named at once.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from commands import export, saved
from utils.data import new_images, workers
from utils.data.names import readable
from utils.files import storage
from utils.process.machine import check_torchvision, flush_denormals, pick_device
from utils.run import progress
from utils.text import counted, csv_cell, one_line, printable

FEW = 2  # batches up to which no loader processes are measured: starting them takes longer


def run(args: argparse.Namespace) -> int:
    check_torchvision()
    flush_denormals()
    folder, *paths = args.predict
    if args.out is not None and args.out.is_dir():
        raise ValueError(f"--out {args.out} is a folder: name the CSV file to write")
    device = pick_device(args.device or "auto")
    model = load(folder, device)
    if args.top_k > len(model.classes):
        raise ValueError(f"--top-k {args.top_k}: the model knows {counted(len(model.classes), 'class', 'classes')}")
    with progress.of_images() as bar:
        images = new_images.find(paths, model.recipe.grey_bits, model.learner.cfg.skip_broken, bar)
    for line in (*model.notes, *images.notes):
        print(one_line(f"warning: {line}"), file=sys.stderr)
    text = as_csv(images.files, model.classes, scores_of(model, images.files, device), args.top_k)
    if args.out is None:
        print(text, end="")
    else:
        storage.write_bytes(args.out, text.encode())
        print(printable(f"{args.out}: {counted(len(images.files), 'image')}"))
    return 0


def load(folder: Path, device: torch.device | None = None) -> saved.SavedModel:
    """The model of a run or of an export."""
    return export.load_model(folder, device) if export.is_one(folder) else saved.load_model(folder, device)


def scores_of(model: saved.SavedModel, files: list[str], device: torch.device) -> torch.Tensor:
    """Scores [n, classes] of the images, on the CPU."""
    cfg, size = model.learner.cfg, model.learner.eval_batch_size
    images = new_images.as_data(files, model.recipe, 0, device)
    count = 0 if cfg.num_workers == "auto" else cfg.num_workers
    if cfg.num_workers == "auto" and len(files) > FEW * size:
        count = workers.measured_workers(images, size, model.learner.logits, device)[0]
    images = new_images.as_data(files, model.recipe, count, device)
    rows = []
    with torch.inference_mode(), progress.of_images(what="images predicted") as bar:
        for batch, _, _ in images.batches(size, augment=False, shuffle=False):
            rows.append(model.learner.logits(batch.to(device)).float().cpu())
            bar(sum(map(len, rows)), len(files))
    return torch.cat(rows)


def as_csv(files: list[str], classes: list[str], scores: torch.Tensor, most: int) -> str:
    """A header and a line an image: its path, then names and scores of its `most` best classes. What a spreadsheet would take
    for a formula begins with an apostrophe."""
    text = io.StringIO()
    write = csv.writer(text, lineterminator="\n")
    write.writerow(["path", *(f"{what}_{k + 1}" for k in range(most) for what in ("class", "score"))])
    write.writerows(_rows(files, classes, scores, most))
    return text.getvalue()


def _rows(files: list[str], classes: list[str], scores: torch.Tensor, most: int) -> Iterator[list[str]]:
    values, best = scores.topk(most, dim=1)
    for file, of_image, numbers in zip(files, values.tolist(), best.tolist(), strict=True):
        pairs = ((csv_cell(one_line(classes[k])), f"{value:.6g}") for k, value in zip(numbers, of_image, strict=True))
        yield [csv_cell(one_line(readable(file))), *(cell for pair in pairs for cell in pair)]
