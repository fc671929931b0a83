"""Training of the descriptors that recognise a layer's inputs, and what they remember of it (SEMA, paper section 3.3).

Shapes: B batch, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from backbone.experts.descriptor import Descriptor
from models.learner.base import Learner
from models.learner.fit import fit
from models.learner.losses import Loss
from models.learner.table import Table
from models.settings.detection import DetectionSettings
from utils.data.tasks import Task


def parameters_of(descriptors: Mapping[int, Descriptor]) -> list[nn.Parameter]:
    return [p for descriptor in descriptors.values() for p in descriptor.parameters()]


def train(
    learner: Learner, task: Task, descriptors: Mapping[int, Descriptor], cfg: DetectionSettings, phase: str
) -> dict[str, list[Tensor]]:
    """Trains the new descriptors {layer: descriptor} on the mean tokens of the task's images, all else fixed (paper eq. 4).

    Returns {"rd.<layer>": the losses [B] of every step}. The original back-propagates through the network as well; that
    changes nothing, so it is left out. With `rd_views` the mean tokens of that many augmented views are computed once and
    the epochs run on them alone."""
    layers = list(descriptors)

    @torch.no_grad()
    def mean_tokens(images: Tensor) -> Tensor:
        """[B, layers, D]"""
        means = learner.backbone.mean_tokens(images, layers)
        return torch.stack([means[n] for n in layers], dim=1)

    def view(number: int) -> Table:
        """The mean tokens of one augmented view of each image, in the order of that epoch."""
        batches = list(learner.outputs(mean_tokens, task.train, cfg.batch_size, epoch=number, draw=phase))
        tokens, labels = zip(*batches, strict=True)
        return Table(torch.cat(tokens), torch.cat(labels), torch.arange(len(task.train)), are_images=True)

    views = [view(number) for number in range(min(cfg.rd_views, cfg.rd_epoch))]
    learner.eval()

    def step(images: Tensor, labels: Tensor) -> Loss:
        means = images if views else mean_tokens(images)
        losses = {f"rd.{n}": d(means[:, i]) for i, (n, d) in enumerate(descriptors.items())}
        return Loss(torch.stack([loss.mean() for loss in losses.values()]).sum(), remember=losses)

    data = (lambda epoch: views[epoch % len(views)]) if views else None
    parameters = parameters_of(descriptors)
    return fit(learner, task, step, parameters, phase=phase, epochs=cfg.rd_epoch, lr=cfg.rd_lr, data=data).remembered


@torch.no_grad()
def record(
    learner: Learner, task: Task, descriptors: Mapping[int, Descriptor], cfg: DetectionSettings, draw: str
) -> None:
    """One pass over the task's images fills the records of the trained descriptors {layer: descriptor}."""
    batches: dict[int, list[Tensor]] = {n: [] for n in descriptors}

    def losses(images: Tensor) -> dict[int, Tensor]:
        means = learner.backbone.mean_tokens(images, descriptors)
        return {layer: descriptor(means[layer]) for layer, descriptor in descriptors.items()}

    for losses_by_layer, _ in learner.outputs(losses, task.train, cfg.detect_batch_size, draw=draw):
        for layer, losses_of_layer in losses_by_layer.items():
            batches[layer].append(losses_of_layer)
    for layer, descriptor in descriptors.items():
        descriptor.observe(batches[layer])
