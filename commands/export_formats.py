"""A run's model for programs without this one: `--export RUN --format onnx|torchscript`, checked on the run's test images.

The file takes `images` float32 [B, 3, S, S] in [0, 1], any B, as the `input` of config.json says, and gives `scores` float32
[B, classes]. It computes in float32, whatever the run did. What cannot be written as one graph is refused: `torch.export` goes
through the method's prediction first, and tells where a choice depends on the numbers or on the size of the batch.
TorchScript is deprecated in torch 2.14, and still written and read by it.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbone.blocks import HALVES
from models.learner.base import Learner
from utils.data.tasks import TaskStream
from utils.text import counted, first_line

FILES = {"onnx": "model.onnx", "torchscript": "model.torchscript.pt"}
NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torchscript": ()}
# Largest difference of a score, as a share of the largest score (or of 1 where all are smaller). Sums of float32 in another
# order differ by 1e-7 to 1e-5 of it in ViTs of 12 blocks; what is computed differently differs by far more.
BOUND = 1e-4


def missing(kind: str) -> str | None:
    """A line on the packages that a format needs and that are not installed, else None."""
    absent = [name for name in NEEDED[kind] if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return f"--format {kind} needs {', '.join(absent)}: pip install -r requirements-{kind}.txt"


class Scores(nn.Module):
    """Images [B, 3, S, S] to scores [B, classes seen], both float32."""

    def __init__(self, learner: Learner):
        super().__init__()
        self.learner = learner

    def forward(self, images: Tensor) -> Tensor:
        return self.learner.logits(images).float()


def write(learner: Learner, stream: TaskStream, task: int, size: int, folder: Path, kind: str) -> dict[str, Any]:
    """Writes the model into `folder` as FILES names it and compares it with the learner on the test images of the tasks up to
    `task` (from 0). Returns what was compared, for config.json. The learner then computes in float32.

    `size`: S. Raises ValueError if the method's prediction cannot be written, or if a score differs by more than BOUND."""
    learner.backbone.precision, learner.backbone.halves = "fp32", HALVES
    module, example = Scores(learner.eval()), torch.rand(3, 3, size, size)
    path = folder / FILES[kind]
    try:
        with _silent(), torch.no_grad():
            read = {"onnx": _onnx, "torchscript": _torchscript}[kind](module, example, path)
            facts = compare(module, read, stream, task, learner.eval_batch_size)
    except (KeyboardInterrupt, OSError):
        path.unlink(missing_ok=True)
        raise
    except Exception as error:  # the two exporters raise errors of many kinds
        path.unlink(missing_ok=True)
        name = learner.cfg.model_name
        raise ValueError(f"{name} cannot be written as {kind}: {type(error).__name__}: {_reason(error)}") from error
    if facts["difference"] > BOUND * max(1.0, facts["largest_score"]):
        path.unlink()
        raise ValueError(
            f"the {kind} file of {learner.cfg.model_name} differs from the model by {facts['difference']:.2g} on the test "
            f"images, where scores are up to {facts['largest_score']:.3g} (allowed: {BOUND:g} of that): it is not kept"
        )
    return {"file": path.name, **facts}


@contextmanager
def _silent() -> Iterator[None]:
    """Without what exporters say on deprecation and on constants, and the graphs that they print before they fail."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


def said(facts: dict[str, Any]) -> str:
    """The comparison in words."""
    return (
        f"{facts['file']}: scores differ by at most {facts['difference']:.2g} (largest score {facts['largest_score']:.3g}), "
        f"the same class for {facts['same_class']:,} of {counted(facts['images'], 'test image')}"
    )


def compare(
    module: Callable[[Tensor], Tensor], read: Callable[[Tensor], Tensor], stream: TaskStream, task: int, batch: int
) -> dict[str, Any]:
    """How far the two differ on the test images of tasks 0..task: largest difference and largest score, images, and how many
    of them get the same class."""
    difference, largest, images, same = 0.0, 0.0, 0, 0
    for index in range(task + 1):
        for pixels, _, _ in stream.test(index).batches(batch, augment=False, shuffle=False):
            ours, theirs = module(pixels), read(pixels)
            if ours.shape != theirs.shape:
                raise ValueError(f"it gives scores of shape {tuple(theirs.shape)} for {tuple(ours.shape)}")
            apart = (ours - theirs).abs().max().item()
            difference = max(difference, apart) if apart == apart else float("inf")
            largest = max(largest, ours.abs().max().item())
            same += int((ours.argmax(1) == theirs.argmax(1)).sum())
            images += len(pixels)
    return {"difference": difference, "largest_score": largest, "images": images, "same_class": same}


def program_of(module: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """The module as one graph for any size of the batch; raises where it has none."""
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(module, (example,), dynamic_shapes=({0: batch},), strict=False)


def _torchscript(module: nn.Module, example: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    program_of(module, example)  # a trace would not tell that a choice depends on the numbers
    torch.jit.trace(module, (example,), check_trace=False).save(str(path))
    read: Callable[[Tensor], Tensor] = torch.jit.load(str(path), map_location="cpu")
    return read


def _onnx(module: nn.Module, example: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    program = torch.onnx.export(
        program_of(module, example),
        (example,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["scores"],
    )
    assert program is not None
    program.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["scores"], {"images": images.numpy()})[0])


def _reason(error: Exception) -> str:
    """The line of an exporter's message that says why; the first line is often a heading."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip(" -=⬆️")]
    words = ("error when", "could not guard", "specialized", "not supported", "unsupported", "data-dependent")
    telling = [line for line in lines if any(word in line.lower() for word in words)]
    return first_line((telling or lines or ["no reason given"])[0])
