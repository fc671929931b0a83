"""Keys of methods that train in the first task only, as APER and RanPAC do, or one adapter a task, as EASE does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from utils.config.schema import Trained

# the keys that have no effect where nothing is trained
SESSION_KEYS = (
    "optimizer",
    "init_lr",
    "min_lr",
    "weight_decay",
    "ffn_num",
    "ffn_adapter_scalar",
    "ffn_adapter_dropout",
)


class SessionSettings(Trained):
    """Adapters of the first task. One AdaptFormer adapter in every layer, trained with a cosine head that is dropped
    afterwards."""

    features_move: ClassVar[bool] = False
    ffn_num: int = Field(64, ge=1, le=4096, description="rank of the adapter in each layer")
    ffn_adapter_scalar: float = Field(
        0.1,
        gt=0,
        le=1e6,
        description="factor on every adapter's output (AdaptFormer, arXiv 2205.13535); fixed in the originals' code",
    )
    ffn_adapter_dropout: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="dropout probability in the bottleneck during training; 0.1 is fixed in the originals' code",
    )

    def classes_in_loss(self, classes: Sequence[int]) -> Sequence[int]:
        """The cosine head of the first task's session has its classes alone; later tasks train nothing."""
        return classes[:1]
