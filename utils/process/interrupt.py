"""SIGINT and SIGTERM as a request to stop: the step in progress is finished and saved first. A second one stops at once.

Only between `handling` and its end: elsewhere a notice acts as Python has it. Signals belong to the process, hence the
global state, which only this file and utils/process/stopwatch.py have.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from utils.process import parallel

NOTICES = (signal.SIGINT, signal.SIGTERM)
_requested = False  # a notice came
_deferred = 0  # depth of `defer` blocks


class Interrupted(KeyboardInterrupt):
    """A run stopped on request at a moment from which it goes on."""


@contextmanager
def handling() -> Iterator[None]:
    """Within the block the first notice is remembered, and raised at the next `raise_if_requested`; the second is
    raised at once."""
    global _requested
    owner, before = os.getpid(), {n: signal.getsignal(n) for n in NOTICES}

    def notice(number: int, frame: FrameType | None) -> None:
        global _requested
        if os.getpid() != owner:  # a worker that was forked: its parent decides
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if _requested:
            raise KeyboardInterrupt
        _requested = True

    _requested = False
    for n, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup, or a shell's background job: what is ignored stays so
            signal.signal(n, notice)
    try:
        yield
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
        _requested = False


@contextmanager
def defer() -> Iterator[None]:
    """Within the block `raise_if_requested` does nothing: who holds asks `stop_requested` himself, where his state can
    be saved."""
    global _deferred
    _deferred += 1
    try:
        yield
    finally:
        _deferred -= 1


def stop_requested_here() -> bool:
    """Whether a notice came to this process."""
    return _requested


def stop_requested() -> bool:
    """Whether a notice came; in a run of several processes to any of them, so all ask at the same moment."""
    return parallel.any_rank(_requested)


def raise_if_requested(together: bool = False) -> None:
    """Raises Interrupted if a notice came and nobody holds it back; every pass over data calls this once a batch.

    Several processes stop `together` or not at all, where all of them ask at the same moment: the others would wait in vain
    for one that leaves alone."""
    if not _deferred and (_requested if parallel.world() == 1 else together and parallel.any_rank(_requested)):
        raise Interrupted


def leave_to_parent(worker: int) -> None:
    """In a process that decodes images: torchrun sends its notice to these too, and the step in progress needs them."""
    for n in NOTICES:
        signal.signal(n, signal.SIG_IGN)
