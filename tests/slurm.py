"""A Slurm of one node on this machine, from Debian's packages: munged, slurmctld and slurmd, without cgroups.

The node says that it has 4 CPUs and 2 GPUs, which nobody checks. Two partitions: jobs of `urgent` pre-empt those
of `main`, which get their `--signal` first and then GraceTime seconds to leave.
"""

import os
import pwd
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.ranks import free_port
from tests.system_packages import program

SLURM_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
PATIENCE = 300.0
CONF = """\
ClusterName=craft
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=180
PartitionName=urgent Nodes={host} MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


@dataclass(frozen=True)
class Slurm:
    """A running cluster.

    Attributes:
        folder: Its configuration, logs and state.
    """

    folder: Path

    def run(self, *command: object) -> str:
        """Output of sbatch, squeue, scontrol, ..."""
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`, such as JobState, ExitCode, Restarts."""
        words = self.run("scontrol", "show", "job", job, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)[name]

    def logs(self) -> str:
        """What the daemons said last."""
        return "\n".join(f"{log}:\n{log.read_text()[-2000:]}" for log in sorted(self.folder.glob("*.log")))


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[Slurm]:
    """Starts it, waits until the node takes jobs, and points SLURM_CONF at it; takes all down at the end."""
    host, user = socket.gethostname().split(".")[0], pwd.getpwuid(os.geteuid()).pw_name
    for name in ("state", "spool"):
        (folder / name).mkdir()
    conf = CONF.format(host=host, user=user, folder=folder, ctld_port=free_port(), slurmd_port=free_port())
    (folder / "slurm.conf").write_text(conf)
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
    (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge.key").chmod(0o400)
    # The cluster's GPUs are made up: jobs that were given one must train on the CPU on purpose.
    ours = {"SLURM_CONF": str(folder / "slurm.conf"), "DS_ACCELERATOR": "cpu"}
    slurm, before = Slurm(folder), {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    files = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munge = [f"--{option}={folder}/munge.{end}" for option, end in files.items()]
    started: list[subprocess.Popen[bytes]] = []
    try:
        with ExitStack() as daemons:
            for command in (["munged", "--foreground", "--force", *munge], ["slurmctld", "-D"], ["slurmd", "-D"]):
                started.append(daemons.enter_context(_daemon(folder, command)))
                if command[0] == "munged":
                    _wait(slurm, (folder / "munge.sock").exists, "munged", started)
            _wait(slurm, lambda: _node_state() == "idle", "an idle node", started)
            try:
                yield slurm
            finally:
                slurm.run("scancel", "--user", user)
                _wait(slurm, lambda: not slurm.run("squeue", "--noheader"), "the end of its jobs", started)
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _daemon(folder: Path, command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    command = [program(command[0]), *command[1:]]
    with (folder / f"{Path(command[0]).name}.out.log").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _node_state() -> str:
    done = subprocess.run(["sinfo", "-h", "-p", "main", "-o", "%T"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _wait(slurm: Slurm, happened, what: str, daemons: list[subprocess.Popen[bytes]]) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        assert all(daemon.poll() is None for daemon in daemons), f"a daemon ended before {what}\n{slurm.logs()}"
        assert time.monotonic() < end, f"no {what} in {PATIENCE} s\n{slurm.logs()}"
        time.sleep(0.2)
