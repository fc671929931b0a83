"""The trained linear head, aligned anew after each task on features drawn from the Gaussians of all classes seen.

The classifier alignment of SLCA (arXiv 2303.05118) for any method: the rows of old classes never met the new ones in training,
draws let them meet. The head that tasks train stays as it was trained, and each alignment starts from it.
Shapes: n images, B batch, D width, C classes of the whole run, S samples a class.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.heads import alignment
from backbone.heads.drift import Motion
from backbone.heads.gaussians import ClassGaussians, Kind, ShrunkGaussians, log_density, new_gaussians
from utils.process.seeds import named_generator

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)  # candidates for the weight of the shared covariance
KINDS: tuple[Kind, ...] = (
    "full",
    "shrunk",
    "low_rank",
    "diagonal",
)  # candidates of "auto", of likelihood equal the last


@dataclass(frozen=True)
class AlignmentRecipe:
    """`samples` S drawn from each class in each of `epochs` epochs, in batches of S; SGD with momentum 0.9 from rate `lr` by a
    cosine over epochs to 0. `temperature` and `local` as in alignment.py; `shrink_means`: SLCA's factor of old means."""

    covariance: Kind | Literal["auto"]
    rank: int
    epochs: int
    samples: int
    lr: float
    temperature: float
    local: float
    shrink_means: bool


