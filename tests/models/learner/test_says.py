"""A method that does not say before training what it trains: nobody reports 0, and the first `fit` counts it."""

import models
from backbone.heads.heads import LinearHead
from commands.check_tables import parameter_table
from models.learner.base import Learner as Base
from models.learner.fit import fit
from models.learner.losses import cross_entropy_among
from models.learner.start_values import SeededInit
from tests.helpers.toy import toy_backbone, toy_settings, toy_stream
from utils.report import console
from utils.run.log import RunLog


class Silent(Base):
    def __init__(self, *args):
        super().__init__(*args)
        self.head = self.initialise("head", LinearHead(self.backbone.width, self.num_classes))

    def learn(self, task):
        def step(images, labels):
            return cross_entropy_among(self.head(self.backbone(images)), labels, task.first, task.total)

        fit(self, task, step, list(self.head.parameters()), phase="func", epochs=1, lr=0.1)


def test_a_silent_method_is_not_said_to_train_nothing(tmp_path):
    cfg = toy_settings("finetune")
    with RunLog(tmp_path, console=False) as log:
        learner = Silent(cfg, toy_backbone(), 6, SeededInit(1), log)
        total = sum(p.numel() for p in learner.parameters())
        assert not learner.says_what_it_trains
        learner.learn(toy_stream().task(0))
        learner.learn(toy_stream().task(1))
    said = [line for line in (tmp_path / "run.log").read_text().splitlines() if "trains" in line]
    assert len(said) == 1 and said[0].endswith(f"phase func trains {6 * 17} of {total:,} parameters")
    facts = {"method": "x", "data": "y", "backbone": "z", "weights": "w", "device": "cpu", "seeds": [1]}
    text = console.banner(**facts, trainable=None, total=total, folder=tmp_path)
    assert f"parameters  {total:,}; how many of them are trained is not known before training" in text
    assert "not known before training" in parameter_table(None, total)


def test_every_method_here_says_it(tmp_path):
    with RunLog(tmp_path, console=False) as log:
        for name in models.available():
            assert models.build(toy_settings(name), toy_backbone(), 6, 1, log).says_what_it_trains, name
    assert "nothing is trained" in parameter_table([], 5)
