"""`--export RUN`: a run's adapted model as two files that need no run folder; `load` and `load_model` read them.

`model.safetensors` has every weight and buffer, the frozen backbone's included; `config.json` the run's settings, what must be
rebuilt before the weights fit, the classes in the order of their scores, how a file becomes the input, and the checksum of the
weights. With --format there is a third file for programs without this one (commands/export_formats.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

import models
from backbone import weights
from commands import export_formats, saved
from models.learner.base import Learner
from utils import data
from utils.data import recipe
from utils.files.storage import write_bytes, write_json
from utils.process.machine import check_torchvision
from utils.text import counted, printable

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def run(args: argparse.Namespace) -> int:
    check_torchvision()
    print(printable(export(args.export, args.out or args.export / "export", args.data_root, args.format)))
    return 0


def export(folder: Path | str, out: Path | str, data_root: str | None = None, kind: str | None = None) -> str:
    """Writes the model of the run in `folder`, as its newest checkpoint has it, and tells in a line what was written. `kind`:
    a further format, "onnx" or "torchscript".

    Raises ValueError if `out` is there and no empty folder, and what `saved.load` and `export_formats.write` raise."""
    out = Path(out)
    if kind is not None and (lacking := export_formats.missing(kind)):
        raise ValueError(lacking)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; move it away first")
    run = saved.load(folder, data_root=data_root)
    learner, stream, size = run.learner, run.stream, weights.input_size(run.learner.cfg)
    out.mkdir(parents=True, exist_ok=True)
    formats = {}
    if kind is not None:
        formats[kind] = export_formats.write(learner, stream, run.task, size, out, kind)
    content = save_tensors({name: t.detach().cpu().contiguous().clone() for name, t in learner.state_dict().items()})
    write_bytes(out / WEIGHTS, content)
    config = {
        "settings": learner.cfg.model_dump(mode="json"),
        "structure": learner.structure(),
        "num_classes": learner.num_classes,
        "classes": stream.class_names[: learner.seen],
        "class_order": stream.order[: learner.seen],
        "image_size": size,
        "input": recipe.of(data.DATASETS[learner.cfg.dataset].transforms, size, learner.cfg.grey_bits).plain(),
        "subtracted_in_the_model": _normalisation(learner),
        "task": run.task,
        "sha256": hashlib.sha256(content).hexdigest(),
        **({"formats": formats} if formats else {}),
    }
    write_json(out / CONFIG, config)
    what = (
        f"{learner.cfg.model_name} after task {run.task + 1}/{len(stream)}, {counted(learner.seen, 'class', 'classes')}"
    )
    done = f"{out}: {what}, {len(content):,} bytes"
    return "; ".join([done, *map(export_formats.said, formats.values()), *run.notes])


def _normalisation(learner: Learner) -> dict[str, list[float]] | None:
    """Mean and deviation of each channel, which the backbone applies to images in [0, 1]; None if it takes them as they are."""
    backbone = learner.backbone
    if not backbone.normalises:
        return None
    return {"mean": backbone.mean.flatten().tolist(), "std": backbone.std.flatten().tolist()}


def is_one(folder: Path | str) -> bool:
    """Whether a folder looks like an exported model."""
    return (Path(folder) / WEIGHTS).is_file()


def load_model(folder: Path | str, device: torch.device | None = None) -> saved.SavedModel:
    """As `load`, with the recipe that makes the input from files: `read` of utils/data/new_images.py follows it.

    Raises ValueError as `load` does, and for an export of a version without a recipe."""
    learner, classes = load(folder, device)
    try:
        how = recipe.of_plain(json.loads((Path(folder) / CONFIG).read_bytes())["input"])
    except KeyError:
        raise ValueError(f"{folder} does not say how files become its input: export the run again") from None
    return saved.SavedModel(learner, classes, how)


def load(folder: Path | str, device: torch.device | None = None) -> tuple[Learner, list[str]]:
    """The model in `folder`, frozen and in evaluation mode, and its classes: `logits(images)` of images [B, 3, S, S] in [0, 1]
    are scores [B, classes].

    Raises ValueError if a file is missing or not as it was written."""
    folder = Path(folder)
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_bytes())
        content = (folder / WEIGHTS).read_bytes()
        if hashlib.sha256(content).hexdigest() != config["sha256"]:
            raise ValueError(f"{WEIGHTS} is not as it was written")
        values = config["settings"] | {"backbone_weights": "random"}  # the file has the weights themselves
        cfg = saved.checked(values, str(folder / CONFIG))
        backbone = weights.build(cfg)[0].to(device or torch.device("cpu"))
        learner: Learner = models.build(cfg, backbone, config["num_classes"], 0, None)
        learner.restore(config["structure"])
        learner.load_state_dict(load_tensors(content), strict=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is no exported model that can be used: {error or type(error).__name__}") from None
    return learner.to(device or torch.device("cpu")).eval().requires_grad_(False), config["classes"]
