"""Toy parts that many tests share: a tiny random ViT, a tiny data set of coloured noise, settings for any method."""

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

import models
from backbone.vit import SlottedViT
from utils.data.dataset import Dataset
from utils.data.images import ImageArray
from utils.data.tasks import TaskStream
from utils.run import task
from utils.run.journal import Journal


def toy_backbone(seed: int = 0, **other) -> SlottedViT:
    """Depth 3, width 16, 8-pixel images in 4 patches, class token."""
    torch.manual_seed(seed)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 0, **other}
    return SlottedViT(VisionTransformer(**sizes))


def toy_dataset(classes: int = 6, train: int = 10, test: int = 4, seed: int = 0) -> Dataset:
    """Each class is its own mean colour and pattern plus noise: easy, but not trivial."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(40, 215, (classes, 3, 8, 8))

    def draw(count: int) -> ImageArray:
        labels = np.repeat(np.arange(classes), count)
        images = centres[labels] + rng.normal(0, 25, (len(labels), 3, 8, 8))
        return ImageArray(images.clip(0, 255).astype(np.uint8), labels)

    return Dataset("toy", [f"class {c}" for c in range(classes)], draw(train), draw(test), "small")


def toy_stream(dataset: Dataset | None = None, *, init_cls=2, increment=2, seed=1, **other) -> TaskStream:
    return TaskStream(
        dataset or toy_dataset(), init_cls=init_cls, increment=increment, seed=seed, image_size=8, **other
    )


# Small settings that let any method run on the toy set; keys a method does not have are left out.
TOY_SETTINGS = {
    "dataset": "digits", "init_cls": 2, "increment": 2, "batch_size": 8, "init_lr": 0.05, "epochs": 2, "func_epoch": 2,
    "rd_epoch": 2, "rd_lr": 0.01, "ffn_num": 2, "rd_dim": 4, "buffer_size": 30, "detect_batch_size": 8,
    "exp_threshold": 0.5, "adapt_start_layer": 1, "adapt_end_layer": 2, "nested_lora_rank": 2, "num_experts": 3,
    "expert_hidden": 2, "tuned_epoch": 2, "init_epochs": 2, "M": 9, "ffn_adapter_dropout": 0.0,
    "e_prompt_layer_idx": (2,), "prompt_layer_idx": (0, 2), "prompt_param": (6, 2, 0.1),
}  # fmt: skip


def toy_settings(method: str, **other):
    schema = models.settings_of(method)
    values = {k: v for k, v in (TOY_SETTINGS | other).items() if k in schema.model_fields}
    return schema(model_name=method, **values)


def learn_and_score(learner, stream, index, record):
    """Learns and scores one task in the order of a run, without a run folder's journal."""
    task.score(learner, stream, index, record, task.learn(learner, stream, index, record.seed, Journal()))
