"""The heads that the settings name, empty: class statistics, and the linear head that is aligned anew.

Shapes: D width, P width of random features.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from backbone.heads.aligned import AlignedHead, AlignmentRecipe
from backbone.heads.discriminant import DiscriminantHead
from backbone.heads.heads import StatisticsHead

Statistics = Literal["ncm", "ridge", "lda"]
Head = StatisticsHead | AlignedHead


def statistics_head(
    cfg: Any, kind: Statistics, width: int, num_classes: int, size: int | None, *, cosine: bool = False
) -> StatisticsHead:
    """Class statistics of features [n, D] of `width` D, lifted to `size` P random features if it is not None."""
    lift, gamma = cfg.head_lift, cfg.head_fourier_gamma
    if kind == "lda":
        return DiscriminantHead(width, num_classes, size, lift, gamma, cfg.head_shrinkage)
    return StatisticsHead(kind, width, num_classes, size, cosine, lift, gamma)


def aligned_head(cfg: Any, width: int, num_classes: int) -> AlignedHead:
    """The linear head's aligned copy, for features [n, D] of `width` D."""
    recipe = AlignmentRecipe(
        covariance=cfg.head_align_covariance,
        rank=cfg.head_align_rank,
        epochs=cfg.head_align_epochs,
        samples=cfg.head_align_samples,
        lr=cfg.head_align_lr,
        temperature=cfg.head_align_logit_norm,
        local=cfg.head_align_local,
        shrink_means=cfg.head_align_shrink,
    )
    return AlignedHead(width, num_classes, recipe)


def other_kinds(cfg: Any) -> list[str]:
    """The heads that this method could predict with beside the one it does."""
    return [kind for kind in get_args(type(cfg).model_fields["head"].annotation) if kind != cfg.head]
