"""Where the runs of a sweep go (`--engine`): this machine, SLURM or Ray; and what a node of a cluster does with one run.

Every engine has `run(jobs, at_once, accuracy_of)` as utils/pool.py. A run is the same command in the same run folder on each,
so what is finished is skipped and what was interrupted goes on, whichever engine is asked next. A node says how its command
ended in a file beside the console's: both machines see it, and no word of a scheduler has to be trusted.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils import storage

ENGINES = {"local": "utils.pool", "slurm": "utils.engine_slurm", "ray": "utils.engine_ray"}
PACKAGES = {"slurm": "submitit", "ray": "ray"}
ROOT = Path(__file__).resolve().parent.parent
INTERRUPTED = 75
STOP = 60.0  # seconds a stopped run has for its checkpoint; it is killed then and goes on from an older one
LOOK = 0.1  # seconds between two looks at the process


def load(engine: str) -> Any:
    """The engine's module; nothing of the others is imported."""
    return importlib.import_module(ENGINES[engine])


def keys_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of an experiment that say what a run asks of a cluster."""
    return {k: v for k, v in values.items() if k.startswith(("slurm_", "ray_")) or k == "device"}


def missing(engine: str, keys: Mapping[str, Any]) -> str | None:
    """What this machine lacks for `engine`, with the way to get it."""
    package = PACKAGES.get(engine)
    if package and importlib.util.find_spec(package) is None:
        return f"--engine {engine} needs the package {package}: pip install -r requirements-{engine}.txt"
    if engine == "slurm" and keys["slurm_cluster"] == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
        return (
            "--engine slurm: no sbatch and srun here; start it on a login node of the cluster, or try it out on this machine "
            "with --set slurm_cluster=local"
        )
    return None


def remarks(engine: str, keys: Mapping[str, Any], at_once: int = 1) -> list[str]:
    """What a user may not expect of these keys with this engine."""
    found = []
    cluster = engine == "slurm" and keys["slurm_cluster"] == "slurm"
    if at_once > 1 and (cluster or engine == "ray"):
        rule = "slurm_array_parallelism bounds what SLURM" if cluster else "ray_cpus and ray_gpus bound what Ray"
        found.append(f"--jobs {at_once} has no effect with --engine {engine}: {rule} runs at a time")
    if cluster and not keys["slurm_gpus"] and keys["device"] != "cpu":
        found.append(
            "slurm_gpus is 0, so the jobs compute on CPU cores: slurm_gpus=1 asks for a GPU, device=cpu says it is meant"
        )
    return found


def exit_file(console: Path) -> Path:
    """Holds the exit code of the run whose output is in `console`; there once the run has ended for good."""
    return console.with_suffix(".exit")


class Errand:
    """One run on a node: its command as a process, which `stop` ends so that it can go on later. Pickled on its way."""

    before: tuple[str, ...] = ()  # words before the command

    def __init__(self, command: list[str], console: Path, threads: int | None = None):
        self.command, self.console, self.place = command, console.absolute(), str(Path.cwd())
        self.threads, self.again = threads, False
        self._process: subprocess.Popen[bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": None}

    def start(self) -> None:
        exit_file(self.console).unlink(missing_ok=True)
        self.console.parent.mkdir(parents=True, exist_ok=True)
        command = [*self.before, *self.command]
        if self.again and "--resume" in command:  # --resume never is for the first time alone
            command[command.index("--resume") + 1] = "auto"
        threads = {"OMP_NUM_THREADS": str(self.threads)} if self.threads else {}
        with self.console.open("ab" if self.again else "wb") as console:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env={**threads, **os.environ},
                cwd=self.place,
                start_new_session=True,
            )

    def code(self) -> int | None:
        """The exit code, None while the process runs.

        Not through Popen, whose lock would hang if a signal's handler came here while the code below it is in there."""
        process = self._process
        if process is None:
            return None
        if process.returncode is None:
            try:
                pid, status = os.waitpid(process.pid, os.WNOHANG)
                if pid:
                    process.returncode = os.waitstatus_to_exitcode(status)
            except ChildProcessError:  # a handler came just between these two lines
                process.returncode = INTERRUPTED
        return process.returncode

    def wait(self) -> int:
        while (code := self.code()) is None:
            time.sleep(LOOK)
        return code

    def stop(self) -> None:
        """Asks the process to save itself and end, and waits for that; `STOP` seconds at most, then it is killed."""
        process = self._process
        if process is None or self.code() is not None:
            return
        os.kill(process.pid, 15)
        until = time.monotonic() + STOP
        while self.code() is None and time.monotonic() < until:
            time.sleep(LOOK)
        if self.code() is None:
            os.kill(process.pid, 9)
            self.wait()

    def tell(self, code: int) -> None:
        """Says that the run has ended with `code`."""
        storage.write_bytes(exit_file(self.console), str(code).encode(), durable=False)


def told(console: Path) -> int | None:
    """The exit code that a node left for the run with this console."""
    try:
        return int(exit_file(console).read_text())
    except (OSError, ValueError):
        return None
