"""States of nested_lora that a run may be resumed from are restored exactly."""

import json

import pytest
import torch

from tests.helpers.nested import learn, logits, state
from tests.helpers.toy import toy_stream


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"nested_lora_consolidation_interval": 2},
        {"nested_lora_consolidation_rank": 3},
        {"nested_lora_levels": 4, "nested_lora_eval": "slow", "optimizer": "adam"},
        {"nested_lora_consolidation_method": "pam", "nested_lora_eval": "fast"},
    ],
    ids=["rank has grown", "a merge is not due yet", "rank is capped", "four levels", "pam"],
)
@pytest.mark.parametrize("done", [1, 2])
def test_odd_states_are_restored_exactly(settings, done, chain):
    stream = toy_stream()
    whole = learn(chain(**settings), stream, done)
    structure, saved = json.loads(json.dumps(whole.structure())), state(whole)
    fresh = chain(**settings)
    fresh.restore(structure)
    fresh.load_own_state(saved)
    assert torch.equal(logits(fresh), logits(whole))
    for learner in (whole, fresh):
        learn(learner, stream, 3, first=done)
    assert torch.equal(logits(fresh), logits(whole)) and fresh.structure() == whole.structure()
    assert all(torch.equal(v, fresh.own_state()[k]) for k, v in whole.own_state().items())
