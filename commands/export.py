"""`--export RUN`: a run's adapted model as two files that need no run folder; `load` reads them.

`model.safetensors` has every weight and buffer, the frozen backbone's included; `config.json` the run's settings, what must be
rebuilt before the weights fit, the classes in the order of their scores, and the checksum of the weights.
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
from commands import saved
from models.learner.base import Learner
from utils.files.storage import write_bytes, write_json
from utils.process.machine import check_torchvision
from utils.text import counted, printable

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def run(args: argparse.Namespace) -> int:
    check_torchvision()
    print(printable(export(args.export, args.out or args.export / "export", args.data_root)))
    return 0


def export(folder: Path | str, out: Path | str, data_root: str | None = None) -> str:
    """Writes the model of the run in `folder`, as its newest checkpoint has it, and tells in a line what was written.

    Raises ValueError if `out` is there and no empty folder, and what `saved.load` raises."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; move it away first")
    run = saved.load(folder, data_root=data_root)
    learner, stream = run.learner, run.stream
    out.mkdir(parents=True, exist_ok=True)
    data = save_tensors({name: t.detach().cpu().contiguous().clone() for name, t in learner.state_dict().items()})
    write_bytes(out / WEIGHTS, data)
    config = {
        "settings": learner.cfg.model_dump(mode="json"),
        "structure": learner.structure(),
        "num_classes": learner.num_classes,
        "classes": stream.class_names[: learner.seen],
        "class_order": stream.order[: learner.seen],
        "image_size": weights.input_size(learner.cfg),
        "task": run.task,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    write_json(out / CONFIG, config)
    what = (
        f"{learner.cfg.model_name} after task {run.task + 1}/{len(stream)}, {counted(learner.seen, 'class', 'classes')}"
    )
    done = f"{out}: {what}, {len(data):,} bytes"
    return "; ".join([done, *run.notes])


def load(folder: Path | str, device: torch.device | None = None) -> tuple[Learner, list[str]]:
    """The model in `folder`, frozen and in evaluation mode, and its classes: `logits(images)` of images [B, 3, S, S] in [0, 1]
    are scores [B, classes].

    Raises ValueError if a file is missing or not as it was written."""
    folder = Path(folder)
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_bytes())
        data = (folder / WEIGHTS).read_bytes()
        if hashlib.sha256(data).hexdigest() != config["sha256"]:
            raise ValueError(f"{WEIGHTS} is not as it was written")
        values = config["settings"] | {"backbone_weights": "random"}  # the file has the weights themselves
        cfg = saved.checked(values, str(folder / CONFIG))
        backbone = weights.build(cfg)[0].to(device or torch.device("cpu"))
        learner: Learner = models.build(cfg, backbone, config["num_classes"], 0, None)
        learner.restore(config["structure"])
        learner.load_state_dict(load_tensors(data), strict=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is no exported model that can be used: {error or type(error).__name__}") from None
    return learner.to(device or torch.device("cpu")).eval().requires_grad_(False), config["classes"]
