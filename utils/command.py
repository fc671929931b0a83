"""The command line: its options, and what it says apart from a run's log: `--list`, `--check`, one line for an error."""

from __future__ import annotations

import argparse
import errno
import io
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import shorten, wrap
from typing import Any

from utils.data import DATASETS
from utils.strict_json import printable, read_json

WIDTH = 100
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
EXAMPLES = """five commands to start with:
  python main.py --config exps/quickstart.json
  python main.py --config exps/sema_glyphs.json --check
  python main.py --config exps/quickstart.json --set exp_threshold=1 --set seed=[1,2,3]
  python main.py --config exps/sema_cifar.json --data-root ~/data --device cuda
  python main.py --list"""


def parser(about: str) -> argparse.ArgumentParser:
    """Options of main.py; `about` opens the help."""
    ask = argparse.ArgumentParser(
        prog="main.py", description=about, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ask.add_argument("--config", type=Path, metavar="FILE", help="experiment JSON")
    ask.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key (JSON value, else string)"
    )
    ask.add_argument(
        "--out", type=Path, default=Path("logs"), metavar="DIR", help="where run folders go (default: logs)"
    )
    ask.add_argument("--data-root", metavar="DIR", help="folder that holds the data sets (overrides the key data_root)")
    ask.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N (overrides the key device)")
    ask.add_argument("--check", action="store_true", help="validate, show settings, tasks and parameters, and stop")
    ask.add_argument(
        "--resume", choices=("auto", "never"), default="auto", help="never: start afresh, old folders are kept"
    )
    ask.add_argument(
        "--jobs",
        type=_positive,
        default=1,
        metavar="N",
        help="runs at a time, for a sweep or several seeds (default: 1)",
    )
    ask.add_argument(
        "--engine",
        choices=("local", "slurm", "ray"),
        default="local",
        help="where the runs of a sweep go: this machine, or a cluster as the keys slurm_* and ray_* say",
    )
    ask.add_argument(
        "--evaluate",
        type=Path,
        metavar="RUN",
        help="score a saved run's model again on every task it learned, and compare",
    )
    ask.add_argument(
        "--export",
        type=Path,
        metavar="RUN",
        help="write a saved run's adapted model as RUN/export/model.safetensors and config.json",
    )
    ask.add_argument("--explain", type=Path, metavar="RUN", help="say in plain sentences what happened in a run")
    ask.add_argument(
        "--verify", type=Path, metavar="RUN", help="compare a run of a shipped experiment with its expected numbers"
    )
    ask.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="finished runs side by side: a table and a page (--out FILE.html, default: compare.html in --out's folder). RUN: "
        "a seed's folder, or any folder with runs below it",
    )
    ask.add_argument("--list", action="store_true", help="show methods, data sets, backbones and experiment files")
    ask.add_argument(
        "--profile",
        action="store_true",
        help="measure where the time of each task goes: a table, a picture, no other number",
    )
    ask.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return ask


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is expected, got {text!r}")
    return int(text)


def speak_any_encoding() -> None:
    """Text that the terminal's encoding lacks is printed as escapes instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


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


def listing(experiments: Path, methods: Mapping[str, str], backbones: Sequence[str]) -> str:
    """Methods, data sets, backbones and the shipped experiments with the start of their `about`."""
    lines = ["methods", *(_entry(name, 14, text) for name, text in methods.items()), "", "data sets"]
    lines += [_entry(i.name, 14, f"{i.num_classes or '?':>4} classes  {i.source}") for i in DATASETS.values()]
    plain = [name for name in backbones if "." not in name]
    lines += ["", f"backbones (timm's also as name.tag, {len(backbones)} in all)"]
    lines += wrap(", ".join(plain), WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    lines += ["", "experiments"]
    for path in sorted(experiments.glob("*.json")):
        try:
            about = str(read_json(path)[0].get("about", ""))
        except ValueError as error:
            about = str(error)
        lines.append(_entry(f"{path.parent.name}/{path.name}", 42, about))
    return "\n".join(lines)


def _entry(name: str, width: int, text: str) -> str:
    return f"  {name:<{width}}{text if '  ' in text else shorten(text, WIDTH - width - 2, placeholder=' ...')}"


def settings_table(values: Mapping[str, Any], given: Iterable[str], descriptions: Mapping[str, str]) -> str:
    """Every key with its value and, below, its meaning; keys that are not in the file are marked as defaults."""
    stated = set(given)
    lines, width = ["settings"], max([24, *map(len, values)]) + 2
    for key, value in values.items():
        text = json.dumps(value, ensure_ascii=False)
        text = text if len(text) <= 62 or key != "about" else f'{text[:57]} ..."'
        lines.append(f"  {key:<{width}}{text}{'' if key in stated else '   (default)'}")
        lines += wrap(descriptions.get(key, ""), WIDTH, initial_indent=" " * 30, subsequent_indent=" " * 30)
    return "\n".join(lines)


def split_table(sizes: Sequence[int], order: Sequence[int], source: str) -> str:
    """Classes of each task in order of arrival, which `source` says; a last task of another size is pointed out."""
    lines = [f"tasks ({len(order)} classes in {len(sizes)} tasks, {source})"]
    first = 0
    for task, size in enumerate(sizes, start=1):
        ids = " ".join(str(c) for c in order[first : first + size])
        ragged = "  (the rest)" if task == len(sizes) > 2 and size != sizes[1] else ""
        lines.append(f"  {task:>3}: {size:>3} classes{ragged}  {shorten(ids, 72, placeholder=' ...')}")
        first += size
    return "\n".join(lines)


def cell_table(cells: Sequence[tuple[str, str, int | None]], seeds: int) -> str:
    """The cells of a sweep as (label, settings hash, parameters trained in the first task where known), and their count."""
    lines = [f"cell  {'settings':<12}  {'trainable':>12}"]
    for number, (label, run, count) in enumerate(cells, start=1):
        lines.append(f"{number:>4}  {run:<12}  {'-' if count is None else format(count, ','):>12}  {label}")
    each = f"{seeds} seed{'s' * (seeds != 1)}"
    return "\n".join([*lines, f"{len(cells)} cells of {each}: {len(cells) * seeds} runs"])


def parameter_table(planned: Sequence[tuple[str, int]], total: int) -> str:
    """Trainable parameters by occasion, and all parameters at the start."""
    lines = [
        "trainable parameters",
        *(f"  {count:>12,}  {what}" for what, count in planned or [("nothing is trained", 0)]),
    ]
    return "\n".join([*lines, f"  {total:>12,}  all parameters at the start, the frozen backbone included"])
