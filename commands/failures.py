"""From an error to an exit code and one line that says what to do."""

from __future__ import annotations

import errno
import re
from typing import Any

from utils.text import printable

# Errors of the operating system that mean a wrong path was given; others, such as a full disk, are no fault of the input.
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


# How torch says that there is no memory, where it has no exception of its own for it, and no room between processes.
NO_MEMORY = re.compile(
    r"DefaultCPUAllocator|not enough memory|out of memory|CUBLAS_STATUS_ALLOC_FAILED|Cannot allocate memory"
)


NO_SHARED_MEMORY = re.compile(r"shared memory|\(shm\)|received 0 items of ancdata|Too many open files")


MEMORY_KEYS = ("batch_size", "eval_batch_size", "detect_batch_size", "image_size")


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
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (runtime and NO_MEMORY.search(text))
    ):
        return 1, _out_of_memory(text, settings)
    return 1, f"{type(error).__name__}: {_first(text)} (a fault of the program, not of your input; --debug shows where)"


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
