"""DualPrompt: shared prompts and prompts by query, as prefixes of attention (Wang et al., ECCV 2022, arXiv 2204.04799).

Blocks in `g_prompt_layer_idx` read a prefix that all images share, those in `e_prompt_layer_idx` one that the image's query
selects from a pool, with one set of keys for all layers. Trains both, the keys and a linear head. With `batchwise_prompt`,
`scrambled_e_prompt` and `decay_other_rows` it is LAMDA-PILOT's to rounding (tests/contract/parity); without, prompts are
chosen for each image alone, and it reads the keys and values of those prompts. Shapes: B batch, D width, L length of a
prompt, K chosen prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from backbone.heads.heads import LinearHead
from backbone.prompts import prefixes as prompts
from backbone.prompts.prefixes import PromptPool, Prompts, Queried, choose
from backbone.vit import Activations
from models.families.prompts import PromptLearner, learn_from_pool
from models.settings.prompts import PoolSettings
from utils.data.tasks import Task


class Settings(PoolSettings):
    """Defaults are LAMDA-PILOT's for CIFAR-100, without its vote over the batch and its scrambled layout."""

    only: ClassVar[dict[str, Any]] = PoolSettings.only | {
        "use_g_prompt": True,  # g_prompt_layer_idx [] leaves G-prompts out
        "use_e_prompt": True,
        "use_prefix_tune_for_g_prompt": True,
        "use_prefix_tune_for_e_prompt": True,
        "same_key_value": False,
        "head_type": "token",
    }

    tuned_epoch: int = Field(5, ge=0, description="epochs: passes over the training images of each task")
    top_k: int = Field(
        1, ge=1, le=1000, description="number of E-prompts chosen for an image, concatenated in the prefix"
    )
    use_prompt_mask: bool = Field(
        True,
        description="task t, counted from 0, trains E-prompts t*top_k to (t+1)*top_k-1 only, as far as the pool has them",
    )
    shared_prompt_pool: bool = Field(
        True, description="with use_prompt_mask, start a task's E-prompts as copies of the previous task's"
    )
    g_prompt_length: int = Field(5, ge=1, le=1000, description="length of a G-prompt, tokens")
    g_prompt_layer_idx: tuple[int, ...] = Field(
        (0, 1), description="layers that read a G-prompt, counted from 0; []: none"
    )
    e_prompt_layer_idx: tuple[int, ...] = Field(
        (2, 3, 4), min_length=1, description="layers that read the chosen E-prompts, counted from 0"
    )
    scrambled_e_prompt: bool = Field(
        False,
        description="give images the keys and values of other images' E-prompts, as LAMDA-PILOT's code by a reshape of the "
        "wrong axes: a prediction then depends on the image's position in the batch",
    )

    def cross_checks(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().cross_checks()
        layers = (*self.g_prompt_layer_idx, *self.e_prompt_layer_idx)
        if len(set(layers)) != len(layers) or min(layers, default=0) < 0:
            yield (
                ("g_prompt_layer_idx", "e_prompt_layer_idx"),
                "g_prompt_layer_idx, e_prompt_layer_idx: different numbers from 0 are expected, each in one of the two; "
                f"got {list(self.g_prompt_layer_idx)} and {list(self.e_prompt_layer_idx)}",
            )


class Learner(PromptLearner):
    cfg: Settings

    def __init__(self, *args: Any):
        super().__init__(*args)
        cfg, width = self.cfg, self.backbone.width
        self.general_layers, self.expert_layers = sorted(cfg.g_prompt_layer_idx), sorted(cfg.e_prompt_layer_idx)
        prompts.fill(self.backbone, self.general_layers, "g_prompt_layer_idx")
        prompts.fill(self.backbone, self.expert_layers, "e_prompt_layer_idx")
        shape = (len(self.general_layers), 2, cfg.g_prompt_length, width)
        self.general = self.initialise("general", Prompts(*shape)) if self.general_layers else None
        pool = PromptPool(cfg.size, (len(self.expert_layers), 2, cfg.length, width), width)
        self.pool = self.initialise("pool", pool)
        self.head = self.initialise("head", LinearHead(width, self.num_classes))

    # Learning ------------------------------------------------------------------------------------------------------

    def trainable(self) -> list[nn.Parameter]:
        """G-prompts, pool and head."""
        modules = (self.general, self.pool, self.head)
        return [p for module in modules if module is not None for p in module.parameters()]

    def learn(self, task: Task) -> None:
        learn_from_pool(self, task, self.pool, self._encode)

    # Prediction ----------------------------------------------------------------------------------------------------

    def features(self, images: Tensor | Activations | Queried) -> Tensor:
        start, query = self.begin(images)
        return self._encode(start, choose(self.pool.similarity(query), self.cfg.top_k, self.cfg.batchwise_prompt))

    def _encode(self, start: Activations, ids: Tensor) -> Tensor:
        """Features [B, D] with the G-prompts and the E-prompts ids [B, K] as prefixes [B, 2, L, D]."""
        chosen = self.pool(ids).permute(2, 0, 3, 1, 4, 5).flatten(3, 4)  # [E-layers, B, 2, K L, D]
        prefixes = dict(zip(self.expert_layers, chosen, strict=True))
        if self.cfg.scrambled_e_prompt:
            prefixes = {layer: prompts.scrambled(prefix) for layer, prefix in prefixes.items()}
        for layer, prefix in zip(self.general_layers, () if self.general is None else self.general.values, strict=True):
            prefixes[layer] = prefix.expand(ids.shape[0], -1, -1, -1)
        return self.backbone(start, route=lambda x: [prefixes[layer] for layer in sorted(prefixes)])
