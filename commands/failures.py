"""From an error to an exit code and one line that says what to do.

An error inside a method's file also shows its traceback: whoever writes a method needs the line."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.process import parallel
from utils.text import printable

PROJECT = Path(__file__).resolve().parents[1]

# Errors of the operating system that mean a wrong path; others, such as a full disk, are no fault of the input.
WRONG_PATH = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
WRONG_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
SAVED = "what is finished is saved, the same command goes on from there"
# What to do where the system has run out of something.
REMEDIES = {
    errno.ENOSPC: f"free space there or give another --out; {SAVED}",
    errno.EDQUOT: f"free space there or give another --out; {SAVED}",
    errno.EMFILE: f"lower num_workers or --jobs, or raise the limit (ulimit -n 4096); {SAVED}",
    errno.ENFILE: f"lower num_workers or --jobs, or close other programs; {SAVED}",
}
# What torch says where memory is full, for which it has no exception, and where processes have no room to share tensors.
NO_MEMORY = re.compile(
    r"DefaultCPUAllocator|not enough memory|out of memory|CUBLAS_STATUS_ALLOC_FAILED|Cannot allocate memory"
)
NO_SHARED_MEMORY = re.compile(r"shared memory|\(shm\)|received 0 items of ancdata|Too many open files")
MEMORY_KEYS = ("batch_size", "eval_batch_size", "detect_batch_size", "image_size")


@dataclass
class Outcome:
    """What the program ends with. `settings`: those of the experiment, once they are known; `debug`: show every traceback."""

    code: int = 0
    settings: Any = None
    debug: bool = False


@contextmanager
def as_exit_code() -> Iterator[Outcome]:
    """Within the block an error becomes the `code` of the Outcome that it yields, and one line on standard error."""
    outcome = Outcome()
    rank, ranks = parallel.torchrun_ranks()
    try:
        yield outcome
        sys.stdout.flush()
    except KeyboardInterrupt as notice:
        if rank == 0:
            what = f" after {notice}, which is saved" if str(notice) else ": what is finished is saved"
            print(f"\ninterrupted{what}, the same command goes on from there", file=sys.stderr)
        outcome.code = 75
    except BrokenPipeError:  # the reader has left, as in `main.py --list | head`: nothing more can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        outcome.code = 1
    except Exception as error:
        outcome.code, text = verdict(error, outcome.settings)
        if parallel.lost(error):
            outcome.code, text = 1, f"another process of the run has ended, see what it says; {SAVED}"
        elif outcome.debug or in_method(error):
            traceback.print_exception(error)
        if rank:  # most errors are those of all ranks: then rank 0 prints them, and torchrun ends the others meanwhile
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(2)
        print(f"{f'process {rank}: ' * (ranks > 1)}error: {text}", file=sys.stderr)


def in_method(error: BaseException) -> bool:
    """Whether the error is a fault in a method's file in models/: the last frame of the project is there, and the error
    is neither a message for users that the file raises itself (`raise ValueError(...)`) nor a lack of memory."""
    frames = traceback.extract_tb(error.__traceback__)
    project = [frame for frame in frames if _is_of_project(Path(frame.filename))]
    if not project or Path(project[-1].filename).parent != PROJECT / "models":
        return False
    for_users = isinstance(error, ValueError | OSError) and project[-1] is frames[-1]
    return not for_users and not _lacks_memory(error)


def _is_of_project(path: Path) -> bool:
    return path.is_relative_to(PROJECT) and "site-packages" not in path.parts


def verdict(error: Exception, settings: Any = None) -> tuple[int, str]:
    """Exit code and message for an error: 2 where the user can mend the input, else 1. `settings`: the run's, if known."""
    code, text = _judged(error, settings)
    return code, printable(text)


def _judged(error: Exception, settings: Any) -> tuple[int, str]:
    if isinstance(error, OSError) and error.errno != errno.ENOMEM:
        where = f"{error.filename}: " if error.filename and error.strerror else ""
        text = f"{where}{error.strerror}" if error.strerror else str(error)
        if error.errno == errno.EROFS:
            return 2, f"{text}; give an --out, or a data_root for downloads, where files may be written"
        if isinstance(error, WRONG_PATH) or error.errno in WRONG_NAME:
            return 2, text
        return 1, f"{text}; {REMEDIES.get(error.errno or 0, SAVED)}"
    if isinstance(error, ValueError):
        return 2, str(error)
    text = str(error)
    runtime = isinstance(error, RuntimeError | OSError)
    if runtime and NO_SHARED_MEMORY.search(text):
        return 1, f"the processes that decode images ran out of room ({_first(text)}); lower num_workers; {SAVED}"
    if _lacks_memory(error):
        return 1, _out_of_memory(text, settings)
    return 1, f"{type(error).__name__}: {_first(text)} (a fault of the program, not of your input; --debug shows where)"


def _lacks_memory(error: BaseException) -> bool:
    if isinstance(error, RuntimeError | OSError) and NO_MEMORY.search(str(error)):
        return True
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _first(text: str) -> str:
    return (text.splitlines() or [""])[0][:300]


def _out_of_memory(text: str, settings: Any) -> str:
    """Names the keys that lower memory with the run's present values, and how much was wanted where that is said."""
    wanted = re.search(r"allocate ([\d.]+ ?[A-Za-z]+)", text)
    present = {key: getattr(settings, key, None) for key in MEMORY_KEYS}
    keys = [
        f"{k} (now {v})" if v is not None else k for k, v in present.items() if settings is None or hasattr(settings, k)
    ]
    return (
        f"the memory is full{f' ({wanted[1]} were asked for)' if wanted else ''}: lower {', '.join(keys)}, or take a smaller "
        "backbone_type; eval_batch_size alone may be changed within a run, any other key begins a new one"
    )
