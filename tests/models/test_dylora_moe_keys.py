"""Keys of dylora_moe: contradictory values are refused, and keys without effect are named."""

from tests.helpers.dylora import FIXED
from tests.helpers.toy import toy_settings


def test_contradictory_keys_are_refused_and_silent_ones_told():
    def faults(**keys):
        return [text.partition(":")[0] for _, text in toy_settings("dylora_moe", **keys).cross_checks()]

    assert faults() == []
    assert faults(top_k_experts=4) == ["top_k_experts"]
    assert faults(router_temperature_end=3.0) == ["router_temperature_end"]
    assert faults(router_lr=0.001, min_lr=0.01) == ["min_lr"]
    assert faults(expert_rank_max=2) == ["expert_rank_max"]
    assert faults(merge_below=0.1, use_moe_routing=False) == ["merge_below"]
    assert faults(lora_target=()) == faults(lora_target=("qkv", "qkv")) == ["lora_target"]
    assert faults(lora_target=("qkv", "fc2")) == []

    def told(**keys):
        return list(toy_settings("dylora_moe", **keys).remarks())

    assert told() == []
    assert told(novelty_threshold=0.3) == [
        "novelty_threshold has an effect with novelty_threshold_mode calibrated only until a task had two classes"
    ]
    assert told(plateau_epochs=3) == ["no expert ever freezes: 2 epochs cannot show a plateau of plateau_epochs 3"]
    assert told(**FIXED, novelty_delta=0.2, novelty_quantile=0.2) == [
        "these keys have no effect with novelty_threshold_mode fixed: novelty_delta, novelty_quantile"
    ]
    assert "router_lr" in told(use_moe_routing=False, router_lr=0.1)[0]
    assert "distill_on" in told(distill_on="logits")[0]
    assert "rank_growth_step" in told(rank_growth_step=2)[0]
    assert told(replay_per_class=2) == [
        "replay_per_class 2: training images are stored, so the run is not rehearsal-free"
    ]
    assert "no rank ever grows" in told(expert_rank_max=9, epochs=2)[0]
