"""The backbone names that are known without importing timm are those that timm itself knows."""

import timm

from backbone import catalogue
from utils.text import nearest


def test_names_are_timms():
    names = catalogue.names()
    assert names[0] == "embedded" and len(set(names)) == len(names)
    rest = set(names) - {"embedded", *catalogue.SEMA_CL_NAMES}
    plain = {name for name in rest if "." not in name}
    assert plain <= set(timm.list_models())
    for module in ("vision_transformer", "deit", "eva", "beit"):
        assert set(timm.list_models(module=module)) <= plain  # none is forgotten
    patterns = [f"{name}.*" for name in plain]
    assert set(timm.list_pretrained(patterns)) <= rest


def test_did_you_mean_prefers_names_that_begin_with_what_was_typed():
    names = catalogue.names()
    begun = nearest("vit_base", names)
    assert "'vit_base_patch16_224'" in begun and begun.count("'vit_base") == begun.count(" or ") + 1 == 3
    assert nearest("vit_base_patch16_22", names).startswith("; did you mean 'vit_base_patch16_224' or ")
    assert nearest("embeded", names) == "; did you mean 'embedded'?"
    assert nearest("lr", ["lrate", "lrs"]) == nearest(
        "lr", ["lrs"]
    )  # two letters begin too much: only closeness counts
    assert nearest("", names) == ""