class AlignedHead(nn.Module):
    """Class scores [B, C]. `choose` and `add` take in the images of a task, `start` the head it trained, `solve` aligns.

    With "auto" the kind of covariance is chosen with the first task's images and then stays, so what is stored is known."""

    kind = "aligned"
    weight: Tensor  # [C, D]
    bias: Tensor  # [C]
    start_weight: Tensor  # [C, D] as trained
    start_bias: Tensor  # [C]
    task_of: Tensor  # [C] each class's task, -1 before it came
    draw: Tensor  # [] names the random numbers of the newest alignment

    def __init__(self, width: int, num_classes: int, recipe: AlignmentRecipe):
        super().__init__()
        self.recipe, self.width, self.num_classes = recipe, width, num_classes
        for name in ("weight", "start_weight"):
            self.register_buffer(name, torch.zeros(num_classes, width))
        for name in ("bias", "start_bias"):
            self.register_buffer(name, torch.zeros(num_classes))
        self.register_buffer("task_of", torch.full((num_classes,), -1))
        self.register_buffer("draw", torch.zeros((), dtype=torch.int64))
        self.gaussians: ClassGaussians | None = None
        if recipe.covariance != "auto":
            self.use(recipe.covariance)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Nothing is drawn at the start."""

    def use(self, covariance: Kind) -> None:
        """Sets the kind of covariance that is stored."""
        gaussians = new_gaussians(covariance, self.num_classes, self.width, self.recipe.rank)
        self.gaussians = gaussians.to(self.weight)

    def stored(self) -> int:
        """Numbers stored of the classes of the whole run, the linear rows apart."""
        return 0 if self.gaussians is None else sum(buffer.numel() for buffer in self.gaussians.buffers())

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, C] in the features' precision."""
        return F.linear(features.to(self.weight), self.weight, self.bias).to(features.dtype)

    def means(self) -> Tensor:
        """[C, D]; 0 for a class without images."""
        assert self.gaussians is not None
        return self.gaussians.means

    def cosine(self, other: AlignedHead, classes: int) -> float:
        """Mean over the first `classes` of the cosine between this head's class mean and the other's."""
        return F.cosine_similarity(self.means()[:classes], other.means()[:classes]).mean().item()

    # Statistics ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def choose(self, features: Tensor, labels: Tensor, held: Tensor | None) -> dict[str, Any]:
        """Chooses what the settings leave open, on images `held` [n] out of a new task's features [n, D], labels [n]: with
        "auto" the kind of covariance, in the first task; with "shrunk" the share of the shared one, in every task. The
        candidate under which they have the highest mean log density is taken. Without any (None): shrunk, and 0.5.

        Returns the log densities by candidate, for the log."""
        facts: dict[str, Any] = {}
        if self.gaussians is None:
            by_kind: dict[str, float] = {}
            if held is not None:
                by_kind = {kind: self._density(kind, features, labels, held)[0] for kind in KINDS}
            facts["densities"] = by_kind or None
            self.use(max(KINDS, key=lambda kind: (by_kind[kind], KINDS.index(kind))) if by_kind else "shrunk")
        if isinstance(self.gaussians, ShrunkGaussians) and held is not None:
            _, share, facts["shares"] = self._density("shrunk", features, labels, held)
            self.gaussians.shrinkage.fill_(share)
        return facts

    def _density(
        self, kind: Kind, features: Tensor, labels: Tensor, held: Tensor
    ) -> tuple[float, float, dict[str, float]]:
        """(log density of the held-out images, the share of the shared covariance behind it, log density by share)."""
        classes, numbers = labels.unique(return_inverse=True)
        trial = new_gaussians(kind, len(classes), self.width, self.recipe.rank).double().to(features.device)
        if isinstance(trial, ShrunkGaussians) and isinstance(self.gaussians, ShrunkGaussians):
            trial.scatter.copy_(self.gaussians.scatter)
            trial.freedom.copy_(self.gaussians.freedom)
        trial.add(features[~held], numbers[~held])
        if not isinstance(trial, ShrunkGaussians):
            return log_density(trial, features[held], numbers[held]), 0.0, {}
        by_share = {}
        for share in SHARES:
            trial.shrinkage.fill_(share)
            by_share[f"{share:g}"] = log_density(trial, features[held], numbers[held])
        best = max(SHARES, key=lambda share: (by_share[f"{share:g}"], share))
        return by_share[f"{best:g}"], best, by_share

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Takes in all images of some classes: features [n, D], labels [n]. Raises ValueError if one is not finite."""
        assert self.gaussians is not None, "choose first"
        self.gaussians.add(features, labels)

    def move(self, motion: Motion) -> None:
        """Moves the Gaussians as features moved."""
        if self.gaussians is not None:
            self.gaussians.move(motion)

    def clear(self) -> None:
        """Forgets all images."""
        if self.gaussians is not None:
            self.gaussians.clear()

    def emptied(self) -> AlignedHead:
        """A copy that has seen no image and aligns the same rows on the same random numbers."""
        other = copy.deepcopy(self)
        other.clear()
        return other

    # Alignment -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start(self, weight: Tensor, bias: Tensor, classes: range, task: int, draw: int) -> None:
        """What the next `solve` starts from: the trained rows [C, D] and [C] of all classes, those of `task` being `classes`;
        `draw` names its random numbers."""
        self.start_weight.copy_(weight)
        self.start_bias.copy_(bias)
        self.task_of[classes.start : classes.stop] = task
        self.draw.fill_(draw)

    def solve(self) -> list[float]:
        """Aligns all rows of the classes seen, from the second task on; before, they stay as trained. The result depends on
        nothing but this head's state. Returns the mean loss of each epoch. Raises ValueError if it is not finite."""
        self.weight.copy_(self.start_weight)
        self.bias.copy_(self.start_bias)
        seen = int((self.task_of >= 0).sum())
        sizes = [size for size in self.task_of[:seen].bincount().tolist() if size]
        if len(sizes) < 2 or not self.recipe.epochs:
            return []
        with torch.enable_grad():
            rows = [tensor[:seen].clone().requires_grad_() for tensor in (self.start_weight, self.start_bias)]
            losses = self._descend(rows[0], rows[1], sizes)
        self.weight[:seen], self.bias[:seen] = (tensor.detach() for tensor in rows)
        return losses

    def _descend(self, weight: Tensor, bias: Tensor, sizes: list[int]) -> list[float]:
        recipe, gaussians, seen = self.recipe, self.gaussians, len(bias)
        assert gaussians is not None
        optimizer = torch.optim.SGD([weight, bias], lr=recipe.lr, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=recipe.epochs)
        scale = self._scale(seen)
        of_epochs: list[float] = []
        for epoch in range(recipe.epochs):
            generator = named_generator("alignment", int(self.draw), epoch)
            normals, order = alignment.drawn(generator, seen, recipe.samples, gaussians.noise)
            features = gaussians.sample(normals.to(weight), scale).flatten(0, 1).detach()
            labels = torch.arange(seen, device=weight.device).repeat_interleave(recipe.samples)
            losses = []
            for rows in order.to(weight.device).split(recipe.samples):
                x, y = features[rows], labels[rows]
                by_feature = alignment.alignment_losses(F.linear(x, weight, bias), y, sizes, recipe.temperature)
                near = alignment.nearest_is_own(x, y, gaussians.means[:seen]) if recipe.local else None
                loss = by_feature.mean() if near is None else alignment.local(by_feature, y, near, recipe.local)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            scheduler.step()
            of_epochs.append(float(torch.stack(losses).mean()))
        if not all(map(torch.isfinite, (*map(torch.tensor, of_epochs), weight.sum(), bias.sum()))):
            raise ValueError("the alignment of the head diverged; lower head_align_lr")
        return of_epochs

    def _scale(self, seen: int) -> Tensor:
        if not self.recipe.shrink_means:
            return torch.ones(seen).to(self.weight)
        task_of = self.task_of[:seen]
        return alignment.shrinking(task_of.to(self.weight), int(task_of.max()))
