"""SIGINT and SIGTERM as a request to stop: the step in progress is finished and saved first. A second one stops at once.

Only between `listening` and its end: elsewhere a notice acts as Python has it. Signals belong to the process, hence the
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
_asked = False  # a notice came
_held = 0  # depth of `held` blocks


class Interrupted(KeyboardInterrupt):
    """A run stopped on request at a moment from which it goes on."""


@contextmanager
def listening() -> Iterator[None]:
    """Within the block the first notice is remembered, and raised at the next `check`; the second is raised at once."""
    global _asked
    owner, before = os.getpid(), {n: signal.getsignal(n) for n in NOTICES}

    def notice(number: int, frame: FrameType | None) -> None:
        global _asked
        if os.getpid() != owner:  # a worker that was forked: its parent decides
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if _asked:
            raise KeyboardInterrupt
        _asked = True

    _asked = False
    for n, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup, or a shell's background job: what is ignored stays so
            signal.signal(n, notice)
    try:
        yield
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
        _asked = False


@contextmanager
def held() -> Iterator[None]:
    """Within the block `check` does nothing: who holds asks `asked` himself, where his state can be saved."""
    global _held
    _held += 1
    try:
        yield
    finally:
        _held -= 1


def heard() -> bool:
    """Whether a notice came to this process."""
    return _asked


def asked() -> bool:
    """Whether a notice came; in a run of several processes to any of them, so all ask at the same moment."""
    return parallel.agree(_asked)


def check(together: bool = False) -> None:
    """Raises Interrupted if a notice came and nobody holds it back; every pass over data calls this once a batch.

    Several processes stop `together` or not at all, where all of them ask at the same moment: the others would wait in vain
    for one that leaves alone."""
    if not _held and (_asked if parallel.world() == 1 else together and parallel.agree(_asked)):
        raise Interrupted


def leave_to_parent(worker: int) -> None:
    """In a process that decodes images: torchrun sends its notice to these too, and the step in progress needs them."""
    for n in NOTICES:
        signal.signal(n, signal.SIG_IGN)
