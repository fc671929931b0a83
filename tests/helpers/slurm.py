"""A real SLURM of one node on this machine, in one folder, for tests: munged, slurmctld and slurmd from Debian."""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

CONFIG = """
ClusterName=toy
SlurmctldHost={host}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={controller}
SlurmdPort={node}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobRequeue=1
KillWait=5
MinJobAge=10
MaxArraySize=5
SchedulerParameters=sched_interval=1
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=5
PartitionName=urgent Nodes={host} MaxTime=INFINITE State=UP PriorityTier=9
"""


def lacking() -> str | None:
    """Why there can be no SLURM here."""
    if os.name != "posix" or os.geteuid() != 0:
        return "starting SLURM's daemons needs root"
    absent = [name for name in ("slurmctld", "slurmd", "munged", "sbatch", "srun") if shutil.which(name) is None]
    return f"no {', '.join(absent)} here: apt-get install slurmctld slurmd munge" if absent else None


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Path]:
    """The path of its slurm.conf, for SLURM_CONF; RuntimeError where it does not come up."""
    host = platform.node()
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o755)
    key, sock = folder / "munge" / "key", folder / "munge" / "socket"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    conf = folder / "slurm.conf"
    conf.write_text(
        CONFIG.format(host=host, folder=folder, controller=_port(), node=_port(), cpus=min(os.cpu_count() or 1, 2))
    )
    environment = {**os.environ, "SLURM_CONF": str(conf)}
    munged = ["munged", "-F", "--force", "--key-file", str(key), "--socket", str(sock)]
    munged += [
        "--pid-file",
        f"{folder}/munge/pid",
        "--seed-file",
        f"{folder}/munge/seed",
        "--log-file",
        f"{folder}/munge/log",
    ]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for command in (munged, ["slurmctld", "-D"], ["slurmd", "-D", "-N", host]):
            with (folder / f"{command[0]}.out").open("wb") as out:
                started.append(
                    subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
                )
            time.sleep(1)
        for _ in range(60):
            shown = subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True)
            if shown.stdout.split()[:1] == ["idle"]:
                break
            time.sleep(0.5)
        else:
            logs = [
                f"{p.name}: {p.read_text(errors='replace')[-500:]}"
                for p in (*folder.glob("*.out"), *folder.glob("*.log"))
            ]
            raise RuntimeError(f"SLURM did not come up ({shown.stdout.strip()} {shown.stderr.strip()}): {logs}")
        yield conf
    finally:
        for process in reversed(started):
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            if process.poll() is None:
                process.kill()
