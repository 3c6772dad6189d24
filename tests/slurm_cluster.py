"""A real SLURM on loopback for tests: one controller and two nodes, each a daemon of this machine, gone afterwards.

Nodes share the machine's cores and files, as nodes of a cluster share a file system. Authentication is off and every
job is the user's own, so this is for a machine of one's own only. Two partitions: jobs of `urgent` preempt those of
`main`, which are sent their signal, given `GRACE_SECONDS`, and then requeued.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ranks import free_port

NODES = ("n1", "n2")
GRACE_SECONDS = 60
_DAEMONS = ("slurmctld", "slurmd")
_CONFIG = """
ClusterName=farnear
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=1
ReturnToService=2
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.txt
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes=ALL Default=NO MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=off
"""


def is_installed() -> bool:
    """Whether SLURM's daemons are here and may be started."""
    return all(shutil.which(name) for name in (*_DAEMONS, "sbatch")) and os.geteuid() == 0


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """A cluster whose nodes are idle; what to add to the environment of its commands. Daemons log into ``folder``."""
    (folder / "state").mkdir(parents=True)
    host = socket.gethostname()
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=4 State=UNKNOWN"
        for name in NODES
    )
    config = folder / "slurm.conf"
    config.write_text(
        _CONFIG.format(host=host, controller_port=free_port(), folder=folder, nodes=nodes, grace=GRACE_SECONDS)
    )
    environment = {"SLURM_CONF": str(config)}
    with ExitStack() as stack:
        stack.enter_context(_daemon(["slurmctld", "-D", "-c"], environment))
        for name in NODES:
            (folder / f"spool-{name}").mkdir()
            stack.enter_context(_daemon(["slurmd", "-D", "-N", name], environment))
        deadline = time.monotonic() + 30
        while slurm(environment, "sinfo", "--noheader", "--format=%t", "--partition=main") != "idle":
            assert time.monotonic() < deadline, f"the cluster did not start; see {folder}"
            time.sleep(0.2)
        yield environment


def slurm(environment: dict[str, str], *words: str) -> str:
    """What a SLURM command prints."""
    ended = subprocess.run(words, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)
    return ended.stdout.strip()


@contextmanager
def _daemon(command: list[str], environment: dict[str, str]) -> Iterator[None]:
    process = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
