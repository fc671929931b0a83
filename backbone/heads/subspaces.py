"""Several feature spaces of one backbone: adapter sets of which one acts in a pass, and the class means over all of them.

Shapes: B batch, N tokens, D width, C classes, S subspaces: that of the frozen model first if it is one of them (`plain`), then
one for each adapter set.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbone.blocks import Slot
from backbone.heads.heads import StatisticsHead
from backbone.vit import Activations, SlottedViT

PLAIN = -1  # the pass in which no adapter acts


class SubspaceSlot(Slot):
    """The slot of one block: adapters that are never summed. The newest acts, or the one that the pass's route names."""

    reads = "token"

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleList()

    def __len__(self) -> int:
        return len(self.adapters)

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D] by the adapter whose number `gates` holds (on the CPU), zero for PLAIN; None: the newest."""
        index = len(self.adapters) - 1 if gates is None else int(gates)
        return torch.zeros_like(x) if index == PLAIN else self.adapters[index](x)


def features_in(backbone: SlottedViT, images: Tensor | Activations, subspaces: Sequence[int]) -> Tensor:
    """Pooled features side by side, [B, S D]: one pass for each of `subspaces`, numbers of adapter sets or PLAIN.

    All start where the first slot begins; what lies below is computed once."""
    start = images if isinstance(images, Activations) else backbone.prefix(images, 0, inside=True)

    def one(index: int) -> Tensor:
        chosen = torch.tensor(index)
        return backbone(start, route=lambda x: [chosen] * len(backbone.slots))

    return torch.cat([one(index) for index in subspaces], dim=1)


class SubspaceHead(StatisticsHead):
    """EASE's class scores from features in S subspaces, [B, S D] -> [B, C] (Zhou et al., CVPR 2024, arXiv 2403.12030).

    `add` gives the classes of task i their means in all subspaces there are, `grow` begins the next subspace, and `solve`
    fills in what old classes lack there without their images: the means of the new classes, weighted by how similar these
    are to the old class in its own subspace (`mapping`). A score is the cosine in the class's own subspace, plus `alpha`
    times the mean of those in the other adapters' subspaces, plus `beta` times the one in the plain model's.
    """

    owner: Tensor  # [C] the task of each class, -1: not seen

    def __init__(self, width: int, num_classes: int, plain: bool, alpha: float, beta: float):
        super().__init__("ncm", width * plain, num_classes)
        self.width, self.plain, self.alpha, self.beta = width, int(plain), alpha, beta
        self.register_buffer("owner", torch.full((num_classes,), -1.0, dtype=torch.float64))

    @property
    def tasks(self) -> int:
        """Subspaces with an adapter set, one a task."""
        return self.sums.shape[1] // self.width - self.plain

    def grow(self) -> None:
        """One subspace more, in which no class has a mean yet."""
        more = self.sums.new_zeros(len(self.sums), self.width)
        self.sums, self.weight = (torch.cat([tensor, more], dim=1) for tensor in (self.sums, self.weight))

    @torch.no_grad()
    def add(self, features: Tensor, labels: Tensor) -> None:
        super().add(features, labels)
        self.owner[(self.counts > 0) & (self.owner < 0)] = self.tasks - 1

    @torch.no_grad()
    def clear(self) -> None:
        super().clear()
        self.owner.fill_(-1)

    @torch.no_grad()
    def solve(self) -> None:
        """Anew for every pair of an old task and a later subspace: the classes that may lend their means have become more."""
        means = self._by_subspace(self.means())
        filled = means.clone()
        for task in range(self.tasks):
            for later in range(task + 1, self.tasks):
                lenders = means[self.owner >= later, self.plain + later]
                filled[self.owner == task, self.plain + later] = self.mapping(task, later) @ lenders
        self.weight.copy_(filled.flatten(1))

    def similarity(self, task: int, later: int) -> Tensor:
        """Cosines of the means of `task`'s classes to those of all classes of the tasks from `later` on, in the subspace of
        `task`, where all of them are real: [classes of task, classes from later on]."""
        means = F.normalize(self._by_subspace(self.means())[:, self.plain + task], dim=1)
        return means[self.owner == task] @ means[self.owner >= later].T

    def mapping(self, task: int, later: int) -> Tensor:
        """How much each of these later classes lends to each class of `task`: the softmax of `similarity`."""
        return torch.softmax(self.similarity(task, later), dim=1)

    def forward(self, features: Tensor) -> Tensor:
        """[B, S D] -> [B, C] in the features' precision."""
        parts = F.normalize(self._by_subspace(features.double()), dim=2)
        rows = F.normalize(self._by_subspace(self.weight), dim=2) * self.shares()[:, :, None]
        return F.linear(parts.flatten(1), rows.flatten(1)).to(features.dtype)

    def shares(self) -> Tensor:
        """Weight of each subspace in a class's score, [C, S]."""
        shares = self.owner.new_full((len(self.owner), self.plain + self.tasks), self.alpha / max(self.tasks - 1, 1))
        shares[:, : self.plain] = self.beta
        is_own = self.owner[:, None] == torch.arange(-self.plain, self.tasks, device=self.owner.device)
        is_own[:, : self.plain] = False
        return shares.masked_fill(is_own, 1.0)

    def _by_subspace(self, x: Tensor) -> Tensor:
        """[n, S D] -> [n, S, D]."""
        return x.unflatten(1, (self.tasks + self.plain, self.width))
