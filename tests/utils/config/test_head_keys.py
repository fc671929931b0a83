"""Keys of heads: each that cannot act is refused with its remedy, and the defaults leave old settings' hashes as they were."""

import pytest

from tests.helpers.toy import toy_settings
from utils.config.hashing import settings_hash
from utils.config.schema import Experiment


@pytest.mark.parametrize(
    ("method", "keys", "named"),
    [
        ("finetune", {"head_projection_dim": 5}, ("head_projection_dim", "head")),
        ("finetune", {"head": "aligned", "head_projection_dim": 5}, ("head_projection_dim", "head")),
        ("finetune", {"head_lift": "fourier"}, ("head_lift", "head")),
        ("finetune", {"head": "lda", "head_projection_dim": 5, "head_fourier_gamma": 0.1}, ("head_fourier_gamma", "head_lift")),
        ("finetune", {"head": "ridge", "head_shrinkage": 0.1}, ("head_shrinkage", "head")),
        ("finetune", {"head": "lda", "head_align_lr": 0.2}, ("head_align_lr", "head")),
        ("finetune", {"head": "aligned", "head_align_covariance": "full", "head_align_rank": 4},
         ("head_align_rank", "head_align_covariance")),
        ("finetune", {"head_drift_repair": "linear"}, ("head_drift_repair", "head")),
        ("simplecil", {"head_drift_repair": "mean"}, ("head_drift_repair",)),
        ("joint", {"head": "ridge", "head_drift_repair": "mean"}, ("head_drift_repair",)),
        ("ease", {"compare_heads": True}, ("compare_heads",)),
    ],
)  # fmt: skip
def test_what_cannot_act_is_refused(method, keys, named):
    (fault,) = toy_settings(method, **keys).cross_checks()
    assert fault[0] == named and fault[1].startswith(f"{named[0]}: ")


def test_with_all_heads_compared_every_key_of_a_head_acts():
    keys = {"compare_heads": True, "head_projection_dim": 5, "head_lift": "fourier", "head_fourier_gamma": 0.1}
    keys |= {"head_shrinkage": 0.5, "head_align_lr": 0.2, "head_align_rank": 4, "head_drift_repair": "linear"}
    assert not list(toy_settings("finetune", **keys).cross_checks())
    assert not list(toy_settings("finetune", **keys).remarks())


def test_keys_without_effect_are_named():
    (note,) = toy_settings("finetune", head="lda", head_lift="fourier").remarks()
    assert "head_projection_dim null: head_lift" in note
    (note,) = toy_settings("finetune", head="aligned", head_align_epochs=0, head_align_lr=0.2).remarks()
    assert "head_align_epochs 0: head_align_lr" in note


def test_the_hash_of_old_settings_stays():
    old = {"head": "ridge", "head_projection_dim": 9, "head_drift": True}
    new = {
        key: field.default
        for key, field in Experiment.model_fields.items()
        if key.startswith("head_") and key not in old
    }
    assert len(new) == 12 and settings_hash(old) == settings_hash(old | new | {"compare_heads": False})
    assert settings_hash(old | {"head_lift": "fourier"}) != settings_hash(old)
