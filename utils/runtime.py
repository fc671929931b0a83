"""What a run needs around the mathematics: named seeds, device choice, facts about the machine, log files and bars."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind; the run folder is then unguarded
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn", "pydantic", "safetensors", "matplotlib")
# terminal sequences (colours, cursor moves, window titles) and every other control character but tab and newline
CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-_]|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)


class SetupError(ValueError):
    """The installation is broken; the message is two lines: what is wrong, and the command that mends it."""


# ------------------------------------------------------------------------------------------------ seeds


def named_seed(*parts: Any) -> int:
    """63-bit seed that depends on `parts` only: the same on every machine, Python and numpy version.

    Parts are None, bool, int, float, str, bytes or tuples/lists of them; numpy scalars count as the Python number they
    hold. Anything else raises TypeError, because its `repr` need not be stable (it may contain an address).
    """
    # ascii(), not repr(): which characters repr() escapes changes with Python's Unicode tables
    digest = hashlib.blake2b(ascii(tuple(_stable(p) for p in parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _stable(part: Any) -> Any:
    if type(part) in (type(None), bool, int, float, str, bytes):
        return part
    if isinstance(part, (tuple, list)):
        return tuple(_stable(p) for p in part)
    if getattr(part, "shape", None) == () and hasattr(part, "item"):
        return _stable(part.item())  # numpy 1 and 2 print their scalars differently
    raise TypeError(f"named_seed takes numbers, text, None and tuples of them, not {type(part).__name__}")


def named_generator(*parts: Any) -> torch.Generator:
    """CPU generator seeded with `named_seed(*parts)`."""
    import torch

    return torch.Generator().manual_seed(named_seed(*parts))


def seed_everything(*parts: Any) -> int:
    """Seed python, numpy and torch (all its devices) from `parts`, each with a stream of its own; returns torch's."""
    import numpy as np
    import torch

    seed = named_seed(*parts, "torch")
    random.seed(named_seed(*parts, "python"))
    np.random.seed(named_seed(*parts, "numpy") % 2**32)
    torch.manual_seed(seed)  # seeds CUDA as well, lazily where it is not initialised yet
    return seed


# ------------------------------------------------------------------------------------------------ the machine


def pick_device(name: str = "auto") -> tuple[torch.device, str | None]:
    """Device for `auto`, `cpu`, `cuda` or `cuda:N`, and one warning (or None) where it is not the one asked for.

    A configuration written for a GPU machine still runs where there is none. Any other name raises ValueError.
    """
    import torch

    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError(f"device '{name}' is unknown: give auto, cpu, cuda or cuda:N (N counts from 0)")
    if name == "cpu":
        return torch.device("cpu"), None
    if not torch.cuda.is_available():
        why = "torch is a CPU-only build" if torch.version.cuda is None else "torch finds no CUDA GPU here"
        return torch.device("cpu"), None if name == "auto" else f"device '{name}' asked for, but {why}: using the CPU"
    index, count = int(name.partition(":")[2] or 0), torch.cuda.device_count()
    if index >= count:
        return torch.device("cuda:0"), f"device '{name}' asked for, but there are {count} GPUs here: using cuda:0"
    return torch.device(f"cuda:{index}"), None


