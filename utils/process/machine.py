"""The machine a run uses: choice of device, a check of the installation, facts for environment.json, peak memory."""

from __future__ import annotations

import importlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from utils.process import sources
from utils.text import counted, shell

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn", "pydantic", "safetensors", "matplotlib")


class SetupError(ValueError):
    """The installation is broken. The message has two lines: what is wrong, and the command that repairs it."""


def cores() -> int:
    """The number of CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def flush_denormals() -> None:
    """Makes the CPU treat numbers below 1e-38 as 0. It computes with them up to a hundred times slower, and once a loss
    reaches 1e-6, gradients and momentum are full of them. Call this first: threads inherit it from the one that starts them."""
    import torch

    torch.set_flush_denormal(True)


def use_one_thread() -> None:
    """Computes in one thread, unless OMP_NUM_THREADS is set: on small models a second one costs more than it brings."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def free_memory() -> int | None:
    """Bytes of memory that programs may still take, None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return None


def missing_device(name: str) -> str | None:
    """Why this machine cannot compute on the device `name`, None if it can."""
    import torch

    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        return f"device '{name}' is unknown: give auto, cpu, cuda or cuda:N (N counts from 0)"
    if name in ("auto", "cpu"):
        return None
    remedy = "auto takes the CPU where there is no GPU, cpu asks for it"
    if not torch.cuda.is_available():
        why = "torch is a CPU-only build" if torch.version.cuda is None else "torch sees no CUDA GPU here"
        return f"device '{name}' was asked for, but {why}; {remedy}"
    count = torch.cuda.device_count()
    if int(name.partition(":")[2] or 0) >= count:
        return (
            f"device '{name}' was asked for, but this machine has {counted(count, 'GPU')}: the last is cuda:{count - 1}"
        )
    return None


def pick_device(name: str = "auto") -> torch.device:
    """The device for `auto` (the first GPU, else the CPU), `cpu`, `cuda` or `cuda:N`. Raises ValueError if it is not here."""
    import torch

    if fault := missing_device(name):
        raise ValueError(fault)
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device(f"cuda:{int(name.partition(':')[2] or 0)}")


@contextmanager
def _compiler_later() -> Iterator[None]:
    """Inside the block an import of torchvision does not import torch's compiler, which takes as long as torch itself.

    One operator of torchvision imports one function of the compiler. A substitute for it imports the compiler when called."""
    import torch  # before the substitutes exist: torch itself needs a few names of the compiler

    names = ("torch._dynamo", "torch._dynamo.utils")
    if torch and any(name in sys.modules for name in names):
        yield
        return
    package, module = substitutes = [ModuleType(name) for name in names]

    def is_compile_supported(device_type: Any) -> Any:
        return importlib.import_module(names[1]).is_compile_supported(device_type)

    vars(package)["utils"] = module
    vars(module)["is_compile_supported"] = is_compile_supported
    sys.modules.update(zip(names, substitutes, strict=True))
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def check_torchvision() -> None:
    """Raises SetupError (two lines, with the fix) if torchvision is missing or was built for another torch.

    The usual cause is a CPU-only torch beside a CUDA torchvision: torch then lacks the operators that torchvision's
    import registers, which shows as `RuntimeError: operator torchvision::nms does not exist`.
    """
    with suppress(Exception), _compiler_later():  # if this fails, the plain import below says why
        importlib.import_module("torchvision")
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        missing = (error.name or "torchvision").partition(".")[0]
        raise SetupError(f"{missing} is not installed.\nFix: pip install -r requirements.txt") from error
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        cuda = _torch_cuda()
        build = "CPU-only" if cuda is None else f"CUDA {cuda}"
        raise SetupError(
            f"torchvision cannot be imported beside this torch ({_version('torch')}, {build}; torchvision"
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


def versions(names: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """The version of each package, None where it is not installed."""
    return {name: _version(name) for name in names}


def python_version() -> str:
    return platform.python_version()


def command_line() -> str:
    """The command that started this process, quoted for a shell."""
    return shell(["python", *sys.argv])


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """The content of environment.json: versions, commit, device, threads, platform, command, time (UTC).

    It contains no user name, host name or home folder, except what stands in the command line.
    """
    import torch

    gpu = device is not None and device.type == "cuda"
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(),
        "python": python_version(),
        "versions": versions(),
        "cuda": torch.version.cuda,
        "git": _git(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": str(device or "cpu"),
        "device_name": torch.cuda.get_device_name(device) if gpu else _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _git() -> dict[str, Any] | None:
    """Commit of this program, whether its files differ from it, and those of its Python files and the experiment file that
    git does not track; None if it is not in a git repository."""
    try:
        top = os.fsdecode(sources.git("rev-parse", "--show-toplevel", root=ROOT).strip())
        if Path(top).resolve() != ROOT:  # unpacked inside another repository
            return None
        commit = sources.git("rev-parse", "HEAD", root=ROOT).decode().strip()
        changed, untracked = sources.uncommitted(ROOT, _named_files())
        return {"commit": commit, "dirty": bool(changed or untracked), "untracked": untracked}
    except (OSError, subprocess.SubprocessError):
        return None


def _named_files() -> list[str]:
    """Arguments of the command line that are files below the program's folder, such as an experiment file; without the cell
    of a sweep, which the program has written from one (OUT/NAME/sweep_HASH/cells/N/NAME.json)."""
    paths = [Path(argument) for argument in sys.argv[1:] if argument.endswith(".json")]
    paths = [path for path in paths if not path.match("sweep_*/cells/*/*.json")]
    return [
        path.resolve().relative_to(ROOT).as_posix()
        for path in paths
        if path.is_file() and path.resolve().is_relative_to(ROOT)
    ]


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def cpu_seconds() -> float:
    """Seconds that CPU cores have worked for this process so far: all its threads, and loader processes that have ended."""
    return sum(os.times()[:4])


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Largest memory so far in bytes: torch's allocations on a GPU, the process's resident set on the CPU.

    The CPU figure never falls within a process, so a later seed reports at least the figure of an earlier one. 0 means
    unknown (Windows has no such record in the standard library).
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
