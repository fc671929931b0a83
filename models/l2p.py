"""L2P: prompts that an image's query selects from a pool, as input tokens (Wang et al., CVPR 2022, arXiv 2112.08654).

Trains the pool, its keys and a linear head; the ViT is frozen. With `batchwise_prompt` and `decay_other_rows` it is
LAMDA-PILOT's to rounding (tests/contract/parity). Departure from that code by default: prompts are chosen for
each image alone, in training and testing, where PILOT takes a vote over the batch.
Shapes: B batch, N tokens, D width, L length of a prompt, K chosen prompts.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from backbone import families
from backbone.heads.heads import LinearHead
from backbone.prompts.prefixes import PromptPool, Queried, choose
from backbone.vit import Activations
from models.families.prompts import PromptLearner, learn_from_pool
from models.settings.prompts import PoolSettings
from utils.data.tasks import Task


class Settings(PoolSettings):
    """Defaults are LAMDA-PILOT's for CIFAR-100, except that prompts are chosen for each image."""

    init_lr: float = Field(0.001875, gt=0, le=100, description="learning rate at the start of each task")
    head_type: Literal["prompt", "token"] = Field(
        "prompt",
        description="what the head reads: the mean of the prompt tokens, or the backbone's pooling of the image's tokens",
    )


class Learner(PromptLearner):
    cfg: Settings

    def __init__(self, *args: Any):
        super().__init__(*args)
        width = self.backbone.width
        if not families.takes_more_tokens(self.backbone.vit):
            raise ValueError(
                "l2p adds prompts to the tokens, and the attention of this backbone has a position for each of its tokens and "
                "none for more (rotary angles or a bias by relative position); choose a backbone with position embeddings alone"
            )
        self.pool = self.initialise("pool", PromptPool(self.cfg.size, (self.cfg.length, width), width))
        self.head = self.initialise("head", LinearHead(width, self.num_classes))

    @property
    def prefix_layer(self) -> int:
        """Prompts are input tokens: nothing above the stem stays the same."""
        return 0

    # Learning ------------------------------------------------------------------------------------------------------

    def trainable(self) -> list[nn.Parameter]:
        """All of the pool and the head."""
        return [*self.pool.parameters(), *self.head.parameters()]

    def learn(self, task: Task) -> None:
        learn_from_pool(self, task, self.pool, self._encode)

    # Prediction ----------------------------------------------------------------------------------------------------

    def features(self, images: Tensor | Activations | Queried) -> Tensor:
        start, query = self.begin(images)
        return self._encode(start, choose(self.pool.similarity(query), self.cfg.top_k, self.cfg.batchwise_prompt))

    def _encode(self, start: Activations, ids: Tensor) -> Tensor:
        """Features [B, D] of a stream from the stem, with the prompts [B, K] as further tokens.

        They come after the other tokens, an order that attention does not see, and get the class token's position
        embedding, where the model has one, as LAMDA-PILOT's loader does when it stretches the position table."""
        vit, count = self.backbone.vit, start.x.shape[1]
        prompts = self.pool(ids).flatten(1, 2)  # [B, K L, D]
        if vit.pos_embed is not None and vit.cls_token is not None and not vit.no_embed_class:
            prompts = prompts + vit.pos_embed[:, :1]
        tokens = self.backbone.all_tokens(Activations(0, torch.cat([start.x, prompts], dim=1)))
        if self.cfg.head_type == "token":
            return vit.forward_head(tokens[:, :count], pre_logits=True)
        return vit.fc_norm(tokens[:, count:].mean(dim=1))
