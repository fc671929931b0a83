"""A notice is remembered, told at the next safe moment, and the second one stops at once."""

import os
import signal

import pytest

import main
from tests.helpers.runs import assert_same_run, tiny_experiment
from tests.helpers.toy import toy_stream
from utils.data import batches as tasks
from utils.process import interrupt


@pytest.fixture(autouse=True)
def heard():
    """SIGINT is ignored in background jobs of a shell, and tests may be one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def notice(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", interrupt.NOTICES)
def test_a_notice_waits_for_the_next_check(number):
    before = signal.getsignal(number)
    with interrupt.handling():
        interrupt.raise_if_requested()
        notice(number)
        assert interrupt.stop_requested()
        with interrupt.defer():
            interrupt.raise_if_requested()  # who holds asks for himself
        with pytest.raises(interrupt.Interrupted):
            interrupt.raise_if_requested()
    assert signal.getsignal(number) is before and not interrupt.stop_requested()


def test_the_second_notice_stops_at_once():
    with interrupt.handling():
        notice(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt) as stopped:
            notice(signal.SIGINT)
        assert not isinstance(stopped.value, interrupt.Interrupted)


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupt.handling():
            notice(signal.SIGINT)
            assert not interrupt.stop_requested()
    finally:
        signal.signal(signal.SIGINT, before)


def test_every_pass_over_data_asks_once_a_batch():
    seen = []
    with interrupt.handling(), pytest.raises(interrupt.Interrupted):
        for images, *_ in toy_stream().task(0).train.batches(4):
            seen.append(len(images))
            if len(seen) == 2:
                notice()
    assert seen == [4, 4]


def test_a_forked_worker_leaves_the_decision_to_its_parent():
    with interrupt.handling():
        child = os.fork()
        if not child:
            notice(signal.SIGINT)
            os._exit(interrupt.stop_requested())
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("moment", ["training", "evaluation"])
def test_a_run_ends_with_75_after_the_step_and_goes_on_there(moment, tmp_path, monkeypatch, capsys):
    run = tiny_experiment("finetune", tmp_path, monkeypatch, epochs=3)
    assert main.main([*run, "--out", str(tmp_path / "whole")]) == 0
    batches, stop = tasks.TaskData.batches, {"training": 3, "evaluation": 4}[moment]
    calls = []

    def asked(self, *args, **how):
        calls.append(how)
        if len(calls) == stop:  # three epochs, then the pass over the test images
            notice()
        return batches(self, *args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(tasks.TaskData, "batches", asked)
        assert main.main([*run, "--out", str(tmp_path / "cut")]) == 75
    words = "interrupted after task 1, phase func, epoch 3, step 1, which is saved, the same command goes on from there"
    errors = capsys.readouterr().err
    assert (words in errors) == (moment == "training") and "Traceback" not in errors
    assert main.main([*run, "--out", str(tmp_path / "cut")]) == 0
    told = {"training": "resumed inside the task: task 1, phase func, epoch 3, step 1 is done",
            "evaluation": "resumed: tasks 1 to 1 are learned, the last is still to be evaluated"}  # fmt: skip
    assert told[moment] in capsys.readouterr().out
    assert_same_run(*(next((tmp_path / name).glob("*/*/seed_3")) for name in ("cut", "whole")))
