"""Keys of the descriptors that recognise what a layer has learned, and of the scan that asks them about a new task (SEMA).

Imports nothing heavy, so that bad input is refused before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from utils.config.schema import Trained


class DetectionSettings(Trained):
    """Detection of a distribution shift. At the defaults it is the original's, its faults included."""

    rd_epoch: int = Field(20, ge=0, description="epochs of each phase that trains descriptors")
    rd_lr: float = Field(0.01, gt=0, le=100, description="learning rate of descriptors")
    rd_views: int = Field(
        0,
        ge=0,
        le=100,
        description="augmented views of an image whose mean tokens are stored and reused; 0: a new one in each epoch",
    )
    rd_dim: int = Field(128, ge=1, le=16384, description="code size of a descriptor")
    buffer_size: int = Field(
        500, ge=3, le=10_000_000, description="number of reconstruction losses a descriptor records"
    )
    detect_batch_size: int = Field(128, ge=1, description="images per batch of the scan for distribution shift")
    exp_threshold: float = Field(
        2.0,
        ge=0,
        le=1e30,
        description="score above which a layer adds an adapter, in standard deviations of the recorded losses",
    )
    detect_scope: Literal["batch", "task"] = Field(
        "batch",
        description="images over which a score is averaged: a batch, as the original, where any one batch, even a "
        "partial last one, can add an adapter; or the whole task",
    )
    detect_sign: Literal["absolute", "signed"] = Field(
        "absolute", description="absolute, as the original, counts better reconstruction as shift too; signed does not"
    )
    detect_std_floor: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="lower bound on the standard deviation in the score, as a fraction of the mean loss; the "
        "original divides by 0",
    )
    record_when: Literal["training", "end"] = Field(
        "training",
        description="losses recorded: in all training steps of both phases, as the original, or in one pass at the end",
    )

    def cross_checks(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().cross_checks()
        yield from self.must_not_rise("rd_lr", self.rd_lr)
