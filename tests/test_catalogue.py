"""The backbone names that are known without importing timm are those that timm itself knows."""

import timm

from backbone import catalogue


def test_names_are_timms():
    names = catalogue.names()
    assert names[0] == "embedded" and len(set(names)) == len(names)
    rest = set(names) - {"embedded", *catalogue.SEMA_CL_NAMES}
    plain = {name for name in rest if "." not in name}
    assert plain <= set(timm.list_models())
    assert set(timm.list_models(module="vision_transformer")) <= plain  # none is forgotten
    patterns = ["vit_base_patch16_224.*", "deit3_small_patch16_224.*", "vit_small_patch14_dinov2.*"]
    assert set(timm.list_pretrained(patterns)) <= rest
