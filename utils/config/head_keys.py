"""The keys of heads, which every method has: their types, meanings, and which of them go together.

Sources: SLCA arXiv 2303.05118, LCA arXiv 2603.09888, KLDA (Momeni et al., AAAI 2025), SLDC arXiv 2511.09926.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

from pydantic import Field

HeadKind = Literal["linear", "ncm", "ridge", "lda", "aligned"]
Lift = Literal["relu", "fourier"]
Covariance = Literal["auto", "full", "shrunk", "low_rank", "diagonal"]
Repair = Literal["none", "linear", "mean"]

HEAD: Any = Field(
    "linear",
    description="what predicts: the trained linear head; from class statistics the nearest class mean, ridge regression or "
    "linear discriminant analysis; or the linear head aligned after each task on features drawn from class Gaussians (SLCA)",
)
PROJECTION_DIM: Any = Field(
    None,
    ge=1,
    le=50_000,
    description="number P of random features for ncm, ridge and lda (head_lift); null: the features themselves. ridge and lda "
    "store 8 P^2 bytes, 800 MB for 10,000",
)
LIFT: Any = Field(
    "relu",
    description="the random features of head_projection_dim: relu, max(0, x W) as RanPAC; fourier, cosines whose products "
    "approach the kernel exp(-gamma |x - y|^2), with lda KLDA",
)
GAMMA: Any = Field(
    None,
    gt=0,
    le=1e6,
    description="gamma of head_lift fourier, over squared units of the features; null: 1 over the median squared distance of "
    "two of the first task's training images",
)
SHRINKAGE: Any = Field(
    None,
    ge=0,
    le=1,
    description="share s of the identity in lda's covariance, (1 - s) W + s tr(W)/P I; null: chosen after each task on "
    "held-out training images",
)
COVARIANCE: Any = Field(
    "auto",
    description="what aligned stores of a class's covariance: full, D^2 numbers; shrunk to that of all classes, D^2; low_rank, "
    "r D + 1; diagonal, D; auto: the likeliest for held-out training images of the first task",
)
RANK: Any = Field(16, ge=1, le=4096, description="rank r of low_rank covariances")
EPOCHS: Any = Field(5, ge=0, description="epochs of the alignment, each on new draws; 0: none")
SAMPLES: Any = Field(256, ge=1, le=100_000, description="features drawn from each class in an epoch, and in a batch")
LR: Any = Field(0.01, gt=0, le=100, description="learning rate of the alignment; SGD, momentum 0.9, cosine to 0")
LOGIT_NORM: Any = Field(
    0.1,
    ge=0,
    le=100,
    description="temperature of the alignment's loss: scores are divided by it and by their mean norm over tasks, as in SLCA; "
    "0: by neither",
)
LOCAL: Any = Field(
    0.0,
    ge=0,
    le=1000,
    description="weight w of LCA's local term: w mean |l_i - l_j| over pairs of draws of a class; 0: the plain mean",
)
SHRINK: Any = Field(
    False, description="multiply the means of the oldest task by 0.9, of later ones by up to 1, as SLCA's alignment"
)
REPAIR: Any = Field(
    "none",
    description="moves statistics of old classes as the task's training images moved while it trained: linear, by a "
    "least-squares map pulled to the identity (SLDC); mean, by their mean move; none. No old image is read",
)
DRIFT: Any = Field(
    True,
    description="with other heads than linear, measure the cost of stale class statistics; takes one forward pass over all "
    "past training images per task",
)
COMPARE: Any = Field(
    False, description="also score what the method's other heads would predict from the same features, in the same pass"
)

OF_ALIGNED = tuple(
    f"head_align_{key}" for key in ("covariance", "rank", "epochs", "samples", "lr", "logit_norm", "local", "shrink")
)


def used_heads(cfg: Any) -> set[str]:
    """The heads that the settings use, those that are only compared included."""
    options = set(get_args(type(cfg).model_fields["head"].annotation))
    return options if cfg.compare_heads else {cfg.head}


def faults(cfg: Any, features_move: bool) -> Iterator[tuple[tuple[str, ...], str]]:
    """For `cross_checks`: (keys, fault). `features_move`: whether statistics of the method can become stale."""
    used = used_heads(cfg)
    if cfg.head_projection_dim is not None and not used & {"ncm", "ridge", "lda"}:
        yield (
            ("head_projection_dim", "head"),
            f'head_projection_dim: has no effect with head "{cfg.head}"; it projects the class statistics of "ncm", "ridge" '
            'and "lda"',
        )
    for key in ("head_lift", "head_fourier_gamma"):
        if cfg.is_set(key) and not used & {"ncm", "ridge", "lda"}:
            yield (key, "head"), f'{key}: is for the class statistics of "ncm", "ridge" and "lda"; remove it'
    if cfg.head_fourier_gamma is not None and cfg.head_lift != "fourier":
        yield ("head_fourier_gamma", "head_lift"), 'head_fourier_gamma: is for head_lift "fourier" only; remove it'
    if cfg.head_shrinkage is not None and "lda" not in used:
        yield ("head_shrinkage", "head"), 'head_shrinkage: is for head "lda" only; remove it'
    for key in OF_ALIGNED:
        if cfg.is_set(key) and "aligned" not in used:
            yield (key, "head"), f'{key}: is for head "aligned" only; set head to "aligned" or remove it'
    if cfg.is_set("head_align_rank") and cfg.head_align_covariance not in ("low_rank", "auto"):
        yield (
            ("head_align_rank", "head_align_covariance"),
            'head_align_rank: is for head_align_covariance "low_rank" and "auto" only; remove it',
        )
    if cfg.head_drift_repair != "none":
        if used == {"linear"}:
            yield (
                ("head_drift_repair", "head"),
                'head_drift_repair: has no effect with head "linear", which has no statistics; set another head or remove it',
            )
        elif not features_move:
            yield (
                ("head_drift_repair",),
                f"head_drift_repair: statistics of {cfg.model_name} never become stale; remove it",
            )
    if cfg.compare_heads and len(get_args(type(cfg).model_fields["head"].annotation)) < 2:
        yield ("compare_heads",), f"compare_heads: {cfg.model_name} has one head only, {cfg.head}; remove it"


def idle(cfg: Any) -> Iterator[str]:
    """For `remarks`: keys that are set without effect beside the others."""
    if cfg.head_projection_dim is None and not getattr(cfg, "use_RP", False):
        yield from cfg.has_no_effect("head_projection_dim null", True, "head_lift", "head_fourier_gamma")
    others = [key for key in OF_ALIGNED if key != "head_align_epochs"]
    yield from cfg.has_no_effect("head_align_epochs 0", not cfg.head_align_epochs, *others)