def check_torchvision() -> None:
    """Raise SetupError (two lines, with the fix) where torchvision is missing or built for another torch.

    The usual cause is a CPU-only torch beside a CUDA torchvision: torch then lacks the operators that torchvision's
    import registers, which shows as `RuntimeError: operator torchvision::nms does not exist`.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        missing = (error.name or "torchvision").partition(".")[0]
        raise SetupError(f"{missing} is not installed.\nFix: pip install -r requirements.txt") from error
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        cuda = _torch_cuda()
        ours = "CPU-only" if cuda is None else f"CUDA {cuda}"
        raise SetupError(
            f"torchvision cannot be imported beside this torch ({_version('torch')}, {ours}; torchvision"
            f" {_version('torchvision')}): they are different builds ({reason}).\n"
            "Fix: pip uninstall -y torch torchvision && pip install torch torchvision"
        ) from error


def _torch_cuda() -> str | None:
    import torch

    return torch.version.cuda


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def command_line() -> str:
    """The command that started this process, quoted for a shell."""
    return shlex.join(["python", *sys.argv])


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Facts for environment.json: versions, commit, device, threads, platform, command, time (UTC).

    Holds no user name, host name or home folder, except what the command line itself contains.
    """
    import torch

    gpu = device is not None and device.type == "cuda"
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "git": _git(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": str(device or "cpu"),
        "device_name": torch.cuda.get_device_name(device) if gpu else _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _git() -> dict[str, Any] | None:
    """Commit of this program and whether tracked files differ from it; None outside a repository of its own."""

    def ask(*words: str) -> str:
        # GIT_OPTIONAL_LOCKS=0: `git status` must not write to the index beside a user's own git command
        return subprocess.run(
            ["git", "-C", str(ROOT), *words],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        ).stdout.strip()

    try:
        if Path(ask("rev-parse", "--show-toplevel")).resolve() != ROOT:  # unpacked inside somebody else's repository
            return None
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Largest memory so far in bytes: torch's allocations on a GPU, the process's resident set on the CPU.

    The CPU figure never falls within a process, so a later seed reports at least the earlier ones'; 0 means unknown
    (Windows has no such record in the standard library).
    """
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


# ------------------------------------------------------------------------------------------------ strict JSON


def plain(value: Any, where: str = "") -> Any:
    """`value` as strict JSON data: numpy and torch numbers and arrays become Python's, paths text, tuples lists.

    NaN and infinity raise ValueError, other types TypeError; both name the field, as in `seconds.train` or `scores[2]`.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"field '{where}' is {float(value)}, not a finite number (did the training diverge?)")
        return float(value)
    if isinstance(value, Mapping):
        if bad := [key for key in value if not isinstance(key, (str, int)) or isinstance(key, bool)]:
            raise TypeError(f"field '{where}': key {bad[0]!r} is neither text nor a whole number")
        return {str(key): plain(item, f"{where}.{key}" if where else str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist") and hasattr(value, "shape"):  # numpy scalar or array, torch tensor
        return plain(value.tolist(), where)
    raise TypeError(f"field '{where}': {type(value).__name__} cannot be written as JSON")


# ------------------------------------------------------------------------------------------------ log files and bars


def _say(text: str, stream: TextIO) -> None:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    text = text.encode(encoding, "replace").decode(encoding)  # a console without UTF-8 gets '?', not a crash
    tqdm.write(text, file=stream)  # lifts live bars out of the way; without bars a plain write
    stream.flush()


class RunLog:
    """`run.log` (time-stamped text, no control codes) and `metrics.jsonl` (a JSON object a line) of one run folder.

    Opening an existing folder appends; a half-written last row of a killed run is dropped. Each RunLog owns its files
    and locks them (where the system can): a second writer raises ValueError, so no two runs ever share a log.
    `rows` counts the complete lines of metrics.jsonl. Python's `logging` is not used, hence no global state.
    """

    def __init__(self, folder: Path, console: bool = True):
        self.folder, self.console = Path(folder), console
        self.folder.mkdir(parents=True, exist_ok=True)
        self._text = open(self.folder / "run.log", "a", encoding="utf-8")  # noqa: SIM115  closed by close()
        try:
            _lock(self._text, self.folder)
            # created if missing, and opened for reading too, since rows are counted and can be cut back
            self._table = open(self.folder / "metrics.jsonl", "a+b")  # noqa: SIM115
        except (OSError, ValueError):
            self._text.close()
            raise
        self.rows, self._offset, self._start = 0, 0.0, time.monotonic()
        self.truncate_rows(None)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:  # the console gets one line, the log says where it happened
            self._write("STOP ", "".join(traceback.format_exception(error)).rstrip())
        self.close()

    def close(self) -> None:
        """Close both files; harmless when repeated."""
        self._text.close()
        self._table.close()

    @property
    def seconds(self) -> float:
        """Running time in seconds: since the start, or since the last row's time in a resumed run."""
        return self._offset + time.monotonic() - self._start

    def info(self, text: str) -> None:
        """To run.log and, if `console`, standard output."""
        self._write("INFO ", text)
        if self.console:
            _say(text, sys.stdout)

    def warn(self, text: str) -> None:
        """To run.log and, if `console`, standard error."""
        self._write("WARN ", text)
        if self.console:
            _say(f"warning: {text}", sys.stderr)

    def _write(self, level: str, text: str) -> None:
        stamp = f"{datetime.now().isoformat(sep=' ', timespec='seconds')} {level} "
        first, *rest = CONTROL.sub("", text).split("\n")
        self._text.write("\n".join([stamp + first, *(" " * len(stamp) + line for line in rest)]) + "\n")
        self._text.flush()

    def row(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Append one line to metrics.jsonl: `kind`, `time` (seconds of running time) and `fields`; returns it.

        Numpy and torch numbers are converted; NaN or infinity raises ValueError naming kind and field, and nothing is
        written. The line is flushed, so it survives a killed process.
        """
        if "time" in fields:
            raise ValueError(f"metrics row '{kind}': the field 'time' is set by the log itself")
        try:
            values = plain(fields, "")
        except (TypeError, ValueError) as error:
            raise type(error)(f"metrics row '{kind}': {error}") from error
        line = {"kind": kind, "time": round(self.seconds, 3), **values}
        self._table.write(json.dumps(line, allow_nan=False, ensure_ascii=False).encode() + b"\n")
        self._table.flush()
        self.rows += 1
        return line

    def sync(self) -> None:
        """Bring metrics.jsonl to the disk, so that it survives a power cut; a checkpoint counts its rows after this."""
        self._table.flush()
        os.fsync(self._table.fileno())

    def truncate_rows(self, count: int | None) -> None:
        """Cut metrics.jsonl back to its first `count` rows (None: to its complete rows); ValueError if it has fewer."""
        self._table.flush()
        self._table.seek(0)
        lines = [line for line in self._table.read().splitlines(keepends=True) if line.endswith(b"\n")]
        if count is not None and not 0 <= count <= len(lines):
            path = self.folder / "metrics.jsonl"
            raise ValueError(f"{path} has {len(lines)} rows, but {count} are to be kept: the file was changed by hand?")
        lines = lines[:count]
        self._table.truncate(sum(map(len, lines)))
        self._table.seek(0, os.SEEK_END)
        self.rows, self._start = len(lines), time.monotonic()
        self._offset = float(json.loads(lines[-1]).get("time", 0.0)) if lines else 0.0

    def bar(self, total: int, text: str, level: int = 0, every: float = 5.0, done: int = 0) -> Bar:
        """Progress over `total` steps: level 0 for tasks within a run, 1 for epochs within a task, and so on.

        `done` steps were finished by an earlier process (a resumed run) and do not count for the time left.

        On a terminal a tqdm bar with the time left; elsewhere plain lines on standard error: the first step, the last,
        and between them at most one in `every` seconds. Nothing goes to the log files.
        """
        return Bar(total, text, level, every, self.console, done)


def _lock(file: TextIO, folder: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{folder} is being written by another run: wait for it, or give another --out") from error
    except OSError:
        pass  # file systems without locks (some network ones): the guard is a courtesy, not a condition


class Bar:
    """Progress of one loop: `with log.bar(5, "tasks") as bar: bar.update(1, loss=.2)`, or `for i in log.bar(5, "")`."""

    def __init__(self, total: int, text: str, level: int, every: float, console: bool, done: int):
        self.total, self.text, self.level, self.every = total, text, level, every
        self.done, self._first, self._start, self._last = done, done, time.monotonic(), -math.inf
        self._lines = console and not sys.stderr.isatty()
        self._tqdm = None
        if console and not self._lines:
            # a terminal that reports no width (a container's) would get empty bars: take 80 by 20 there
            sized = shutil.get_terminal_size((0, 0)).columns > 0
            self._tqdm = tqdm(
                total=total,
                initial=done,
                desc=text,
                position=level,
                leave=False,
                dynamic_ncols=sized,
                ncols=None if sized else 80,
                nrows=None if sized else 20,
                miniters=1,
                file=sys.stderr,
            )

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[int]:
        """Yield the steps left, from `done` to total-1, and count one after each."""
        with self:
            for i in range(self._first, self.total):
                yield i
                self.update(1)

    def update(self, n: int = 1, **postfix: object) -> None:
        """`n` more steps are done; `postfix` is shown behind them (floats with four digits)."""
        self.done += n
        shown = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in postfix.items()}
        if self._tqdm is not None:
            self._tqdm.set_postfix(shown, refresh=False)
            self._tqdm.update(n)
        elif self._lines:
            now = time.monotonic()
            if n > 0 and (self.done >= self.total or now - self._last >= self.every):
                self._last = now
                _say(self._line(now - self._start, shown), sys.stderr)

    def _line(self, elapsed: float, shown: dict[str, str]) -> str:
        left = elapsed / max(self.done - self._first, 1) * max(self.total - self.done, 0)
        time_text = f"{clock(elapsed)} left {clock(left)}" if self.done < self.total else f"took {clock(elapsed)}"
        tail = "".join(f" {key}={value}" for key, value in shown.items())
        return f"{'  ' * self.level}{self.text} {self.done}/{self.total}, {time_text}{tail}"

    def close(self) -> None:
        """Remove the bar from the terminal; harmless when repeated."""
        if self._tqdm is not None:
            self._tqdm.close()


def clock(seconds: float) -> str:
    """Duration as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
