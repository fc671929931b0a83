"""What tests of nested adapters share: learning toy tasks, states, log rows, refused settings."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import models
from backbone import catalogue
from backbone.blocks import Slot
from tests.helpers.methods import images_of
from tests.helpers.toy import toy_stream
from utils.config import resolve
from utils.config.strict_json import ConfigError


def learn(learner, stream, tasks, first=0, consolidate=True):
    for index in range(first, tasks):
        learner.begin_task()
        learner.learn(stream.task(index))
        if consolidate or index < tasks - 1:
            learner.consolidate(stream.task(index))
    return learner.eval()


@torch.no_grad()
def logits(learner, part=None):
    """Scores of the first toy task's test images by slow, fast or both adapters; None leaves the part as it is."""
    for adapter in learner.backbone.slots.values():
        if part is not None:
            adapter.use(part)
    return learner.eval().logits(images_of(toy_stream()))


def largest(values):
    return values.detach().abs().max().item()


def rows(learner, kind):
    lines = (Path(learner.log.folder) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def state(learner):
    return {k: v.clone() for k, v in learner.own_state().items()}


class Sum(Slot):
    """The plain sum of some adapters."""

    def __init__(self, adapters):
        super().__init__()
        self.adapters = nn.ModuleList(adapters)

    def forward(self, x, gates=None):
        return sum(adapter(x) for adapter in self.adapters)


# Settings ---------------------------------------------------------------------------------------------------------------


def faults_of(method, **values):
    keys = {"model_name": method, "dataset": "digits", "init_cls": 2, "increment": 2} | values
    with pytest.raises(ConfigError) as caught:
        resolve.resolve(
            keys,
            source="x.json",
            settings_of=models.settings_of,
            methods=models.available(),
            backbones=catalogue.names,
        )
    return caught.value.faults
