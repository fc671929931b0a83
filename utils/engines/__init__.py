"""Where the runs of a sweep go (`--engine`): this machine, SLURM or Ray; and what a node of a cluster does with one run.

Every engine is a module with `run(jobs, at_once, accuracy_of)`, as in utils/engines/local.py. All engines start the same
command in the same run folder, so a later sweep skips finished runs and continues interrupted ones, on any engine. A node
writes the exit code of its command into a file beside the console file. Both machines see that file, so the program does
not depend on the states a scheduler reports.

May import utils.config, utils.files, utils.process and utils.text; never the report, backbone, models or commands.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Mapping
from typing import Any

ENGINES = ("local", "slurm", "ray")  # modules of this package
PACKAGES = {"slurm": "submitit", "ray": "ray"}


def load(engine: str) -> Any:
    """The engine's module; the other engines are not imported."""
    return importlib.import_module(f"{__name__}.{engine}")


def keys_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of an experiment that a cluster needs to place a run."""
    return {k: v for k, v in values.items() if k.startswith(("slurm_", "ray_")) or k == "device"}


def missing(engine: str, keys: Mapping[str, Any]) -> str | None:
    """What this machine lacks for `engine` and how to get it; None if it lacks nothing."""
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
    """Notes for the user on keys that have no or a surprising effect with this engine."""
    notes = []
    cluster = engine == "slurm" and keys["slurm_cluster"] == "slurm"
    if at_once > 1 and (cluster or engine == "ray"):
        rule = "slurm_array_parallelism bounds what SLURM" if cluster else "ray_cpus and ray_gpus bound what Ray"
        notes.append(f"--jobs {at_once} has no effect with --engine {engine}: {rule} runs at a time")
    if cluster and not keys["slurm_gpus"] and keys["device"] != "cpu":
        notes.append(
            "slurm_gpus is 0, so the jobs compute on CPU cores: slurm_gpus=1 asks for a GPU, device=cpu says it is meant"
        )
    return notes
