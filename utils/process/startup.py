"""The first and the last moments of the program's process: threads, garbage collector, terminal, and how it ends."""

from __future__ import annotations

import gc
import io
import os
import signal
import sys

from utils.process import interrupt, parallel


def prepare() -> None:
    """Settings of the process that must come before torch is imported. Of several ranks, rank 0 alone prints."""
    _open_closed_streams()
    # OpenMP threads that spin while they wait make small models up to 20 times slower once the cores are shared. torch
    # reads these variables when it is imported, which happens later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    gc.set_threshold(50_000, 20, 20)  # collecting as often as Python does by default takes a tenth of the start-up time
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that the terminal's encoding lacks are printed as escapes
            stream.reconfigure(errors="backslashreplace")
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _open_closed_streams() -> None:
    """Puts os.devnull where standard input, output or error is closed (`>&-`): a file of the run would take its number, and
    what torch prints there would be written into it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the system gives it the lowest free number, this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+" if number == 0 else "w"))  # noqa: SIM115


def is_first() -> bool:
    """Whether this process is rank 0 of those that torchrun started, or the only one; known before the ranks are connected."""
    return parallel.torchrun_ranks()[0] == 0


def leave(code: int) -> None:
    """Ends the process with this exit code. Where other ranks may still wait for it, it ends without any clean-up."""
    if parallel.world() > 1 and code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    for notice in interrupt.NOTICES:  # what is left to do cannot be interrupted
        signal.signal(notice, signal.SIG_IGN)
    gc.freeze()  # otherwise Python ends by searching all that torch has loaded for cycles: a fifth of the time of --check
    sys.exit(code)
