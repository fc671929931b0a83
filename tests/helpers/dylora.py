"""What tests of dylora_moe share: settings that always or never add an expert, learning toy tasks, an expert's numbers."""

import torch

from backbone.experts import routed
from tests.helpers.methods import run
from tests.helpers.toy import toy_stream

FIXED = {"novelty_threshold_mode": "fixed"}
ALWAYS, NEVER = FIXED | {"novelty_threshold": 2.0}, FIXED | {"novelty_threshold": -2.0}


def teach(learner, tasks=3, first=0, stream=None):
    """The learner after the toy tasks from `first` on, with the hooks in the order in which a run calls them."""
    return run(learner, stream or toy_stream(), tasks, first)


def experts_of(learner, expert):
    """Every number of one expert, layer after layer."""
    slots = routed.routed_layers(learner.backbone)
    return torch.cat([p.flatten() for slot in slots for p in slot.adapters[expert].parameters()]).clone()


def columns_of(learner, expert):
    """Its column of every router, one after the other."""
    return torch.cat([r.columns[expert] for r in routed.routers_of(learner.backbone)]).clone()
