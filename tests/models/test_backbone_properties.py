"""A prompt method refuses a backbone by the property that is missing, before anything is trained."""

import pytest

import models
from backbone.vit import SlottedViT
from tests.helpers.vits import small


@pytest.mark.parametrize(
    ("method", "name", "lacks"),
    [
        ("l2p", "vit_small_patch16_dinov3", "the attention of this backbone has a position for each of its tokens"),
        ("l2p", "beit_base_patch16_224", "the attention of this backbone has a position for each of its tokens"),
        ("dualprompt", "vit_small_patch16_dinov3", "EvaAttention, takes no prefix: it is no plain attention"),
        ("coda_prompt", "beit_base_patch16_224", "takes no prefix: it is no plain attention"),
        ("inflora", "beit_base_patch16_224", "never calls its linear layer attn.qkv"),
    ],
)
def test_the_property_is_named(method, name, lacks):
    keys = {
        "dualprompt": {"g_prompt_layer_idx": (0,), "e_prompt_layer_idx": (1,)},
        "coda_prompt": {"prompt_layer_idx": (0,)},
    }
    cfg = models.settings_of(method)(
        model_name=method, dataset="digits", init_cls=2, increment=2, **keys.get(method, {})
    )
    with pytest.raises(ValueError, match=lacks):
        models.build(cfg, SlottedViT(small(name)), 10, 0, None)
