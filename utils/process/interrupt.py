"""SIGINT and SIGTERM as a request to stop: the step in progress is finished and saved first. A second signal stops at once.

This holds inside a `handling` block; elsewhere the signals have Python's usual effect. Signals belong to the process, hence
the global state here.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from utils.process import parallel

NOTICES = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 10.0
_raised = -math.inf  # when `raise_once` last raised
_requested = False  # whether a signal arrived
_deferred = 0  # how many `defer` blocks enclose this moment


class Interrupted(KeyboardInterrupt):
    """The run stopped on request, in a state from which the same command resumes it."""


def raise_once(number: int, frame: FrameType | None) -> None:
    """A handler that raises KeyboardInterrupt, and for `PATIENCE` seconds lets further signals pass: who holds Ctrl-C down must
    not interrupt the saving and the message that the first one began."""
    global _raised
    if time.monotonic() - _raised > PATIENCE:
        _raised = time.monotonic()
        raise KeyboardInterrupt


@contextmanager
def handling() -> Iterator[None]:
    """Inside the block the first signal is remembered until the next `raise_if_requested`; a second one raises
    KeyboardInterrupt at once."""
    global _requested
    process, before = os.getpid(), {n: signal.getsignal(n) for n in NOTICES}

    def notice(number: int, frame: FrameType | None) -> None:
        global _requested
        if os.getpid() != process:  # a forked worker process: its parent decides
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if _requested:
            raise_once(number, frame)
        _requested = True

    _requested = False
    for n, handler in before.items():
        if handler is not signal.SIG_IGN:  # a signal that nohup or a shell's background job ignores stays ignored
            signal.signal(n, notice)
    try:
        yield
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
        _requested = False


@contextmanager
def defer() -> Iterator[None]:
    """Inside the block `raise_if_requested` is a no-op; the caller polls `stop_requested` where it can save."""
    global _deferred
    _deferred += 1
    try:
        yield
    finally:
        _deferred -= 1


def stop_requested_here() -> bool:
    """Whether this process received a signal."""
    return _requested


def stop_requested() -> bool:
    """Whether any process of the run received a signal. Every rank must call this at the same point of the program."""
    return parallel.any_rank(_requested)


def raise_if_requested(together: bool = False) -> None:
    """Raises Interrupted if a signal arrived and no `defer` block is open. Every pass over data calls this once a batch.

    With several processes it raises only if `together` is true, which promises that every rank calls it at this point: a
    rank that stopped alone would leave the others waiting for it."""
    if not _deferred and (_requested if parallel.world() == 1 else together and parallel.any_rank(_requested)):
        raise Interrupted


def leave_to_parent(worker: int) -> None:
    """`worker_init_fn` of processes that decode images: they ignore the signals, which torchrun sends to them as well,
    because the step in progress still needs their batches."""
    for n in NOTICES:
        signal.signal(n, signal.SIG_IGN)
