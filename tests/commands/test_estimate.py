"""The estimate of --check all: steps and seconds on known numbers, and a real measurement that leaves nothing behind."""

import pytest
import torch

import models
from commands import estimate
from commands.estimate import Measured
from utils.process import seeds

COMMON = {"dataset": "digits", "init_cls": 2, "increment": 4, "backbone_weights": "random", "image_size": 16}


def settings(method, **values):
    return models.settings_of(method)(model_name=method, batch_size=8, **(COMMON | values))


def test_the_time_of_a_run_is_its_steps_times_that_of_one():
    measured = Measured(0.5, 8, 0.25, 256, 3 * 2**30)
    first, second = estimate.lines(settings("finetune", epochs=3), [2, 4, 4], [16, 20, 1], measured)
    assert (
        first
        == "measured here: a training step of 8 images 0.500 s, a forward pass of 256 images 0.25 s, peak memory 3.0 GiB"
    )
    # 3 epochs of ceil(16 / 8) + ceil(20 / 8) + 1 batches
    assert second.startswith("expected of a seed: 18 steps of epochs, about 0:09 on this machine")
    _, second = estimate.lines(settings("ranpac", tuned_epoch=5), [2, 4, 4], [16, 20, 1], measured)
    assert second.startswith("expected of a seed: 10 steps of tuned_epoch, about 0:05")  # the first task alone
    assert len(estimate.lines(settings("finetune"), [2, 4, 4], [], measured)) == 1
    (line,) = estimate.lines(settings("simplecil"), [2, 4, 4], [16, 20, 1], Measured(None, 8, 0.25, 256, 2**30))
    assert line.endswith("the method takes no training steps in the first task")


@pytest.mark.parametrize("method", ["finetune", "sema", "ease", "l2p", "simplecil"])
def test_a_step_is_measured_and_nothing_stays(method):
    before = seeds.rng_state(torch.device("cpu"))
    measured = estimate.measure(settings(method, eval_batch_size=4), [2, 4, 4], torch.device("cpu"))
    assert (measured.step is None) == (method == "simplecil") and (measured.batch, measured.images) == (8, 4)
    assert measured.seconds > 0 and measured.memory > 10**7 and (measured.step or 1) > 0
    after = seeds.rng_state(torch.device("cpu"))
    assert before.keys() == after.keys() and all(torch.equal(torch.as_tensor(v), torch.as_tensor(after[k]))
                                                 for k, v in before.items() if isinstance(v, torch.Tensor))  # fmt: skip
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    for _ in range(estimate.STEPS + 1):  # the hook is gone
        optimizer.step()
