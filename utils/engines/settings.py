"""What an experiment file may say about the cluster that `--engine slurm` or `--engine ray` sends its runs to.

These keys stand in the file beside the method's keys. They decide where a run happens, not what it computes, so they are
neither in its hash nor in its config.json. A file that is used with `--engine slurm` is code: `slurm_setup` are lines of shell.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator


def _one_line(text: str) -> str:
    """Lines of a job's script come from these keys: a line break would begin another one, which the shell runs."""
    if not text.replace("\t", " ").isprintable():
        raise ValueError("one line of printable text is expected, without line breaks")
    return text


def _option(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
        raise ValueError("the name of an option of sbatch is expected, such as constraint")
    return name


Line = Annotated[str, AfterValidator(_one_line)]
Option = Annotated[str, AfterValidator(_option)]


class Cluster(BaseModel):
    """The keys of SLURM and Ray."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    slurm_cluster: Literal["slurm", "local"] = Field(
        "slurm", description="with --engine slurm: local starts the jobs on this machine without SLURM, to try it out"
    )
    slurm_partition: Line | None = Field(
        None, description="partition (sbatch --partition); null: the cluster's default"
    )
    slurm_time: int = Field(
        1440,
        ge=3,
        description="minutes a job may take; a run that needs more is saved and queued again, two minutes before the end",
    )
    slurm_gpus: int = Field(0, ge=0, description="GPUs of each job")
    slurm_cpus: int = Field(4, ge=1, description="CPU cores of each job")
    slurm_mem_gb: int | None = Field(None, ge=1, description="memory of each job, GB; null: the cluster's default")
    slurm_account: Line | None = Field(None, description="account that is charged (sbatch --account)")
    slurm_qos: Line | None = Field(None, description="quality of service (sbatch --qos)")
    slurm_array_parallelism: int = Field(256, ge=1, description="most jobs of an array that run at the same time")
    slurm_setup: tuple[Line, ...] = Field(
        (), description="shell lines a job begins with, such as module load cuda or the activation of an environment"
    )
    slurm_extra: dict[Option, Line | int] = Field(
        {}, description='further options of sbatch, as {"constraint": "a100"} for --constraint=a100'
    )
    ray_address: Line | None = Field(
        None, description="running Ray cluster; null: RAY_ADDRESS, else one on this machine for the time of the sweep"
    )
    ray_gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs of each run, 0.5 for two on one; null: 1 where the cluster has GPUs and device allows",
    )
    ray_cpus: float = Field(1, gt=0, description="CPU cores of each run")

    @field_validator("*", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        """JSON has lists where the settings, being frozen, have tuples."""
        return tuple(value) if isinstance(value, list) else value
