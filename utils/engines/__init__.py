"""Where the runs of a sweep go (`--engine`): this machine, SLURM or Ray; and what a node of a cluster does with one run.

Every engine has `run(jobs, at_once, accuracy_of)` as utils/engines/local.py. A run is the same command in the same run
folder on each, so the next call skips what is finished and continues what was interrupted, whichever engine it names. A
node writes the exit code of its command into a file beside the console's: both machines see it, and no state that a
scheduler reports has to be trusted.

May import utils.config, utils.files and utils.text; never the report, backbone, models or commands.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Mapping
from typing import Any

ENGINES = {"local": "utils.engines.local", "slurm": "utils.engines.slurm", "ray": "utils.engines.ray"}
PACKAGES = {"slurm": "submitit", "ray": "ray"}


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
